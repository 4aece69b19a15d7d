"""Fused kernels and drop-in layers for Curvature Tuning and JoLA."""

from . import functional

__version__ = "0.1.0"
