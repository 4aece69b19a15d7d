"""What the knob does to a network: curvature, slope, and pictures of decision boundaries and regression curves."""

from .curvature import (
    CurvatureProfile,
    curvature,
    curvature_profile,
    data_directions,
    hessian_vector,
    lipschitz,
    random_directions,
)

__all__ = [
    "CurvatureProfile",
    "curvature",
    "curvature_profile",
    "data_directions",
    "hessian_vector",
    "lipschitz",
    "random_directions",
]
