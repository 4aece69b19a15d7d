"""The gated affine edit of attention heads: README.md in this folder."""

from .op import OP

__all__ = ["OP"]
