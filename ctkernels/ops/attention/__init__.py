"""Attention with the head edit in its epilogue, or torch's attention and the edit after it: docs/attention.md."""
