"""Fused kernels and drop-in layers for two ways of adapting a frozen, pretrained network: Curvature Tuning and JoLA."""

from . import functional, nn
from .fusion import Fusion, fuse
from .ops.backends import use_backend
from .ops.explain import explain
from .pretrained import load_pretrained, save_pretrained
from .steering import Steering, handle_of, steer

__version__ = "0.1.0"
__all__ = [
    "Fusion",
    "Steering",
    "__version__",
    "explain",
    "functional",
    "fuse",
    "handle_of",
    "load_pretrained",
    "nn",
    "save_pretrained",
    "steer",
    "use_backend",
]
