"""Hard-concrete gates: any number of gates in one call, forward and backward."""

from .op import OP
from .reference import CLIP, MEAN, OPEN, SAMPLE

__all__ = ["CLIP", "MEAN", "OP", "OPEN", "SAMPLE"]
