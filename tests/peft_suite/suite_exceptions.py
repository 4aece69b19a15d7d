"""The rows of peft's tests that fail on purpose: a regular expression over the test's name, and the reason."""

from __future__ import annotations

FAST = r"MLP (JoLA|CT)-.*(test_forward_output_finite|test_disable_adapters|test_merge_layers)|never"

EXCEPTIONS: dict[str, str] = {}
