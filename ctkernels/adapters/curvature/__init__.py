"""Trainable Curvature Tuning: learned (beta, coeff) in every activation of a frozen network."""

from .config import CurvatureConfig
from .layer import CurvatureLayer
from .model import CurvatureModel

__all__ = ["CurvatureConfig", "CurvatureLayer", "CurvatureModel"]
