"""Samples, tolerances and gradient checks, as in the library's own tests, for code that extends or embeds it."""

import warnings
from typing import Any

from .gradients import Finding, GradientReport, gradcheck, gradcheck_module
from .samples import SAMPLES, Sample, samples
from .tolerances import assert_no_worse

__all__ = [
    "SAMPLES",
    "Finding",
    "GradientReport",
    "Sample",
    "assert_no_worse",
    "gradcheck",
    "gradcheck_module",
    "samples",
]


def __getattr__(name: str) -> Any:
    op = name.removesuffix("_samples")
    if op == name or op not in SAMPLES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {__name__}.SAMPLES[{op!r}]", DeprecationWarning, stacklevel=2)
    return SAMPLES[op]
