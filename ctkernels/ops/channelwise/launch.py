"""Launches of the channelwise Triton kernels. Imported on the first CUDA call, never by ``import ctkernels``.

The partition depends on the tensor's shape alone, so that results are the same bits on every device and in every run.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launcher, layout
from ..record import Attrs, Inputs, Kernels, Op
from .kernels import Math, reduce_shared_kernel
from .partition import Partition, partition_for

PARAMS = 5  # parameters of the kernels
LANES = 1024  # most lanes of a program that reduces


class _Operands:
    """The operands of a call as kernels take them: dense tensors, their view, contiguous parameters."""

    def __init__(self, op: Op, math: Math, inputs: Inputs, attrs: Attrs):
        count = len(op.elementwise_flags) - len(op.elementwise)
        x = self.original = inputs[0]
        params = [None if p is None else p.contiguous() for p in inputs[1 : 1 + count]]
        second = inputs[1 + count] if len(inputs) > 1 + count else None
        packed = math.factor and second is None
        rows = [p.shape[0] if p is not None and p.dim() == 2 else 1 for p in params]
        values = [p.shape[-1] if p is not None and p.dim() else 1 for p in params]
        per_group = any(r > 1 for r in rows)
        shared = all(v == 1 for v in values)
        self.like = op.like(inputs, attrs)
        view: layout.View | None
        if packed:
            x = x.contiguous()
            view = layout.packed_view_of(x, attrs[0], shared, per_group)
        else:
            channel_dim = layout.NO_CHANNEL if shared else attrs[0]
            view = layout.view_of(x, channel_dim, per_group)
            if view is None:
                x = x.contiguous()
                view = layout.view_of(x, channel_dim, per_group)
                assert view is not None
        spare = PARAMS - count
        self.math, self.x, self.view, self.attrs = math, x, view, tuple(attrs[1:])
        self.params = [*params, *[None] * spare]
        numbers = [p if p is not None and p.dim() == 0 and p.is_cpu else None for p in self.params]
        self.numbers = sum(1 << i for i, number in enumerate(numbers) if number is not None)
        self.pointers = [p if number is None else None for p, number in zip(self.params, numbers)]
        self.values = [0.0 if number is None else number.item() for number in numbers]
        self.rows = (*[0 if 1 < r == view.groups else r for r in rows], *[1] * spare)
        self.runs = (*[view.channels // v if v > 1 else 0 for v in values], *[0] * spare)
        second = None if second is None else layout.laid_out_like(second, x)
        self.residual = None if math.factor else second
        self.factor = second if math.factor else None
        self.second_index = 1 + count
        self.precision = {torch.float32: 0, torch.float64: 2}.get(x.dtype, 1)

    def result(self) -> Tensor:
        """An uninitialised result with the layout of the view."""
        return self.x.new_empty(self.like.shape) if self.view.packed else layout.result_like(self.x)

    def laid_out(self, dy: Tensor) -> Tensor:
        """``dy`` with the layout of :meth:`result`."""
        return dy.contiguous() if self.view.packed else layout.laid_out_like(dy, self.x)

    def args(self) -> dict[str, Any]:
        """Pointers to the parameters, and the values of those that are numbers of the call: 0-d, on the CPU."""
        return _numbered("p", self.pointers) | _numbered("v", self.values)

    def meta(self) -> dict[str, Any]:
        """The constexpr arguments of kernels that read parameters."""
        meta = {"ATTRS": self.attrs, "FALLBACKS": self.math.fallbacks, "NUMBERS": self.numbers}
        return meta | {"ROWS": self.rows, "RUNS": self.runs}


def _numbered(letter: str, values: Sequence[Any]) -> dict[str, Any]:
    return {f"{letter}{i}": value for i, value in enumerate(values)}


def _forward(op: Op, math: Math, *args: Any) -> Tensor:
    operands = _Operands(op, math, *_split(op, args))
    y = operands.result()
    _run(operands, y)
    return layout.conform(y, operands.like)


def _inplace(op: Op, math: Math, *args: Any) -> None:
    operands = _Operands(op, math, *_split(op, args))
    _run(operands, operands.x)
    if operands.x is not operands.original:
        operands.original.copy_(operands.x)


def _backward(op: Op, math: Math, dy: Tensor, *args: Any) -> list[Tensor]:
    operands, grad_mask = _Operands(op, math, *_split(op, args[:-1])), args[-1]
    x = operands.x
    dx = layout.result_like(x) if grad_mask & 1 else None
    dsecond = layout.result_like(x) if grad_mask >> operands.second_index & 1 else None
    grads = [
        layout.parameter_like(p) if p is not None and grad_mask >> (1 + i) & 1 else None
        for i, p in enumerate(operands.params)
    ]
    if x.numel() == 0:
        grads = [None if g is None else g.zero_() for g in grads]
    else:
        _run(operands, dx, operands.laid_out(dy), dsecond, grads)
    dx, dsecond = (None if g is None else layout.conform(g, operands.original) for g in (dx, dsecond))
    return [g for g in (dx, *grads, dsecond) if g is not None]


def _split(op: Op, args: tuple[Any, ...]) -> tuple[Inputs, Attrs]:
    count = len(op.elementwise_flags)
    return args[:count], args[count:]


def _run(
    operands: _Operands, out: Tensor | None, dy: Tensor | None = None, dsecond: Tensor | None = None,
    grads: Sequence[Tensor | None] = (None,) * PARAMS,
) -> None:  # fmt: skip
    """One pass over x; where it leaves partial sums, or parameters are shared, a launch that reduces those."""
    if operands.x.numel() == 0:
        return
    sum_mask = 0
    for i, g in enumerate(grads):
        sum_mask |= operands.math.sums[i] if g is not None else 0
    view, x = operands.view, operands.x
    part = partition_for(view, x.element_size(), sums=sum_mask > 0)
    double: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
    partials = None
    if sum_mask and not part.one_pass:
        shape = (view.groups, part.slots, sum_mask.bit_count(), part.columns(view))
        partials = torch.empty(shape, **double if operands.precision == 2 else double | {"dtype": torch.float32})
    shared = [g is not None and g.numel() != view.groups * view.channels for g in grads]
    per_channel = [torch.empty(view.groups * view.channels, **double) if s else g for s, g in zip(shared, grads)]
    dresidual, dfactor = (None, dsecond) if operands.math.factor else (dsecond, None)
    args: dict[str, Any] = {"x": x, "residual": operands.residual, "factor": operands.factor, "dy": dy}
    args |= {"out": out, "dresidual": dresidual, "dfactor": dfactor}
    args |= (
        {"partial": partials}
        | operands.args()
        | _numbered("d", [None] * PARAMS if partials is not None else per_channel)
    )
    args |= part.args(view)
    meta = operands.meta() | part.meta()
    meta |= {"PROLOGUE": operands.math.prologue, "FACTOR": operands.math.factor, "PACKED": view.packed}
    meta |= {"PRECISION": operands.precision, "SUM_MASK": sum_mask}
    with launcher.guard(x):
        launcher.launch(operands.math.channelwise_kernel, part.programs, args, meta)
        if partials is not None:
            _reduce_partials(operands, part, partials, per_channel, sum_mask)
        if any(shared):
            _reduce_shared(operands, per_channel, [g if s else None for s, g in zip(shared, grads)])


def _reduce_partials(
    operands: _Operands, part: Partition, partials: Tensor, grads: Sequence[Tensor | None], sum_mask: int
) -> None:
    view = operands.view
    repeat, inner = (1, 1) if part.plane else (part.repeat, view.inner)
    channels = view.channels
    # with few channels: many programs of few channels each
    lanes = min(max(triton.next_power_of_2(triton.cdiv(channels, 256)), 4), 16, triton.next_power_of_2(channels))
    args = {"partial": partials} | operands.args() | _numbered("d", grads)
    args |= {"channels": channels, "inner": inner, "length": part.columns(view), "slots": part.slots, "repeat": repeat}
    terms = min(LANES // lanes, triton.next_power_of_2(part.slots * repeat * inner))
    meta = operands.meta() | {"SUM_MASK": sum_mask, "TERMS": terms, "LANES": lanes, "num_warps": 4}
    launcher.launch(operands.math.reduce_partials_kernel, view.groups * triton.cdiv(channels, lanes), args, meta)


def _reduce_shared(operands: _Operands, per_channel: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    view = operands.view
    args: dict[str, Any] = _numbered("b", [None if g is None else b for b, g in zip(per_channel, grads)])
    args |= _numbered("d", grads) | {"groups": view.groups, "channels": view.channels}
    sizes = [g.numel() for g in grads if g is not None]
    lanes = max(32, min(LANES, triton.next_power_of_2(view.groups * view.channels // min(sizes))))
    meta = {"ROWS": operands.rows, "RUNS": operands.runs, "LANES": lanes, "num_warps": min(4, lanes // 32)}
    launcher.launch(reduce_shared_kernel, max(sizes), args, meta)


def implementation(op: Op) -> Kernels:
    """The Triton kernels of ``op``, as functions with the dispatcher ops' signatures."""
    assert op.triton is not None
    module = importlib.import_module(op.triton)
    if not hasattr(module, "MATH"):  # the module launches its own kernels
        return Kernels(module.forward, None, module.backward)
    return Kernels(*(partial(function, op, module.MATH) for function in (_forward, _inplace, _backward)))
