"""The CT unit. README.md has the formula, limits and error bounds."""

from .op import OP

__all__ = ["OP"]
