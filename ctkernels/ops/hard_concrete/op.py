"""The record of the hard-concrete gates.

``noise`` holds uniform numbers of log_alpha's shape or, on a GPU, an int64 seed of shape (1,) from which kernels make them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..record import Op, Reference
from ..registration import register
from . import reference


class HardConcreteInputs(NamedTuple):
    log_alpha: Tensor
    noise: Tensor | None


class HardConcreteAttrs(NamedTuple):
    """channel_dim: unused; the compiled kernels have the argument. mode: SAMPLE, CLIP, MEAN or OPEN."""

    channel_dim: int
    mode: int
    temperature: float
    low: float
    high: float


def _noise(inputs: HardConcreteInputs) -> Tensor | None:
    """The noise, made from the seed if there is one."""
    noise = inputs.noise
    if noise is not None and not noise.is_floating_point():
        return reference.uniform(noise, inputs.log_alpha.shape, inputs.log_alpha.dtype)
    return noise


def _forward(inputs: HardConcreteInputs, attrs: HardConcreteAttrs) -> Tensor:
    return reference.forward(inputs.log_alpha, _noise(inputs), *attrs[1:])


def _backward(dy: Tensor, inputs: HardConcreteInputs, attrs: HardConcreteAttrs, grad_mask: int) -> list[Tensor]:
    slopes = reference.slopes(inputs.log_alpha, _noise(inputs), *attrs[1:])
    return [torch.zeros_like(dy) if s is None else dy * s for s in (slopes[i] for i in OP.indices(grad_mask))]


def _jvp(inputs: HardConcreteInputs, attrs: HardConcreteAttrs, tangents: HardConcreteInputs) -> Tensor:
    slopes = reference.slopes(inputs.log_alpha, _noise(inputs), *attrs[1:])
    terms = [s * t for s, t in zip(slopes, tangents) if s is not None and t is not None]
    return sum(terms, torch.zeros_like(inputs.log_alpha))


_TENSORS = "Tensor log_alpha, Tensor? noise"
_ATTRS = "int channel_dim, int mode, float temperature, float low, float high"

OP = register(
    Op(
        schema=f"hard_concrete({_TENSORS}, {_ATTRS}) -> Tensor",
        backward_schema=f"hard_concrete_backward(Tensor dy, {_TENSORS}, {_ATTRS}, int grad_mask) -> Tensor[]",
        inputs=HardConcreteInputs,
        attrs=HardConcreteAttrs,
        elementwise=frozenset({"log_alpha", "noise"}),
        reference=Reference(_forward, _backward, _jvp),
        triton=f"{__package__}.triton",
    )
)
