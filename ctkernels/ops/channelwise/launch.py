"""Launches of the Triton kernels. Imported on the first CUDA call, never by ``import ctkernels``.

How a tensor is cut depends on its shape alone, so that the same bits come out on every device and every run.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .. import layout
from ..record import Inputs, Op, Static
from .kernels import Math, fold_kernel
from .partition import Plan, plan_for

PARAMS = 5  # that the kernels have room for
LANES = 1024  # that the launches which add up partial sums work on at a time, at most


# Whether launches are being traced, by a compiler that sees through the ops.
inlining: ContextVar[bool] = ContextVar("inlining", default=False)


def launch(kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> None:
    """The one place where kernels are started: on the current stream of the current device, without waiting."""
    if inlining.get():
        kernel = torch.library.wrap_triton(kernel)
    kernel[(grid,)](**args, **meta)


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's device the current one. What a compiler traces runs where it decides."""
    return torch.cuda.device(x.device) if x.is_cuda and not inlining.get() else contextlib.nullcontext()


class _Call:
    """The operands of one call, ready for kernels: dense, parameters contiguous, the view known."""

    def __init__(self, op: Op, math: Math, inputs: Inputs, static: Static):
        count = len(op.inputs) - len(op.elementwise)
        x = inputs[0]
        assert x is not None
        given = [None if p is None else p.contiguous() for p in inputs[1 : 1 + count]]
        residual = inputs[1 + count] if len(inputs) > 1 + count else None
        rows = [p.shape[0] if p is not None and p.dim() == 2 else 1 for p in given]
        values = [p.shape[-1] if p is not None and p.dim() else 1 for p in given]
        per_group = any(r > 1 for r in rows)
        channel_dim = static[0] if any(v > 1 for v in values) else layout.NO_CHANNEL
        view = layout.view_of(x, channel_dim, per_group)
        if view is None:
            x = x.contiguous()
            view = layout.view_of(x, channel_dim, per_group)
            assert view is not None
        spare = PARAMS - count
        assert inputs[0] is not None
        self.given = inputs[0]  # x is that, or a contiguous copy of it
        self.math, self.x, self.view, self.static = math, x, view, tuple(static[1:])
        self.params = [*given, *[None] * spare]
        self.rows = (*[0 if 1 < r == view.groups else r for r in rows], *[1] * spare)
        self.runs = (*[view.channels // v if v > 1 else 0 for v in values], *[0] * spare)
        self.residual = None if residual is None else layout.laid_out_like(residual, x)
        self.residual_input = 1 + count
        self.grade = {torch.float32: 0, torch.float64: 2}.get(x.dtype, 1)

    def args(self) -> dict[str, Any]:
        return _numbered("p", self.params)

    def meta(self) -> dict[str, Any]:
        """Constants of the kernels that read parameters."""
        return {"STATIC": self.static, "FALLBACKS": self.math.fallbacks, "ROWS": self.rows, "RUNS": self.runs}


def _numbered(letter: str, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
    return {f"{letter}{i}": t for i, t in enumerate(tensors)}


def _forward(op: Op, math: Math, inputs: Inputs, static: Static) -> Tensor:
    call = _Call(op, math, inputs, static)
    y = layout.result_like(call.x)
    _run(call, y)
    return layout.conform(y, call.given)


def _forward_(op: Op, math: Math, inputs: Inputs, static: Static) -> None:
    call = _Call(op, math, inputs, static)
    _run(call, call.x)
    if call.x is not call.given:
        call.given.copy_(call.x)


def _backward(op: Op, math: Math, dy: Tensor, inputs: Inputs, static: Static, needs: int) -> list[Tensor]:
    call = _Call(op, math, inputs, static)
    x = call.x
    dx = layout.result_like(x) if needs & 1 else None
    dresidual = layout.result_like(x) if needs >> call.residual_input & 1 else None
    wanted = [p if needs >> (1 + i) & 1 else None for i, p in enumerate(call.params)]
    grads = [None if p is None else layout.parameter_like(p) for p in wanted]
    if x.numel() == 0:
        grads = [None if g is None else g.zero_() for g in grads]
    else:
        dy = layout.laid_out_like(dy, x)
        _run(call, dx, dy, dresidual, grads)
    dx, dresidual = (None if g is None else layout.conform(g, call.given) for g in (dx, dresidual))
    return [g for g in (dx, *grads, dresidual) if g is not None]


def _run(
    call: _Call, out: Tensor | None, dy: Tensor | None = None, dresidual: Tensor | None = None,
    grads: Sequence[Tensor | None] = (None,) * PARAMS,
) -> None:  # fmt: skip
    """One pass over x, and where sums are left in slots, or parameters are shared, a launch that adds those up."""
    if call.x.numel() == 0:
        return
    sums = 0
    for i, g in enumerate(grads):
        sums |= call.math.sums[i] if g is not None else 0
    view, x = call.view, call.x
    plan = plan_for(view, x.element_size(), sums=sums > 0)
    partials = None
    like: dict[str, Any] = {"dtype": torch.float64, "device": x.device}
    if sums and not plan.direct:
        shape = (view.groups, plan.slots, sums.bit_count(), plan.lanes_of(view))
        partials = torch.empty(shape, **like | {"dtype": like["dtype"] if call.grade == 2 else torch.float32})
    cells = view.groups * view.channels
    shared = [g is not None and g.numel() != cells for g in grads]
    each = [torch.empty(cells, **like) if s else g for s, g in zip(shared, grads)]
    args = {"x": x, "residual": call.residual, "dy": dy, "out": out, "dresidual": dresidual, "partial": partials}
    args |= call.args() | _numbered("d", [None] * PARAMS if partials is not None else each) | plan.args(view)
    meta = call.meta() | plan.meta()
    meta |= {"PROLOGUE": call.math.prologue, "GRADE": call.grade, "WANTED": sums}
    with guard(x):
        launch(call.math.channelwise_kernel, plan.programs, args, meta)
        if partials is not None:
            _finish(call, plan, partials, each, sums)
        if any(shared):
            _fold(call, each, [g if s else None for s, g in zip(shared, grads)])


def _finish(call: _Call, plan: Plan, partials: Tensor, each: Sequence[Tensor | None], sums: int) -> None:
    view = call.view
    repeat, inner = (1, 1) if plan.plane else (plan.repeat, view.inner)
    # of few channels, many programs with few each
    lanes = min(
        max(triton.next_power_of_2(triton.cdiv(view.channels, 256)), 4), 16, triton.next_power_of_2(view.channels)
    )
    args = {"partial": partials} | call.args() | _numbered("d", each)
    args |= {
        "channels": view.channels,
        "inner": inner,
        "length": plan.lanes_of(view),
        "slots": plan.slots,
        "repeat": repeat,
    }
    terms = min(LANES // lanes, triton.next_power_of_2(plan.slots * repeat * inner))
    meta = call.meta() | {"WANTED": sums, "TERMS": terms, "LANES": lanes, "num_warps": 4}
    launch(call.math.finish_kernel, view.groups * triton.cdiv(view.channels, lanes), args, meta)


def _fold(call: _Call, each: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    view = call.view
    args: dict[str, Any] = _numbered("b", [None if g is None else e for e, g in zip(each, grads)]) | _numbered(
        "d", grads
    )
    args |= {"groups": view.groups, "channels": view.channels}
    terms = max(view.groups * view.channels // g.numel() for g in grads if g is not None)
    lanes = max(32, min(LANES, triton.next_power_of_2(terms)))
    meta = {"ROWS": call.rows, "RUNS": call.runs, "LANES": lanes, "num_warps": min(4, lanes // 32)}
    launch(fold_kernel, max(g.numel() for g in grads if g is not None), args, meta)


def kernels(op: Op) -> list[Any]:
    """All that the implementations of ``op`` launch."""
    assert op.triton is not None
    module = importlib.import_module(op.triton)
    if hasattr(module, "MATH"):
        return [module.MATH.channelwise_kernel, module.MATH.finish_kernel, fold_kernel]
    return list(module.KERNELS)


def implementations(op: Op) -> dict[str, Callable[..., Any]]:
    """The dispatcher ops of ``op``, by suffix, on flat arguments."""
    assert op.triton is not None
    module, count = importlib.import_module(op.triton), len(op.inputs)
    functions: tuple[Callable[..., Any], ...]
    if hasattr(module, "MATH"):  # scalar functions, for the channelwise skeleton
        functions = (
            partial(_forward, op, module.MATH),
            partial(_forward_, op, module.MATH),
            partial(_backward, op, module.MATH),
        )
    else:
        functions = module.forward, module.forward_, module.backward
    forward, forward_, backward = functions
    return {
        "": lambda *args: forward(args[:count], args[count:]),
        "_": lambda *args: forward_(args[:count], args[count:]),
        "_backward": lambda dy, *args: backward(dy, args[:count], args[count:-1], args[-1]),
    }
