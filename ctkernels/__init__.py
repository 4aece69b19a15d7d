"""Fused kernels and drop-in layers for Curvature Tuning and JoLA."""

from . import functional, nn
from .steering import Steering, handle_of, steer

__all__ = ["Steering", "functional", "handle_of", "nn", "steer"]

__version__ = "0.1.0"
