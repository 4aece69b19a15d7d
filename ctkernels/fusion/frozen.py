"""Convolutions whose weights need no gradient: their backward pass needs those and not the input, which torch's own keeps.

In compiled programs it is an op, ``ctkernels::frozen_conv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.record import _LIBRARY

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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
    geometry = (source.stride, source.padding, source.dilation, source.groups) if convolves else ()
    if recorded and convolves and not torch.compiler.is_exporting():
        recording = torch.ops.ctkernels.frozen_conv if torch.compiler.is_compiling() else _recorded
        return recording(x, weight, bias, scale, *geometry)
    weight = _scaled(weight, scale)
    if convolves:
        return _convolution(x, weight, bias, geometry)
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
    return _convolution(x, source.weight, None, (source.stride, source.padding, source.dilation, source.groups))


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * scale.to(wide).view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = _LAST.get(x.dim())
    return last if last is not None and x.is_contiguous(memory_format=last) else torch.contiguous_format


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any]) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * (x.dim() - 2), groups)


def _backward(
    dy: Tensor, shape: Sequence[int], layout: torch.memory_format, weight: Tensor, geometry: Sequence[Any]
) -> Tensor:
    # Of the input only the shape is read; but on the CPU, what is not laid out as expected would be copied first.
    if dy.is_cpu:
        x = torch.empty(shape, dtype=dy.dtype, memory_format=layout)
    else:
        x = dy.new_empty(1).expand(shape)
    *where, groups = geometry
    dx, _, _ = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, *where, False, [0] * (dy.dim() - 2), groups, [True, False, False]
    )
    return dx.contiguous(memory_format=layout)


class _Recorded(torch.autograd.Function):
    """The convolution with ``scale * weight``, with a backward pass that keeps both and not the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, geometry: Sequence[Any]
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.layout, ctx.geometry = x.shape, _memory_format(x), geometry
        return _convolution(x, _scaled(weight, scale), bias, geometry).contiguous(memory_format=ctx.layout)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, scale = ctx.saved_tensors
        dx = _backward(dy, ctx.shape, ctx.layout, _scaled(weight, scale), ctx.geometry)
        return dx, None, None, None, None


def _recorded(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *geometry: Any) -> Tensor:
    return _Recorded.apply(x, weight, bias, scale, geometry)


# ---- the op, for compiled programs -------------------------------------------------------------------------------------

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_TAGS = [torch.Tag.pt2_compliant_tag]
_LIBRARY.define(f"frozen_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, {_GEOMETRY}) -> Tensor", tags=_TAGS)
_LIBRARY.define(
    f"frozen_conv_backward(Tensor dy, Tensor weight, Tensor? scale, SymInt[] shape, bool channels_last, {_GEOMETRY}) -> Tensor",
    tags=_TAGS,
)


def _op(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *geometry: Any) -> Tensor:
    return _convolution(x, _scaled(weight, scale), bias, geometry).contiguous(memory_format=_memory_format(x))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *geometry: Any) -> Tensor:
    return torch.empty_like(_convolution(x, weight, None, geometry), memory_format=_memory_format(x))


def _layout(dimensions: int, channels_last: bool) -> torch.memory_format:
    return _LAST[dimensions] if channels_last else torch.contiguous_format


def _op_backward(
    dy: Tensor, weight: Tensor, scale: Tensor | None, shape: Sequence[int], channels_last: bool, *geometry: Any
) -> Tensor:
    return _backward(dy, shape, _layout(len(shape), channels_last), _scaled(weight, scale), geometry)


def _fake_backward(
    dy: Tensor, weight: Tensor, scale: Tensor | None, shape: Sequence[int], channels_last: bool, *geometry: Any
) -> Tensor:
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=_layout(len(shape), channels_last))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, scale, *ctx.geometry = inputs
    ctx.save_for_backward(weight, scale)
    ctx.shape, ctx.channels_last = x.shape, _memory_format(x) != torch.contiguous_format


def _first_order(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight, scale = ctx.saved_tensors
    dx = torch.ops.ctkernels.frozen_conv_backward(dy, weight, scale, ctx.shape, ctx.channels_last, *ctx.geometry)
    return (dx, *[None] * (3 + len(ctx.geometry)))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(weight, scale)


def _second_order(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    weight, scale = ctx.saved_tensors
    return (_convolution(ddx, _scaled(weight, scale), None, ctx.geometry), *[None] * (4 + len(ctx.geometry)))


for _name, _kernel, _abstract, _derivative, _context in (
    ("frozen_conv", _op, _fake, _first_order, _save),
    ("frozen_conv_backward", _op_backward, _fake_backward, _second_order, _save_backward),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ctkernels::{_name}", _abstract, lib=_LIBRARY)
    torch.library.register_autograd(f"ctkernels::{_name}", _derivative, setup_context=_context, lib=_LIBRARY)
