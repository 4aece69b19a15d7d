"""Call overhead: microseconds of CPU time, and Python frames, per call on tiny tensors.

The Triton kernels, which need a GPU, are timed up to the call of the compiled kernel's handle.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctkernels
from ctkernels.ops import backends, registration

from . import measure
from .report import table

Call = Callable[[], Any]


class Site(nn.Module):
    """Convolution, BatchNorm and ReLU, as in a block of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.layer(x)))


def _forward() -> dict[str, Call]:
    x, beta, coeff = torch.randn(16), torch.tensor(0.9), torch.tensor(0.5)
    slope = torch.full((1,), 0.25)
    z, m, a = torch.randn(1, 16), torch.randn(1, 16), torch.randn(1, 16)
    q = torch.randn(1, 1, 1, 16)
    relu = nn.ReLU()
    steered = nn.Sequential(nn.ReLU())
    ctkernels.steer(steered, 0.9)
    learned = ctkernels.nn.TrainableCTU(16)
    plain = Site().eval()
    separate, fused = copy.deepcopy(plain), copy.deepcopy(plain)
    ctkernels.steer(separate, 0.9)
    ctkernels.steer(fused, 0.9)
    ctkernels.fuse(fused)
    image = torch.randn(1, 8, 2, 2)
    f = ctkernels.functional
    return {
        "F.silu": lambda: F.silu(x),
        "F.prelu": lambda: F.prelu(x, slope),
        "functional.ctu, a number": lambda: f.ctu(x, 0.9),
        "functional.ctu, tensors": lambda: f.ctu(x, beta, coeff),
        "functional.head_edit": lambda: f.head_edit(z, m, a),
        "F.scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, q, q),
        "functional.attention_head_edit": lambda: f.attention_head_edit(q, q, q, m, a),
        "nn.ReLU": lambda: relu(x),
        "nn.ReLU, steered": lambda: steered[0](x),
        "nn.TrainableCTU": lambda: learned(z),
        "convolution alone": lambda: plain.layer(image),
        "convolution, BatchNorm, ReLU": lambda: plain(image),
        "the same, steered": lambda: separate(image),
        "the same, fused": lambda: fused(image),
    }


def _both() -> dict[str, Call]:
    x, dy = torch.randn(16, requires_grad=True), torch.randn(16)
    slope, beta, coeff = (torch.full((1,), v, requires_grad=True) for v in (0.25, 0.9, 0.5))
    z, dz = torch.randn(1, 16, requires_grad=True), torch.randn(1, 16)
    m, a = (torch.randn(1, 16, requires_grad=True) for _ in range(2))
    f, grad = ctkernels.functional, torch.autograd.grad
    return {
        "F.silu": lambda: grad(F.silu(x), x, dy),
        "F.prelu, two gradients": lambda: grad(F.prelu(x, slope), (x, slope), dy),
        "functional.ctu, one gradient": lambda: grad(f.ctu(x, 0.9), x, dy),
        "functional.ctu, two gradients": lambda: grad(f.ctu(x, beta), (x, beta), dy),
        "functional.ctu, three gradients": lambda: grad(f.ctu(x, beta, coeff), (x, beta, coeff), dy),
        "functional.head_edit, two gradients": lambda: grad(f.head_edit(z, m), (z, m), dz),
        "functional.head_edit, three gradients": lambda: grad(f.head_edit(z, m, a), (z, m, a), dz),
    }


def _through_ops(calls: dict[str, Call]) -> dict[str, Call]:
    """The calls that the Triton kernels can serve."""
    return {k: call for k, call in calls.items() if k.startswith(("functional.ctu", "functional.head_edit"))}


@cache
def _triton_overloads() -> dict[str, Any]:
    """Dispatcher ops that serve CPU tensors with the host code of the Triton kernels."""
    define, kernels = registration.define_kernels, registration.triton_kernels
    return {name: define(op, kernels(op), suffix="_triton_timed") for name, op in registration.OPS.items()}


class _Handle:
    """Stands for a compiled kernel. Its launches do nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None


def _accept(x: Tensor) -> None:
    """Accept any tensor. A mock would take as long as a call."""


@contextmanager
def _on_triton() -> Iterator[None]:
    """Calls on CPU tensors take the path of the Triton kernels, up to their launches."""
    from ctkernels.ops import launcher

    with ExitStack() as stack:
        stack.enter_context(ctkernels.use_backend("triton"))
        stack.enter_context(
            mock.patch.object(backends, "check_forced_backend", bool)
        )  # a mock would take longer than the call
        stack.enter_context(mock.patch.object(backends.Backend, "refusal", return_value=None))
        stack.enter_context(mock.patch.object(launcher, "launch", return_value=_Handle()))
        for name, overloads in _triton_overloads().items():
            stack.enter_context(mock.patch.object(registration.OPS[name], "triton_overloads", overloads))
        yield


def _frames(call: Call) -> int:
    """The number of Python functions that ``call`` enters, after a call that fills caches."""
    call()
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # without ``call`` itself


def run() -> list[dict[str, Any]]:
    """Return a record {part, call, us, frames} per call; CPU time of this thread, so that machine load matters less."""
    records: list[dict[str, Any]] = []

    def add(part: str, calls: dict[str, Call]) -> None:
        times = measure.overhead(calls, clock=time.thread_time)
        records.extend({"part": part, "call": k, "us": times[k], "frames": _frames(call)} for k, call in calls.items())

    with torch.no_grad():
        add("forward", _forward())
    add("both", _both())
    if backends.BACKENDS["triton"].missing is None:
        with _on_triton():
            with torch.no_grad():
                add("forward, Triton", _through_ops(_forward()))
            add("both, Triton", _through_ops(_both()))
    return records


def bars(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that have bounds, with these."""
    us = {(r["part"], r["call"]): r["us"] for r in records}
    prelu = us["both", "F.prelu, two gradients"]
    found = [
        ("functional.ctu, us", us["forward", "functional.ctu, a number"], 5),
        ("functional.head_edit, us", us["forward", "functional.head_edit"], 5),
        ("functional.attention_head_edit beside torch's attention, us",
         us["forward", "functional.attention_head_edit"] - us["forward", "F.scaled_dot_product_attention"], 3),
        ("ctu, forward+backward, two gradients / F.prelu", us["both", "functional.ctu, two gradients"] / prelu, 1.6),
        ("head_edit, forward+backward, two gradients / F.prelu",
         us["both", "functional.head_edit, two gradients"] / prelu, 1.6),
    ]  # fmt: skip
    found += [
        (f"{call}, up to Triton's launch, us", us["forward, Triton", call], 40)
        for call in ("functional.ctu, a number", "functional.head_edit")
        if ("forward, Triton", call) in us
    ]
    return [measure.bar("fp32", what, value, "<=", bound) for what, value, bound in found]


PARTS = {
    "forward": "forward, no gradients",
    "both": "forward and backward",
    "forward, Triton": "forward, no gradients, up to Triton's launch",
    "both, Triton": "forward and backward, up to Triton's launches",
}


def text(records: list[dict[str, Any]]) -> str:
    """The records as tables."""
    tables = []
    for part, title in PARTS.items():
        rows = [[r["call"], f"{r['us']:.1f}", str(r["frames"])] for r in records if r["part"] == part]
        if rows:
            tables.append(table([title, "us of CPU", "Python frames"], rows))
    return "\n\n".join(tables)
