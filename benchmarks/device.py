"""The kernels on a GPU against the alternatives a user has: times by CUDA events, also relative to a copy's bandwidth.

"ours" is the backend that a call chooses by itself (see ``explain``); the other backends are forced.

Successive calls use different buffers, enough to fill the L2 cache several times, so that tensors come from memory as in a
network. A round of calls is captured in a CUDA graph and its replays are timed; host time, which dominates eager calls on
small tensors, has its own table. Contestants take turns; medians are reported.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ctkernels
from ctkernels.ops import backends

from . import ctu, head_edit, measure
from .report import table

DEVICE = "cuda"  # "cpu" in a rehearsal, see below
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Call = Callable[[int], Any]  # takes the index of the buffers to use
OURS = "ours"


def missing() -> str | None:
    """The reason why nothing can be measured here, or None."""
    return None if torch.cuda.is_available() else "no CUDA device (torch.cuda.is_available() is False)"


def rehearse() -> None:
    """Runs what is here on the CPU instead, timed by the host's clock: it shows that the code works, and nothing else."""
    global DEVICE
    DEVICE = "cpu"


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, backend="inductor" if DEVICE == "cuda" else "eager")


def copies(nbytes: int) -> int:
    """The number of buffer sets of this size that fill the L2 cache four times, limited by the size of a graph."""
    if DEVICE == "cpu":
        return 2
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(64, -(-4 * l2 // nbytes)))


def interleaved_graphs(contestants: dict[str, Call], sets: int, seconds: float, least: int = 10) -> dict[str, float]:
    """Median milliseconds of each contestant's call on the device; they run in turn, about ``seconds`` in all."""
    if DEVICE == "cpu":
        return measure.interleaved({name: partial(run, 0) for name, run in contestants.items()}, 0.0, least=1)
    graphs = {}
    for name, run in contestants.items():
        for i in range(max(sets, 3)):  # warm-up, including compilation
            run(i % sets)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for i in range(sets):
                run(i)
    gc.collect()
    first = _replayed(graphs, 2)
    rounds = max(least, min(500, int(seconds * 1e3 / sum(statistics.median(t) for t in first.values()))))
    return {name: statistics.median(t) / sets for name, t in _replayed(graphs, rounds).items()}


def _replayed(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            marks[name].append((begin, end))
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
    """One record. Bandwidths count one read and one write for forward, plus two reads and one write for backward."""
    forward_ms, both_ms = interleaved_graphs(forward, sets, seconds), interleaved_graphs(both, sets, 2 * seconds)
    copy = 2 * x.nbytes / forward_ms["copy"]
    return {
        "op": op,
        "case": case,
        "shape": list(x.shape),
        "dtype": dtype,
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "copy_gb_s": copy / 1e6,
        "forward_share_of_copy_bandwidth": 2 * x.nbytes / forward_ms[OURS] / copy,
        "forward_backward_share_of_copy_bandwidth": 5 * x.nbytes / both_ms[OURS] / copy,
    }


def ctu_row(case: ctu.Case, dtype: str, seconds: float, inductor: bool = True) -> dict[str, Any]:
    """A row of the table. inductor: whether compiled contestants take part, which take seconds to compile."""
    channels, dim = case.shape[case.channel_dim], case.channel_dim
    x = case.sample(DTYPES[dtype]).to(DEVICE)
    sets = copies(4 * x.nbytes)
    xs, ups = ([torch.empty_like(x).copy_(x.roll(i)) for i in range(sets)] for _ in range(2))
    leaves, out = [t.clone().requires_grad_() for t in xs], [torch.empty_like(x) for _ in range(sets)]
    raw = [torch.randn(channels, device=DEVICE).requires_grad_() for _ in range(2)]
    view = [-1 if d == dim else 1 for d in range(x.dim())]

    def ours(t: Tensor) -> Tensor:
        return ctkernels.functional.ctu(t, raw[0], raw[1], channel_dim=dim, raw=True)

    def official(t: Tensor) -> Tensor:
        return ctu.official(t, raw[0].to(t.dtype).view(view), raw[1].to(t.dtype).view(view))

    torch._dynamo.reset()
    functions = {
        **_by_backend(ours),
        "official": official,
        **({"official compiled": compiled(official)} if inductor else {}),
        "relu": F.relu,
        "silu": F.silu,
    }
    ctu._gate(ours(x).cpu(), x.cpu(), [r.detach().cpu() for r in raw], view)
    forward, both = _calls(functions, xs, leaves, ups, lambda name: [] if name in ("relu", "silu") else raw)
    return _record("ctu", case.name, dtype, x, {"copy": lambda i: out[i].copy_(xs[i]), **forward}, both, sets, seconds)


def head_edit_row(
    name: str, lead: tuple[int, int], dtype: str, seconds: float, inductor: bool = True
) -> dict[str, Any]:
    """As :func:`ctu_row`."""
    heads, dim = head_edit.HEADS, head_edit.HEAD_DIM
    z = torch.randn(*lead, heads * dim, device=DEVICE).to(DTYPES[dtype])
    sets = copies(4 * z.nbytes)
    zs, ups = ([z.roll(i) for i in range(sets)] for _ in range(2))
    leaves, out = [t.clone().requires_grad_() for t in zs], [torch.empty_like(z) for _ in range(sets)]
    shapes = ((heads, dim), (heads, dim), (heads,), (heads,))
    parameters = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    row = torch.randn(heads * dim, device=DEVICE).to(z.dtype)
    torch._dynamo.reset()
    ours = _by_backend(ctkernels.functional.head_edit)
    edits = {**ours, "official": head_edit.official}
    if inductor:
        edits["reference compiled"] = compiled(head_edit.reference)
    head_edit._gate(z.cpu(), [p.detach().cpu() for p in parameters])
    functions: dict[str, Callable[[Tensor], Tensor]] = {n: lambda t, f=f: f(t, *parameters) for n, f in edits.items()}
    functions["mul"] = lambda t: t * row
    forward, both = _calls(functions, zs, leaves, ups, lambda name: [] if name == "mul" else parameters)
    return _record("head_edit", name, dtype, z, {"copy": lambda i: out[i].copy_(zs[i]), **forward}, both, sets, seconds)


def _by_backend(function: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """``function`` with the default backend, and with every other available GPU backend."""

    def forced(name: str) -> Callable[..., Tensor]:
        def call(*args: Tensor) -> Tensor:
            with ctkernels.use_backend(name):
                return function(*args)

        return call

    names = [b.name for b in backends.BACKENDS.values() if b.device == DEVICE and b.missing is None]
    return {OURS: function} | {f"{OURS}, {name}": forced(name) for name in names[1:]}


def call_overhead() -> dict[str, float]:
    """Host microseconds per call on a tiny tensor, the cost that dominates networks with small batches."""
    x, dy = (torch.randn(16, device=DEVICE) for _ in range(2))
    z, dz = (torch.randn(1, 256, device=DEVICE) for _ in range(2))
    beta = torch.full((16,), 0.9, device=DEVICE, requires_grad=True)
    m, a = (torch.randn(4, 64, device=DEVICE, requires_grad=True) for _ in range(2))
    units = _by_backend(lambda t: ctkernels.functional.ctu(t, beta, channel_dim=0))
    edits = _by_backend(lambda t: ctkernels.functional.head_edit(t, m, a))
    forward: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}

    def add(name: str, function: Callable[..., Tensor], values: Tensor, up: Tensor, *learned: Tensor) -> None:
        leaf = values.clone().requires_grad_()
        forward[f"{name} forward"] = lambda: function(values)
        both[f"{name} forward+backward"] = lambda: torch.autograd.grad(function(leaf), (leaf, *learned), up)

    add("silu", F.silu, x, dy)
    for name, unit in units.items():
        add(f"ctu, {name}", unit, x, dy, beta)
    for name, edit in edits.items():
        add(f"head_edit, {name}", edit, z, dz, m, a)
    logits, up = (torch.randn(2 * head_edit.HEADS, device=DEVICE) for _ in range(2))
    gates = _by_backend(lambda t: ctkernels.functional.hard_concrete(t, training=True))
    for name, gate in (gates | {"composed": measure.composed(gates[OURS])}).items():
        add(f"gates, {name}", gate, logits, up)
    often = {"calls": 2, "rounds": 1} if DEVICE == "cpu" else {}
    with torch.no_grad():
        times = measure.overhead(forward, **often)
    return times | measure.overhead(both, **often)


def _calls(
    functions: dict[str, Callable[[Tensor], Tensor]], xs: list[Tensor], leaves: list[Tensor], ups: list[Tensor],
    parameters: Callable[[str], list[Tensor]],
) -> tuple[dict[str, Call], dict[str, Call]]:  # fmt: skip
    """Calls of every function on buffer set i: forward without autograd, and forward with all gradients."""

    def forward(f: Callable[[Tensor], Tensor]) -> Call:
        def call(i: int) -> None:
            with torch.no_grad():
                f(xs[i])

        return call

    def both(name: str, f: Callable[[Tensor], Tensor]) -> Call:
        return lambda i: torch.autograd.grad(f(leaves[i]), [leaves[i], *parameters(name)], ups[i])

    return {n: forward(f) for n, f in functions.items()}, {n: both(n, f) for n, f in functions.items()}


def run(ops: list[str], dtypes: list[str], quick: bool, seconds: float, only: str = "") -> list[dict[str, Any]]:
    """Return a record per dtype and case with ``only`` in its name. Raises if a result differs from the float64 reference."""
    records = []
    for dtype in dtypes:
        if "ctu" in ops:
            units = ctu.QUICK if quick else ctu.CASES
            records += [ctu_row(case, dtype, seconds) for case in units if only in case.name]
        if "head_edit" in ops:
            edits = head_edit.CASES[1:2] if quick else head_edit.CASES
            records += [head_edit_row(name, lead, dtype, seconds) for name, lead in edits if only in name]
        print(f"{dtype} done", file=sys.stderr)
    return records


def text(records: list[dict[str, Any]], overhead: dict[str, float]) -> str:
    """The records as tables, one per op."""
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
    rows = [[name, f"{us:.1f}"] for name, us in overhead.items()]
    return "\n\n".join([*blocks, table(["a call on next to nothing", "us"], rows)])
