"""Calls of layers with frozen weights, with a scale and a shift folded into the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.frozen_conv.function import frozen_conv
from ..ops.frozen_conv.op import convolution, scaled


def call(source: Any, x: Tensor, recorded: bool, scale: Tensor | None = None, shift: Any = None) -> Tensor:
    """``source(x)``; with ``scale`` and ``shift``, ``scale * source(x) + shift`` per channel, folded into the weights.

    ``source`` is a layer that runs torch's code; neither its weights nor ``scale`` and ``shift`` need a gradient.
    ``recorded``: whether ``x`` needs one.
    """
    convolves = is_plain_convolution(source, x)
    if scale is None and not (recorded and convolves):
        return source(x)
    weight, bias = source.weight, source.bias
    if scale is not None:
        bias = (shift if bias is None else shift + scale * bias).to(weight.dtype)
    if convolves:
        return _convolved(source, x, recorded, bias, scale)
    weight = scaled(weight, scale)
    return F.linear(x, weight, bias) if isinstance(source, nn.Linear) else source._conv_forward(x, weight, bias)


def folds_cheaply(source: Any, x: Tensor) -> bool:
    """Whether scaling the weights of ``source`` costs less than scaling its result."""
    weight = source.weight
    if x.dim() != weight.dim():  # the layer's channels are not in the BatchNorm's dimension
        return False
    result = x.shape[0] * weight.shape[0]
    if not isinstance(source, nn.Linear):
        for size, stride in zip(x.shape[2:], source.stride):
            result *= size // stride
    return weight.numel() < result


def is_plain_convolution(source: Any, x: Tensor) -> bool:
    """Whether ``source`` is a convolution with numeric zero padding, and ``x`` is a batch."""
    return (
        not isinstance(source, nn.Linear)
        and source.padding_mode == "zeros"
        and not isinstance(source.padding, str)
        and x.dim() == source.weight.dim()
    )


def without_bias(source: Any, x: Tensor, recorded: bool) -> Tensor:
    """Calls the plain convolution ``source`` without its bias. ``recorded``: whether only ``x`` needs a gradient."""
    return _convolved(source, x, recorded, None, None)


def _convolved(source: Any, x: Tensor, recorded: bool, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    geometry = source.stride, source.padding, source.dilation, source.groups
    if recorded and not torch.compiler.is_exporting() and not torch.jit.is_tracing():
        return frozen_conv(x, source.weight, bias, scale, geometry)
    return convolution(x, scaled(source.weight, scale), bias, geometry)
