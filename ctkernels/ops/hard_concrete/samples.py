"""Calls of `hard_concrete` that together cover every code path."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..sample import Sample
from .function import hard_concrete


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """Calls of :func:`ctkernels.functional.hard_concrete` without noise. Gates are float32 whatever ``dtype`` is."""
    values = 3 * torch.randn(37, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for estimator in ("clip", "mean"):
        yield Sample(f"gates in evaluation, {estimator}", hard_concrete, (values.to(device, torch.float32),),
                     {"training": False, "estimator": estimator})  # fmt: skip
