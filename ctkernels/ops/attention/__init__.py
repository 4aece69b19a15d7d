"""Attention with the head edit, fused or after torch's attention: docs/attention.md."""
