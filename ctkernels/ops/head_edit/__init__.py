"""The gated affine edit of attention heads: README.md."""

from .op import OP

__all__ = ["OP"]
