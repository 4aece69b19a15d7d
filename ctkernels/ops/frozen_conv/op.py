"""Convolution with ``scale * weight`` that saves these and not its input: as a Function for eager calls, and as the op
``ctkernels::frozen_conv`` for compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..registration import define

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any]) -> Tensor:
    """geometry: stride, padding, dilation and groups."""
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * (x.dim() - 2), groups)


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """``weight`` times ``scale`` per output channel."""
    if scale is None:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * scale.to(wide).view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


def _is_channels_last(x: Tensor) -> bool:
    last = _CHANNELS_LAST.get(x.dim())
    return last is not None and x.is_contiguous(memory_format=last)


def _format(dimensions: int, channels_last: bool) -> torch.memory_format:
    return _CHANNELS_LAST[dimensions] if channels_last else torch.contiguous_format


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *geometry: Any) -> Tensor:
    y = convolution(x, scaled(weight, scale), bias, geometry)
    return y.contiguous(memory_format=_format(x.dim(), _is_channels_last(x)))


def _backward(
    dy: Tensor, weight: Tensor, scale: Tensor | None, shape: Sequence[int], channels_last: bool, *geometry: Any
) -> Tensor:
    memory_format = _format(len(shape), channels_last)
    # torch reads only the input's shape, but on the CPU would first copy an input in another memory format.
    if dy.is_cpu:
        x = torch.empty(shape, dtype=dy.dtype, memory_format=memory_format)
    else:
        x = dy.new_empty(1).expand(shape)
    stride, padding, dilation, groups = geometry
    dx, _, _ = torch.ops.aten.convolution_backward.default(
        dy, x, scaled(weight, scale), None, stride, padding, dilation, False, [0] * (dy.dim() - 2), groups,
        [True, False, False],
    )  # fmt: skip
    return dx.contiguous(memory_format=memory_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    x, weight, _, scale, *ctx.geometry = inputs
    ctx.save_for_backward(weight, scale)
    ctx.shape, ctx.channels_last = x.shape, _is_channels_last(x)


class Recorded(torch.autograd.Function):
    """The convolution of eager calls: cheaper per call than the op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dx = _backward(dy, *ctx.saved_tensors, ctx.shape, ctx.channels_last, *ctx.geometry)
        return (dx, *[None] * (3 + len(ctx.geometry)))


# ---- the op ------------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *geometry: Any) -> Tensor:
    y = convolution(x, weight, None, geometry)
    return torch.empty_like(y, memory_format=_format(x.dim(), _is_channels_last(x)))


def _first_order(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx = BACKWARD(dy, *ctx.saved_tensors, ctx.shape, ctx.channels_last, *ctx.geometry)
    return (dx, *[None] * (3 + len(ctx.geometry)))


def _fake_backward(
    dy: Tensor, weight: Tensor, scale: Tensor | None, shape: Sequence[int], channels_last: bool, *geometry: Any
) -> Tensor:
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=_format(len(shape), channels_last))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(weight, scale)


def _second_order(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    weight, scale = ctx.saved_tensors
    return (convolution(ddx, scaled(weight, scale), None, ctx.geometry), *[None] * (4 + len(ctx.geometry)))


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
FORWARD = define(
    f"frozen_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, {_GEOMETRY}) -> Tensor",
    kernel=_forward, fake=_fake, backward=_first_order, save=_save,
)  # fmt: skip
BACKWARD = define(
    f"frozen_conv_backward(Tensor dy, Tensor weight, Tensor? scale, SymInt[] shape, bool channels_last, {_GEOMETRY}) -> Tensor",
    kernel=_backward, fake=_fake_backward, backward=_second_order, save=_save_backward,
)  # fmt: skip
