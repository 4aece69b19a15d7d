"""Calls of a frozen layer with its BatchNorm folded in.

A convolution is an op of its own, ``ctkernels::frozen_conv``. It takes the weights as they are and keeps a folded copy, which
a compiled program could not: there the weights are inputs, which would be folded anew at every run. Its backward pass needs
the weights and not the input, which torch's own keeps.
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


def call(source: Any, norm: Any, x: Tensor, needs_grad: bool) -> Tensor:
    """``norm(source(x))``, of which nothing but ``x`` needs a gradient; ``needs_grad``: whether it does. ``norm`` may be None."""
    if norm is None and not needs_grad:
        return source(x)
    frozen, compiling = Frozen.of(source, norm), torch.compiler.is_compiling()
    if compiling and (not x.is_cpu or _compiler_folds()):
        weight, bias = frozen.fold(_memory_format(x))
    elif _is_plain_convolution(source, x):
        geometry = source.stride, source.padding, source.dilation, source.groups
        arguments = (*frozen, *geometry, needs_grad)
        if compiling:
            return torch.ops.ctkernels.frozen_conv(x, *arguments)
        # A way through the dispatcher would cost as much as a small convolution.
        return _Recorded.apply(x, arguments) if needs_grad else _forward(x, *arguments)
    else:
        weight, bias = frozen.fold() if compiling else frozen.folded(torch.contiguous_format)
    return F.linear(x, weight, bias) if isinstance(source, nn.Linear) else source._conv_forward(x, weight, bias)


def _is_plain_convolution(source: Any, x: Tensor) -> bool:
    if isinstance(source, nn.Linear) or source.padding_mode != "zeros" or isinstance(source.padding, str):
        return False
    return x.dim() == source.weight.dim()  # not of one image without a batch


def _compiler_folds() -> bool:
    """Whether the compiler takes weights for constants, or writes a program for other machines."""
    import torch._inductor.config

    return torch.compiler.is_exporting() or bool(torch._inductor.config.freezing)


# What torch.compiler.assume_constant_result does, which as a decorator would import the compiler along with this package.
_compiler_folds._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _memory_format(x: Tensor) -> torch.memory_format:
    last = _LAST.get(x.dim())
    return last if last is not None and x.is_contiguous(memory_format=last) else torch.contiguous_format


# ---- the op ------------------------------------------------------------------------------------------------------------

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


def _forward(x: Tensor, *args: Any) -> Tensor:
    frozen, geometry, needs_grad = Frozen(*args[:_COUNT]), args[_COUNT:-1], args[-1]
    layout = _memory_format(x)
    # A backward pass wants the weights as they are, so packing would mean to keep them twice.
    if frozen.mean is not None and not needs_grad and packing.can_pack(x):

        def order(weight: Tensor) -> Tensor:
            return packing.pack(weight, x, *geometry)

        weight, bias = frozen.folded(layout, order, [*map(tuple, geometry[:3]), geometry[3]])
        return packing.call(x, weight, bias, *geometry).contiguous(memory_format=layout)
    weight, bias = frozen.folded(layout)
    return _convolution(x, weight, bias, *geometry).contiguous(memory_format=layout)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * (x.dim() - 2), groups)


def _fake_forward(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    y = _convolution(x, weight, None, *args[_COUNT - 1 : -1])
    return torch.empty_like(y, memory_format=_memory_format(x))


def _backward(dy: Tensor, shape: Sequence[int], channels_last: bool, *args: Any) -> Tensor:
    frozen, (*where, groups) = Frozen(*args[:_COUNT]), args[_COUNT:]
    layout = _LAST[len(shape)] if channels_last else torch.contiguous_format
    weight, _ = frozen.folded(layout)
    # Of the input only the shape is read; but on the CPU, what is not laid out as expected would be copied first.
    if dy.is_cpu:
        x = torch.empty(shape, dtype=dy.dtype, memory_format=layout)
    else:
        x = dy.new_empty(1).expand(shape)
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, *where, False, [0] * (dy.dim() - 2), groups, [True, False, False]
    )
    return dx.contiguous(memory_format=layout)


def _fake_backward(dy: Tensor, shape: Sequence[int], channels_last: bool, *args: Any) -> Tensor:
    layout = _LAST[len(shape)] if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=layout)


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


class _Recorded(torch.autograd.Function):
    """The op with its gradient, called directly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        _save(ctx, (x, *arguments), x)
        return _forward(x, *arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _first_order(ctx, dy)[:2]
        arguments = (*ctx.saved_tensors, ctx.eps, *ctx.geometry)
        return _backward(dy, ctx.shape, ctx.channels_last, *arguments), None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    args = inputs[3:]
    ctx.save_for_backward(*args[: _COUNT - 1])
    ctx.eps, ctx.geometry = args[_COUNT - 1], args[_COUNT:]


def _second_order(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    weight, _ = Frozen._make([*ctx.saved_tensors, ctx.eps]).fold(_memory_format(ddx))
    return (_convolution(ddx, weight, None, *ctx.geometry), *[None] * (2 + _COUNT + len(ctx.geometry)))


for _name, _kernel, _fake, _derivative, _context in (
    ("frozen_conv", _forward, _fake_forward, _first_order, _save),
    ("frozen_conv_backward", _backward, _fake_backward, _second_order, _save_backward),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ctkernels::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"ctkernels::{_name}", _derivative, setup_context=_context, lib=_LIBRARY)
