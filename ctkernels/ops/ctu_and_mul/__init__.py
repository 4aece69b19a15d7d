"""The gated product of an MLP with a CT unit: README.md."""

from .op import OP

__all__ = ["OP"]
