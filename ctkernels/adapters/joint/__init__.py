"""JoLA and Curvature Tuning on one model, with LoRA below them if wanted, as one adapter of peft."""

from .config import JointConfig
from .model import JointModel

__all__ = ["JointConfig", "JointModel"]
