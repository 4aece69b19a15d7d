"""Hard-concrete gates as an op: any number of gates in one call, forward and backward.

``noise`` is uniform numbers of log_alpha's shape, or on a GPU an int64 seed of shape (1,), from which kernels make them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..record import Inputs, Op, Static, register
from . import reference
from .reference import CLIP, MEAN, OPEN, SAMPLE

__all__ = ["CLIP", "MEAN", "OP", "OPEN", "SAMPLE"]


def _unpack(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """log_alpha, and noise where there is any."""
    log_alpha, noise = inputs
    assert log_alpha is not None
    if noise is not None and not noise.is_floating_point():
        noise = reference.uniform(noise, log_alpha.shape, log_alpha.dtype)
    return log_alpha, noise


def _forward(inputs: Inputs, static: Static) -> Tensor:
    log_alpha, noise = _unpack(inputs)
    return reference.forward(log_alpha, noise, *static[1:])


def _slopes(inputs: Inputs, static: Static) -> tuple[Tensor, Tensor | None]:
    log_alpha, noise = _unpack(inputs)
    return reference.slopes(log_alpha, noise, *static[1:])


def _backward(dy: Tensor, inputs: Inputs, static: Static, needs: int) -> list[Tensor]:
    slopes = _slopes(inputs, static)
    found = [torch.zeros_like(dy) if slope is None else slope for slope in slopes]
    return [dy * found[i] for i in OP.wanted(needs)]


def _jvp(inputs: Inputs, static: Static, tangents: Inputs) -> Tensor:
    assert inputs[0] is not None
    total = torch.zeros_like(inputs[0])
    for slope, tangent in zip(_slopes(inputs, static), tangents):
        if slope is not None and tangent is not None:
            total = total + slope * tangent
    return total


OP = register(
    Op(
        name="hard_concrete",
        inputs=("log_alpha", "noise"),
        optional=frozenset({"noise"}),
        elementwise=frozenset({"log_alpha", "noise"}),
        static=("int channel_dim", "int mode", "float temperature", "float low", "float high"),
        reference_forward=_forward,
        reference_backward=_backward,
        reference_jvp=_jvp,
        triton="ctkernels.ops.hard_concrete.triton",
    )
)
