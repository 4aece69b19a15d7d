"""Hard-concrete gates: README.md."""

from .op import OP
from .reference import CLIP, MEAN, OPEN, SAMPLE

__all__ = ["CLIP", "MEAN", "OP", "OPEN", "SAMPLE"]
