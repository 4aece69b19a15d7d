"""The CT unit. Formula, limits and error bounds: README.md in this folder."""

from .op import OP

__all__ = ["OP"]
