"""Merged models for the runtimes that serve them: where additive edits can live, and whether what was saved is right."""
