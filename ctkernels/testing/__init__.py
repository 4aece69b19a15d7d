"""Samples, tolerances and gradient checks: what the library is tested with, for those who extend or embed it."""

from .gradients import Finding, GradientReport, gradcheck, gradcheck_module
from .samples import Sample, ctu_and_mul_samples, ctu_samples, head_edit_samples, samples
from .tolerances import assert_no_worse

__all__ = [
    "Finding",
    "GradientReport",
    "Sample",
    "assert_no_worse",
    "ctu_and_mul_samples",
    "ctu_samples",
    "gradcheck",
    "gradcheck_module",
    "head_edit_samples",
    "samples",
]
