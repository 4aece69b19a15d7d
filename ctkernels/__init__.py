"""Fused kernels and drop-in layers for two ways of adapting a frozen, pretrained network: Curvature Tuning and JoLA."""

from . import functional
from .ops._backend import explain, use_backend

__version__ = "0.1.0"
__all__ = ["__version__", "explain", "functional", "use_backend"]
