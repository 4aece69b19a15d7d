"""What every backend's results are held to: float64, and the error of the same computation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

import ctkernels
from ctkernels.testing import Sample, assert_no_worse, samples


def sample_named(name: str, dtype: torch.dtype = torch.float32) -> Sample:
    """One of :func:`ctkernels.testing.samples`."""
    return next(s for s in samples(dtype) if s.name == name)


def upstream(y: Tensor) -> Tensor:
    """A gradient for ``y``, the same on every device."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)


def outputs(sample: Sample, dy: Tensor | None = None) -> dict[str, Tensor]:
    """The result and the gradient of every tensor argument."""
    leaves = sample.requiring_grad()
    y = leaves()
    dy = upstream(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.tensors().values()), dy, allow_unused=True)
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(leaves.tensors(), grads) if g is not None}}


def _magnitudes(sample: Sample) -> float:
    """A scale for results that cancel: the largest magnitudes that enter."""
    return 1 + max((t.abs().max().item() for t in sample.tensors().values() if t.numel()), default=0.0)


def check_against_float64(sample: Sample, found: dict[str, Tensor]) -> None:
    """``found``: what :func:`outputs` gave for the sample, or for the sample on another device."""
    dtype = sample.args[0].dtype
    found = {key: value.cpu() for key, value in found.items()}
    dy = upstream(found["y"])
    with ctkernels.use_backend("reference"):
        truth = outputs(sample.map(lambda _, t: t.double()), dy)
        baseline = outputs(sample, dy)
    assert found.keys() == truth.keys()
    grade = 2e-4 if dtype in (torch.bfloat16, torch.float16) else 4 * torch.finfo(dtype).eps
    for key, value in found.items():
        argument = sample.tensors().get(key[1:])
        assert value.dtype == (dtype if key == "y" else argument.dtype)
        count = value.numel() and max(1, sample.args[0].numel() // value.numel())
        # a parameter gradient adds up `count` terms; each term is at most the magnitudes that enter, squared
        terms = _magnitudes(sample) ** 2 * (max(count, 1) ** 0.5 if key != "y" else 1)
        assert_no_worse(f"{sample.name}: {key}", value, truth[key], baseline[key], terms, grade)
