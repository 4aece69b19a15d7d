"""Samples, tolerances and gradient checks, as in the library's own tests, for code that extends or embeds it."""

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
