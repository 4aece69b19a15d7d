"""Measurements of the effects of beta: curvature, slope, decision boundaries, regression curves."""

from .curvature import (
    CurvatureProfile,
    ProfileConfig,
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
    "ProfileConfig",
    "Toys",
    "curvature",
    "curvature_profile",
    "data_directions",
    "hessian_vector",
    "lipschitz",
    "random_directions",
    "run_toys",
]
