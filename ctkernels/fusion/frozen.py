"""Calls of a frozen layer with its BatchNorm folded in.

A convolution's folded weights are kept, and its backward pass needs those and not the input, which torch's own keeps. In
compiled programs it is an op, ``ctkernels::frozen_conv``: there the weights are inputs, and would be folded at every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._op import _LIBRARY
from . import packing
from .fold import Frozen

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def call(source: Any, frozen: Frozen, x: Tensor, needs_grad: bool) -> Tensor:
    """``source`` and the norm after it, which are ``frozen``; ``needs_grad``: whether ``x`` needs a gradient."""
    if frozen.mean is None and not needs_grad:
        return source(x)
    compiling = torch.compiler.is_compiling()
    if compiling and (not x.is_cpu or _compiler_folds()):
        weight, bias = frozen.fold(_memory_format(x))
    elif _is_plain_convolution(source) and x.dim() == frozen.weight.dim():  # not of one image without a batch
        geometry = source.stride, source.padding, source.dilation, source.groups
        if compiling:
            return torch.ops.ctkernels.frozen_conv(x, *frozen, *geometry, needs_grad)
        if not needs_grad:
            return _forward(x, frozen, geometry)
        layout = _memory_format(x)
        return _Recorded.apply(x, *frozen.folded(layout), layout, geometry)
    else:
        weight, bias = frozen.fold() if compiling else frozen.folded(torch.contiguous_format)
    return F.linear(x, weight, bias) if isinstance(source, nn.Linear) else source._conv_forward(x, weight, bias)


def adds_bias_apart(source: Any, frozen: Frozen, x: Tensor) -> bool:
    """Whether torch would make a pass of its own over the result to add the bias, as it does after cuDNN's convolutions."""
    if not x.is_cuda or (frozen.mean is None and frozen.bias is None):
        return False
    return _is_plain_convolution(source) and x.dim() == frozen.weight.dim()


def call_without_bias(source: Any, frozen: Frozen, x: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`call` gives, without a gradient, but for the bias, which is left to add."""
    layout = _memory_format(x)
    fold = frozen.fold if torch.compiler.is_compiling() else frozen.folded
    weight, bias = fold(layout, wide_bias=True)
    assert bias is not None
    y = _convolution(x, weight, None, (source.stride, source.padding, source.dilation, source.groups))
    return y.contiguous(memory_format=layout), bias


def _is_plain_convolution(source: Any) -> bool:
    return not isinstance(source, nn.Linear) and source.padding_mode == "zeros" and not isinstance(source.padding, str)


def _compiler_folds() -> bool:
    """Whether the compiler takes weights for constants, or writes a program for other machines."""
    import torch._inductor.config

    return torch.compiler.is_exporting() or bool(torch._inductor.config.freezing)


# What torch.compiler.assume_constant_result does, which as a decorator would import the compiler along with this package.
_compiler_folds._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _memory_format(x: Tensor) -> torch.memory_format:
    last = _LAST.get(x.dim())
    return last if last is not None and x.is_contiguous(memory_format=last) else torch.contiguous_format


def _forward(x: Tensor, frozen: Frozen, geometry: Sequence[Any]) -> Tensor:
    """Without a gradient: a backward pass wants the weights unpacked, and packing would keep them twice."""
    layout = _memory_format(x)
    if frozen.mean is not None and packing.can_pack(x):
        weight, bias = frozen.folded(layout, packing.order(x, geometry), geometry)
        y = packing.call(x, weight, bias, geometry)
    else:
        y = _convolution(x, *frozen.folded(layout), geometry)
    return y.contiguous(memory_format=layout)


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
    """The convolution, with a backward pass that differentiates through the kept weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: torch.memory_format, geometry: Sequence[Any]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.layout, ctx.geometry = x.shape, layout, geometry
        return _convolution(x, weight, bias, geometry).contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        return _backward(dy, ctx.shape, ctx.layout, weight, ctx.geometry), None, None, None, None


# ---- the op, for compiled programs -------------------------------------------------------------------------------------

_WEIGHTS = "Tensor weight, Tensor? bias, Tensor? gain, Tensor? offset, Tensor? mean, Tensor? variance, Tensor? counter, float eps"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_COUNT = len(Frozen._fields)

_LIBRARY.define(
    f"frozen_conv(Tensor x, {_WEIGHTS}, {_GEOMETRY}, bool needs_grad) -> Tensor", tags=[torch.Tag.pt2_compliant_tag]
)
_LIBRARY.define(
    f"frozen_conv_backward(Tensor dy, SymInt[] shape, bool channels_last, {_WEIGHTS}, {_GEOMETRY}) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)


def _op(x: Tensor, *args: Any) -> Tensor:
    frozen, geometry, needs_grad = Frozen(*args[:_COUNT]), _as_tuples(args[_COUNT:-1]), args[-1]
    if not needs_grad:
        return _forward(x, frozen, geometry)
    layout = _memory_format(x)
    return _convolution(x, *frozen.folded(layout), geometry).contiguous(memory_format=layout)


def _as_tuples(geometry: Sequence[Any]) -> tuple[Any, ...]:
    """As modules have it, and as it is compared: the dispatcher makes lists of tuples."""
    return (*map(tuple, geometry[:3]), geometry[3])


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    y = _convolution(x, weight, None, args[_COUNT - 1 : -1])
    return torch.empty_like(y, memory_format=_memory_format(x))


def _layout(dimensions: int, channels_last: bool) -> torch.memory_format:
    return _LAST[dimensions] if channels_last else torch.contiguous_format


def _op_backward(dy: Tensor, shape: Sequence[int], channels_last: bool, *args: Any) -> Tensor:
    layout = _layout(len(shape), channels_last)
    weight, _ = Frozen(*args[:_COUNT]).folded(layout)
    return _backward(dy, shape, layout, weight, args[_COUNT:])


def _fake_backward(dy: Tensor, shape: Sequence[int], channels_last: bool, *args: Any) -> Tensor:
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=_layout(len(shape), channels_last))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *args = inputs
    ctx.save_for_backward(*args[: _COUNT - 1])
    ctx.eps, ctx.geometry = args[_COUNT - 1], args[_COUNT:-1]
    ctx.shape, ctx.channels_last = x.shape, _memory_format(x) != torch.contiguous_format


def _first_order(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx = torch.ops.ctkernels.frozen_conv_backward(
        dy, ctx.shape, ctx.channels_last, *ctx.saved_tensors, ctx.eps, *ctx.geometry
    )
    return (dx, *[None] * (_COUNT + len(ctx.geometry) + 1))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    args = inputs[3:]
    ctx.save_for_backward(*args[: _COUNT - 1])
    ctx.eps, ctx.geometry = args[_COUNT - 1], args[_COUNT:]


def _second_order(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    weight, _ = Frozen._make([*ctx.saved_tensors, ctx.eps]).fold(_memory_format(ddx))
    return (_convolution(ddx, weight, None, ctx.geometry), *[None] * (2 + _COUNT + len(ctx.geometry)))


for _name, _kernel, _abstract, _derivative, _context in (
    ("frozen_conv", _op, _fake, _first_order, _save),
    ("frozen_conv_backward", _op_backward, _fake_backward, _second_order, _save_backward),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ctkernels::{_name}", _abstract, lib=_LIBRARY)
    torch.library.register_autograd(f"ctkernels::{_name}", _derivative, setup_context=_context, lib=_LIBRARY)
