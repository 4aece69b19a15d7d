"""The CT unit of a gated MLP, and the product it enters. README.md in this folder."""

from .op import OP

__all__ = ["OP"]
