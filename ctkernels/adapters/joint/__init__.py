"""JoLA and Curvature Tuning, optionally with LoRA, as one adapter."""

from .config import JointConfig
from .model import JointModel

__all__ = ["JointConfig", "JointModel"]
