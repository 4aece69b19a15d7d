"""Layers whose weights need no gradient, with a scale and a shift folded into the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.frozen_conv.function import frozen_conv
from ..ops.frozen_conv.op import convolution, scaled


def call(source: Any, x: Tensor, recorded: bool, scale: Tensor | None = None, shift: Any = None) -> Tensor:
    """``source(x)``, times ``scale`` and plus ``shift`` per channel, if they are given: they are folded into the weights.

    ``source`` is a layer by torch's code, and neither its weights nor ``scale`` and ``shift`` need a gradient. ``recorded``:
    ``x`` needs one.
    """
    convolves = is_plain_convolution(source, x)
    if scale is None and not (recorded and convolves):
        return source(x)
    weight, bias = source.weight, source.bias
    if scale is not None:
        bias = (shift if bias is None else shift + scale * bias).to(weight.dtype)
    if recorded and convolves and not torch.compiler.is_exporting() and not torch._C._is_tracing():
        return frozen_conv(x, weight, bias, scale, _geometry(source))
    weight = scaled(weight, scale)
    if convolves:
        return convolution(x, weight, bias, _geometry(source))
    return F.linear(x, weight, bias) if isinstance(source, nn.Linear) else source._conv_forward(x, weight, bias)


def folds_cheaply(source: Any, x: Tensor) -> bool:
    """Whether the weights of ``source`` are smaller than its result, so that scaling them costs less than scaling that."""
    weight = source.weight
    if x.dim() != weight.dim():  # other dimensions than the BatchNorm's are the layer's channels
        return False
    result = x.shape[0] * weight.shape[0]
    if not isinstance(source, nn.Linear):
        for size, stride in zip(x.shape[2:], source.stride):
            result *= size // stride
    return weight.numel() < result


def is_plain_convolution(source: Any, x: Tensor) -> bool:
    """Whether it is a convolution that pads with zeros, by numbers, and ``x`` is a batch."""
    return (
        not isinstance(source, nn.Linear)
        and source.padding_mode == "zeros"
        and not isinstance(source.padding, str)
        and x.dim() == source.weight.dim()
    )


def without_bias(source: Any, x: Tensor) -> Tensor:
    """``source``, a plain convolution, without its bias."""
    return convolution(x, source.weight, None, _geometry(source))


def _geometry(source: Any) -> tuple[Any, ...]:
    return source.stride, source.padding, source.dilation, source.groups
