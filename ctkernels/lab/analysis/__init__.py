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
from .toys import Toys, run_toys

__all__ = [
    "CurvatureProfile",
    "Toys",
    "curvature",
    "curvature_profile",
    "data_directions",
    "hessian_vector",
    "lipschitz",
    "random_directions",
    "run_toys",
]
