"""Launches of the Triton kernels. Imported on the first CUDA call, never by ``import ctkernels``.

How a tensor is cut depends on its shape alone, so that the same bits come out on every device and every run.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import _layout
from ._op import Inputs, Op, Static
from ._triton_kernels import SUMS, Math, backward_kernel, finish_kernel, forward_kernel
from ._triton_plan import Plan, plan_for

PARAMS = 5


def launch(kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> None:
    """The one place where kernels are started: on the current stream of the current device, without waiting."""
    kernel[(grid,)](**args, **meta)


class _Call:
    """The operands of one call, ready for kernels: dense, parameters contiguous, the view known."""

    def __init__(self, op: Op, inputs: Inputs, static: Static):
        self.math: Math = importlib.import_module(op.triton).MATH  # type: ignore[arg-type]
        x = inputs[0]
        assert x is not None
        self.given = [None if p is None else p.contiguous() for p in inputs[1 : 1 + PARAMS]]
        residual = inputs[1 + PARAMS] if len(inputs) > 1 + PARAMS else None
        present = [(i, p) for i, p in enumerate(self.given) if p is not None]
        self.grouped = sum(1 << i for i, p in present if p.dim() == 2 and p.shape[0] > 1)
        self.spread = sum(1 << i for i, p in present if p.dim() and p.shape[-1] > 1)
        channel_dim = static[0] if self.spread else _layout.NO_CHANNEL
        view = _layout.view_of(x, channel_dim, self.grouped > 0)
        if view is None:
            x = x.contiguous()
            view = _layout.view_of(x, channel_dim, self.grouped > 0)
            assert view is not None
        self.x, self.view, self.static = x, view, tuple(static[1:])
        self.residual = None if residual is None else _layout.laid_out_like(residual, x)
        self.grade = {torch.float32: 0, torch.float64: 2}.get(x.dtype, 1)
        self.device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

    def args(self) -> dict[str, Any]:
        return {f"p{i}": p for i, p in enumerate(self.given)}

    def meta(self, *functions: str) -> dict[str, Any]:
        """Constants of every kernel, and the scalar functions it is made of."""
        found: dict[str, Any] = {name.upper(): getattr(self.math, name) for name in functions}
        return found | {
            "STATIC": self.static,
            "FALLBACKS": self.math.fallbacks,
            "PROLOGUE": self.math.prologue,
            "GROUPED": self.grouped,
            "SPREAD": self.spread,
        }


def forward(op: Op, inputs: Inputs, static: Static) -> Tensor:
    call = _Call(op, inputs, static)
    y = torch.empty_like(call.x)
    _forward(call, y)
    return y


def forward_(op: Op, inputs: Inputs, static: Static) -> None:
    call = _Call(op, inputs, static)
    _forward(call, call.x)
    x = inputs[0]
    assert x is not None
    if call.x is not x:
        x.copy_(call.x)


def _forward(call: _Call, y: Tensor) -> None:
    if y.numel() == 0:
        return
    plan = plan_for(call.view, y.element_size(), sums=False)
    args = {"x": call.x, "residual": call.residual, "y": y} | call.args() | plan.args(call.view)
    with call.device:
        launch(
            forward_kernel, plan.programs, args, call.meta("derive", "forward") | {"GRADE": call.grade} | plan.meta()
        )


def backward(op: Op, dy: Tensor, inputs: Inputs, static: Static, needs: int) -> list[Tensor]:
    call = _Call(op, inputs, static)
    x, view = call.x, call.view
    dx = torch.empty_like(x) if needs & 1 else None
    dresidual = torch.empty_like(x) if needs >> (1 + PARAMS) & 1 else None
    wanted = [i for i in range(PARAMS) if needs >> (1 + i) & 1]
    grads = {i: _Gradient(p, view) for i, p in enumerate(call.given) if p is not None and i in wanted}
    by_input = {0: dx, 1 + PARAMS: dresidual}
    if x.numel() == 0:
        by_input |= {1 + i: torch.zeros_like(g.param) for i, g in grads.items()}
    else:
        _backward(call, _layout.laid_out_like(dy, x), dx, dresidual, {i: g.buffer for i, g in grads.items()})
        by_input |= {1 + i: g.result() for i, g in grads.items()}
    return [g for i in op.wanted(needs) if (g := by_input[i]) is not None]


def _backward(call: _Call, dy: Tensor, dx: Tensor | None, dresidual: Tensor | None, grads: dict[int, Tensor]) -> None:
    x, view = call.x, call.view
    prologue = {3: 32, 4: 64} if call.math.prologue else {}
    sums = 0
    for i in grads:
        sums |= prologue.get(i, 31 if i == 2 else 15)
    plan = plan_for(view, x.element_size(), sums=sums > 0)
    partial = None
    if sums and not plan.direct:
        dtype = torch.float64 if call.grade == 2 else torch.float32
        partial = torch.empty((view.groups, plan.slots, SUMS.value, plan.lanes_of(view)), dtype=dtype, device=x.device)
    outputs = {f"d{i}": grads.get(i) for i in range(PARAMS)}
    args: dict[str, Any] = {
        "x": x,
        "residual": call.residual,
        "dy": dy,
        "dx": dx,
        "dresidual": dresidual,
        "partial": partial,
    }
    args |= call.args() | ({f"d{i}": None for i in range(PARAMS)} if partial is not None else outputs) | plan.args(view)
    meta = call.meta("derive", "gradients", "finish") | {"GRADE": call.grade, "WANTED": sums} | plan.meta()
    with call.device:
        launch(backward_kernel, plan.programs, args, meta)
        if partial is not None:
            _finish(call, plan, partial, outputs, sums)


def _finish(call: _Call, plan: Plan, partial: Tensor, outputs: dict[str, Tensor | None], sums: int) -> None:
    view = call.view
    repeat, inner = (1, 1) if plan.plane else (plan.repeat, view.inner)
    terms = plan.slots * repeat * inner
    lanes = min(64, triton.next_power_of_2(view.channels))
    rows = min(1024 // lanes, triton.next_power_of_2(terms))
    args = {"partial": partial} | call.args() | outputs
    args |= {
        "channels": view.channels,
        "inner": inner,
        "length": plan.lanes_of(view),
        "slots": plan.slots,
        "repeat": repeat,
    }
    meta = call.meta("finish") | {"WANTED": sums, "ROWS": rows, "LANES": lanes, "num_warps": 4}
    launch(finish_kernel, view.groups * triton.cdiv(view.channels, lanes), args, meta)


class _Gradient:
    """Gradient of one parameter: a value per (group, channel), added up where the parameter is shared between them."""

    def __init__(self, param: Tensor, view: _layout.View):
        self.param, self.view = param, view
        self.whole = param.numel() == view.groups * view.channels
        shape = (view.groups, view.channels)
        self.buffer = torch.empty(shape, dtype=param.dtype if self.whole else torch.float64, device=param.device)

    def result(self) -> Tensor:
        if self.whole:
            return self.buffer.view(self.param.shape)
        groups = self.param.shape[0] if self.param.dim() == 2 else 1
        dims = [d for d, kept in enumerate((groups > 1, self.param.numel() > groups)) if not kept]
        return self.buffer.sum(dims).to(self.param.dtype).view(self.param.shape)


def implementations(op: Op) -> dict[str, Callable[..., Any]]:
    """The dispatcher ops of ``op``, by suffix, on flat arguments."""
    count = len(op.inputs)

    def split(args: Sequence[Any]) -> tuple[Inputs, Static]:
        return tuple(args[:count]), tuple(args[count:])

    return {
        "": lambda *args: forward(op, *split(args)),
        "_": lambda *args: forward_(op, *split(args)),
        "_backward": lambda dy, *args: backward(op, dy, *split(args[:-1]), args[-1]),
    }
