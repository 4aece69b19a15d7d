"""Merged models for serving runtimes: placement of additive edits, and verification of saved models."""
