"""The gated product against torch's ``silu(gate) * up``, eager and compiled, and the CT unit followed by a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctkernels.functional import ctu, ctu_and_mul

from . import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The MLPs of a small and of a large language model.
CASES = {"8 x 512 tokens, 1536 wide": (8, 512, 1536), "4 x 512 tokens, 14336 wide": (4, 512, 14336)}


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def two_passes(gate: Tensor, up: Tensor, beta: Tensor, coeff: Tensor) -> Tensor:
    return ctu(gate, beta, coeff, channel_dim=-1, activation="silu") * up


def ours(gate: Tensor, up: Tensor, beta: Tensor, coeff: Tensor) -> Tensor:
    return ctu_and_mul(gate, up, beta, coeff, channel_dim=-1)


def packed(gate_up: Tensor, _: Tensor, beta: Tensor, coeff: Tensor) -> Tensor:
    return ctu_and_mul(gate_up, None, beta, coeff)


def run(dtypes: list[str], quick: bool, seconds: float, tuned: bool = False) -> list[dict[str, Any]]:
    """Return a record per case and dtype. Raises if a result differs from the float64 reference."""
    cases = {"1 x 128 tokens, 1536 wide": (1, 128, 1536)} if quick else CASES
    return [_one(name, shape, d, seconds, compiled=not quick) for name, shape in cases.items() for d in dtypes]


def _one(name: str, shape: tuple[int, ...], dtype_name: str, seconds: float, compiled: bool) -> dict[str, Any]:
    dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)
    gate, up, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    knobs = [
        0.5 + 0.1 * torch.rand(shape[-1], generator=generator),
        0.8 + 0.1 * torch.rand(shape[-1], generator=generator),
    ]
    _gate(gate, up, knobs)
    inputs = [t.clone().requires_grad_() for t in (gate, up)]
    both = torch.cat([gate, up], -1)
    learned = [t.clone().requires_grad_() for t in knobs]

    plains: dict[str, Callable[..., Tensor]] = {"silu(g) * u": plain}
    if compiled:
        torch._dynamo.reset()
        plains["silu(g) * u compiled"] = torch.compile(plain, dynamic=False)
    units = {"ours": ours, "ctu, then mul": two_passes}

    def forward(f: Callable[..., Tensor], *args: Tensor) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                f(*args)

        return call

    def backward(f: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Any]:
        wanted = [t for t in leaves if t.requires_grad]
        return lambda: torch.autograd.grad(f(*leaves), wanted, dy)

    calls = {n: (f, gate, up) for n, f in plains.items()} | {n: (f, gate, up, *knobs) for n, f in units.items()}
    leaves = {n: (f, *inputs) for n, f in plains.items()} | {n: (f, *inputs, *learned) for n, f in units.items()}
    calls["ours, packed"] = (packed, both, up, *knobs)
    leaves["ours, packed"] = (packed, both.requires_grad_(), up, *learned)
    saved = measure.saved_bytes(lambda: ours(*inputs, *learned))
    return {
        "op": "ctu_and_mul",
        "case": name,
        "shape": list(shape),
        "dtype": dtype_name,
        "parameters": "per channel",
        "forward_ms": measure.interleaved({n: forward(*c) for n, c in calls.items()}, seconds),
        "forward_backward_ms": measure.interleaved({n: backward(*c) for n, c in leaves.items()}, seconds * 2),
        "saved_bytes_beyond_gate_and_up": saved - gate.nbytes - up.nbytes - sum(t.nbytes for t in knobs),
    }


def _gate(gate: Tensor, up: Tensor, knobs: list[Tensor]) -> None:
    """Check the result against the float64 reference, so that no time is reported for a wrong one."""
    expected = two_passes(gate.double(), up.double(), *(t.double() for t in knobs))
    error = (ours(gate, up, *knobs).double() - expected).abs()
    share = torch.finfo(gate.dtype).eps + (1e-5 if gate.dtype == torch.float32 else 2e-4)
    if not (error <= share * (expected.abs() + (gate.double() * up.double()).abs() + up.double().abs())).all():
        raise AssertionError("ctu_and_mul disagrees with float64; no timings are reported for a wrong kernel")


def call_overhead() -> dict[str, float]:
    """Microseconds per call on 16 elements."""
    gate, up, dy = (torch.randn(16) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    with torch.no_grad():
        found = measure.overhead({"ctu_and_mul forward": lambda: ctu_and_mul(gate, up, 0.5, 1.0)})
    call = {"ctu_and_mul forward+backward": lambda: torch.autograd.grad(ctu_and_mul(*leaves, 0.5, 1.0), leaves, dy)}
    return found | measure.overhead(call)


def bars(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios on the tuned shapes that have bounds, with these."""
    rows = []
    for r in records:
        if r["case"] not in CASES:
            continue
        f, b, what = r["forward_ms"], r["forward_backward_ms"], r["case"]
        for name, value, bound in (
            (f"{what}: forward / silu(g) * u", f["ours"] / f["silu(g) * u"], 0.8),
            (
                f"{what}: forward+backward with per-channel gradients / silu(g) * u without",
                b["ours"] / b["silu(g) * u"],
                1.15,
            ),
            (f"{what}: bytes saved beyond gate, up and the knobs", r["saved_bytes_beyond_gate_and_up"], 0),
        ):
            rows.append(measure.bar(r["dtype"], name, value, "<=", bound))
    return rows
