"""The kernels on a GPU: times by CUDA events, as a share of the bandwidth that a copy reaches, against what a user would run.

Every call works on other buffers than the calls before it, enough of them to fill the L2 cache several times over, so that
tensors come from memory as they do in a network. Contestants take turns; medians are reported.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ctkernels

from . import ctu, head_edit
from .report import table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Call = Callable[[int], Any]  # with the number of the buffers to work on


def missing() -> str | None:
    """Why there is nothing to measure here, or None."""
    return None if torch.cuda.is_available() else "no CUDA device (torch.cuda.is_available() is False)"


def copies(nbytes: int) -> int:
    """Sets of buffers of this size that fill the L2 cache four times."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-4 * l2 // nbytes))


def interleaved(contestants: dict[str, Call], sets: int, seconds: float, least: int = 20) -> dict[str, float]:
    """Median milliseconds of each contestant on the device, after three warm-up calls; they run in turn, about ``seconds``
    in all. The host never waits between calls, so that its own time does not show unless it is the longer one."""
    for run in contestants.values():
        for i in range(3):
            run(i % sets)
    torch.cuda.synchronize()
    gc.collect()
    first = _events(contestants, sets, 2)
    rounds = max(least, min(1000, int(seconds * 1e3 / max(sum(statistics.median(t) for t in first.values()), 1e-3))))
    return {name: statistics.median(t) for name, t in _events(contestants, sets, rounds).items()}


def _events(contestants: dict[str, Call], sets: int, rounds: int) -> dict[str, list[float]]:
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contestants}
    turn = 0
    for _ in range(rounds):
        for name, run in contestants.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(turn % sets)
            end.record()
            marks[name].append((begin, end))
            turn += 1
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in marks.items()}


def _record(
    op: str,
    case: str,
    dtype: str,
    x: Tensor,
    forward: dict[str, Call],
    both: dict[str, Call],
    sets: int,
    seconds: float,
) -> dict[str, Any]:
    """One row. Bandwidths count a read and a write forward, and two reads and a write more backward."""
    forward_ms, both_ms = interleaved(forward, sets, seconds), interleaved(both, sets, 2 * seconds)
    copy = 2 * x.nbytes / forward_ms["copy"]
    return {
        "op": op,
        "case": case,
        "shape": list(x.shape),
        "dtype": dtype,
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "copy_gb_s": copy / 1e6,
        "forward_share_of_copy_bandwidth": 2 * x.nbytes / forward_ms["ours"] / copy,
        "forward_backward_share_of_copy_bandwidth": 5 * x.nbytes / both_ms["ours"] / copy,
    }


def _ctu(case: ctu.Case, dtype: str, seconds: float) -> dict[str, Any]:
    channels, dim = case.shape[case.channel_dim], case.channel_dim
    x = case.sample(DTYPES[dtype]).cuda()
    sets = copies(4 * x.nbytes)
    xs, ups = ([torch.empty_like(x).copy_(x.roll(i)) for i in range(sets)] for _ in range(2))
    leaves, out = [t.clone().requires_grad_() for t in xs], [torch.empty_like(x) for _ in range(sets)]
    raw = [torch.randn(channels, device="cuda").requires_grad_() for _ in range(2)]
    view = [-1 if d == dim else 1 for d in range(x.dim())]

    def ours(t: Tensor) -> Tensor:
        return ctkernels.functional.ctu(t, raw[0], raw[1], channel_dim=dim, raw=True)

    def official(t: Tensor) -> Tensor:
        return ctu.official(t, raw[0].to(t.dtype).view(view), raw[1].to(t.dtype).view(view))

    torch._dynamo.reset()
    functions = {
        "ours": ours,
        "official": official,
        "official compiled": torch.compile(official, dynamic=False),
        "relu": F.relu,
    }
    ctu._gate(ours(x).cpu(), x.cpu(), [r.detach().cpu() for r in raw], view)
    forward, both = _calls(functions, xs, leaves, ups, lambda name: [] if name == "relu" else raw)
    return _record("ctu", case.name, dtype, x, {"copy": lambda i: out[i].copy_(xs[i]), **forward}, both, sets, seconds)


def _head_edit(name: str, lead: tuple[int, int], dtype: str, seconds: float) -> dict[str, Any]:
    heads, dim = head_edit.HEADS, head_edit.HEAD_DIM
    z = torch.randn(*lead, heads * dim, device="cuda").to(DTYPES[dtype])
    sets = copies(4 * z.nbytes)
    zs, ups = ([z.roll(i) for i in range(sets)] for _ in range(2))
    leaves, out = [t.clone().requires_grad_() for t in zs], [torch.empty_like(z) for _ in range(sets)]
    shapes = ((heads, dim), (heads, dim), (heads,), (heads,))
    parameters = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]
    row = torch.randn(heads * dim, device="cuda").to(z.dtype)
    torch._dynamo.reset()
    compiled = torch.compile(head_edit.reference, dynamic=False)
    edits = {"ours": ctkernels.functional.head_edit, "official": head_edit.official, "reference compiled": compiled}
    head_edit._gate(z.cpu(), [p.detach().cpu() for p in parameters])
    functions: dict[str, Callable[[Tensor], Tensor]] = {n: lambda t, f=f: f(t, *parameters) for n, f in edits.items()}  # type: ignore[misc]
    functions["mul"] = lambda t: t * row
    forward, both = _calls(functions, zs, leaves, ups, lambda name: [] if name == "mul" else parameters)
    return _record("head_edit", name, dtype, z, {"copy": lambda i: out[i].copy_(zs[i]), **forward}, both, sets, seconds)


def _calls(
    functions: dict[str, Callable[[Tensor], Tensor]], xs: list[Tensor], leaves: list[Tensor], ups: list[Tensor],
    parameters: Callable[[str], list[Tensor]],
) -> tuple[dict[str, Call], dict[str, Call]]:  # fmt: skip
    """Forward without autograd, and forward with all gradients, of every function on set i of the buffers."""

    def forward(f: Callable[[Tensor], Tensor]) -> Call:
        def call(i: int) -> None:
            with torch.no_grad():
                f(xs[i])

        return call

    def both(name: str, f: Callable[[Tensor], Tensor]) -> Call:
        return lambda i: torch.autograd.grad(f(leaves[i]), [leaves[i], *parameters(name)], ups[i])

    return {n: forward(f) for n, f in functions.items()}, {n: both(n, f) for n, f in functions.items()}


def run(ops: list[str], dtypes: list[str], quick: bool, seconds: float) -> list[dict[str, Any]]:
    """One record per case and dtype. Raises if a result is not what the float64 reference says."""
    records = []
    for dtype in dtypes:
        if "ctu" in ops:
            records += [_ctu(case, dtype, seconds) for case in (ctu.QUICK if quick else ctu.CASES)]
        if "head_edit" in ops:
            cases = head_edit.CASES[1:2] if quick else head_edit.CASES
            records += [_head_edit(name, lead, dtype, seconds) for name, lead in cases]
    return records


def text(records: list[dict[str, Any]]) -> str:
    """Tables of the records, an op after the other."""
    blocks = []
    for op in dict.fromkeys(r["op"] for r in records):
        rows = [r for r in records if r["op"] == op]
        for key, share in (
            ("forward_ms", "forward_share_of_copy_bandwidth"),
            ("forward_backward_ms", "forward_backward_share_of_copy_bandwidth"),
        ):
            names = list(rows[0][key])
            cells = [[r["case"], r["dtype"], *(f"{r[key][n]:.4f}" for n in names), f"{r[share]:.0%}"] for r in rows]
            title = f"{op}, {key.removesuffix('_ms').replace('_', ' + ')}, ms on the device"
            blocks.append(f"{title}\n{table(['case', 'dtype', *names, 'of copy bandwidth'], cells)}")
    return "\n\n".join(blocks)
