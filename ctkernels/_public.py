"""The public names of ``ctkernels``; importing this registers the ops with torch."""

from . import functional, nn
from .fusion import Fusion, fuse
from .ops.backends import use_backend
from .ops.explain import explain
from .pretrained import load_pretrained, save_pretrained
from .steering import Steering, handle_of, steer

__all__ = [
    "Fusion",
    "Steering",
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
