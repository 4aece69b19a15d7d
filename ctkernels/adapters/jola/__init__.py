"""JoLA: gated edits of the outputs of attention heads."""

from .config import JolaConfig
from .layer import JolaLayer
from .model import JolaModel

__all__ = ["JolaConfig", "JolaLayer", "JolaModel"]
