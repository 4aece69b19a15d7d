"""The CT unit against plain activations and the official expression, eager and compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ctkernels

from . import measure


@dataclass(frozen=True)
class Case:
    """A case: the origin of the shape, its memory format and its channel dimension."""

    name: str
    shape: tuple[int, ...]
    channel_dim: int = 1
    channels_last: bool = False

    def sample(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


CASES = [
    Case("ResNet-50 stage 1", (32, 256, 56, 56)),
    Case("ResNet-50 stage 1, NHWC", (32, 256, 56, 56), channels_last=True),
    Case("ResNet-50 stage 3", (32, 1024, 14, 14)),
    Case("ResNet-50 stage 4", (32, 2048, 7, 7)),
    Case("ResNet-50, one image", (1, 256, 56, 56)),
    Case("VGG-11 first", (8, 64, 224, 224)),
    Case("ViT-B MLP (NLC)", (32, 197, 3072), channel_dim=2),
    Case("decode MLP, one token", (1, 1, 3072), channel_dim=2),
]
QUICK = [Case("ResNet-50 stage 1, batch 4", (4, 256, 56, 56))]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def official(x: Tensor, raw_beta: Tensor, raw_coeff: Tensor) -> Tensor:
    """The published expression of the Curvature Tuning authors' module."""
    beta, coeff = torch.sigmoid(raw_beta), torch.sigmoid(raw_coeff)
    rest = 1 - beta + 1e-6
    return coeff * torch.sigmoid(beta * x / rest) * x + (1 - coeff) * F.softplus(x / rest, threshold=20) * rest


def run(dtypes: list[str], quick: bool, seconds: float, tuned: bool = False) -> list[dict[str, Any]]:
    """Return a record per case, dtype and kind of parameters. Raises if a result differs from the float64 reference."""
    records = []
    for case in QUICK if quick else [c for c in CASES if not tuned or c.name == TUNED]:
        for dtype in dtypes:
            for per_channel in (True,) if quick or tuned else (False, True):
                records.append(_one(case, dtype, per_channel, seconds, compiled=not quick))
    return records


def _one(case: Case, dtype_name: str, per_channel: bool, seconds: float, compiled: bool) -> dict[str, Any]:
    dtype = DTYPES[dtype_name]
    x, dy = case.sample(dtype), case.sample(dtype, seed=1)
    channels = case.shape[case.channel_dim]
    view = [1] * len(case.shape)
    if per_channel:
        view[case.channel_dim] = channels
        generator = torch.Generator().manual_seed(2)
        raw = [torch.randn(channels, generator=generator).requires_grad_() for _ in range(2)]
    else:
        raw = [torch.tensor([1.4]).requires_grad_(), torch.tensor([0.0]).requires_grad_()]
    channel_dim = case.channel_dim if per_channel else None
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = torch.empty_like(x)

    def ours(t: Tensor) -> Tensor:
        return ctkernels.functional.ctu(t, raw[0], raw[1], channel_dim=channel_dim, raw=True)

    def theirs(t: Tensor) -> Tensor:
        # the module keeps its parameters in the network's dtype and shape
        return official(t, raw[0].to(t.dtype).view(view), raw[1].to(t.dtype).view(view))

    contestants = {"ours": ours, "official": theirs, "relu": torch.relu, "silu": F.silu}
    if compiled:
        torch._dynamo.reset()
        contestants["official compiled"] = torch.compile(theirs, dynamic=False)
    _gate(ours(leaf), leaf, raw, view)

    forward = {name: measure.without_grad(f, x) for name, f in contestants.items()}
    both = {
        name: measure.with_gradients(f, [leaf], [leaf] if name in ("relu", "silu") else [leaf, *raw], dy)
        for name, f in contestants.items()
    }
    forward_ms = measure.interleaved({"copy": lambda: out.copy_(x), **forward}, seconds)
    both_ms = measure.interleaved(both, seconds * 2)
    return {
        "op": "ctu",
        "case": case.name,
        "shape": list(case.shape),
        "memory_format": "channels_last" if case.channels_last else "contiguous",
        "dtype": dtype_name,
        "parameters": "per channel" if per_channel else "shared",
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "forward_gb_s": 2 * x.nbytes / forward_ms["ours"] / 1e6,
        "saved_bytes_over_x": {n: measure.saved_bytes(lambda f=f: f(leaf)) / x.nbytes for n, f in contestants.items()
                               if n != "official compiled"},
    }  # fmt: skip


def _gate(y: Tensor, x: Tensor, raw: list[Tensor], view: list[int]) -> None:
    """Check the result against the float64 reference, so that no time is reported for a wrong one."""
    with torch.no_grad():
        beta, coeff = (torch.sigmoid(r.double()).view(view) for r in raw)
        rest = torch.sigmoid(-raw[0].double()).view(view)
        w = x.double()
        silu, soft = (
            coeff * w * torch.sigmoid(beta * w / rest),
            (1 - coeff) * rest * torch.logaddexp(w / rest, w.new_zeros(())),
        )
        grade = 1e-5 if y.dtype == torch.float32 else 2e-4  # 16-bit results: a fraction of half an ulp
        bound = grade * (silu.abs() + soft) + torch.finfo(y.dtype).eps * (silu + soft).abs() + 2.0**-120
        if not ((y.double() - (silu + soft)).abs() <= bound).all():
            raise AssertionError("ctu disagrees with the float64 reference; no timings are reported for a wrong kernel")


def call_overhead() -> dict[str, float]:
    """Microseconds per call on 16 elements."""
    x, dy = torch.randn(16), torch.randn(16)
    leaf = x.clone().requires_grad_()
    ctu = ctkernels.functional.ctu

    with torch.no_grad():
        forward = {"silu forward": lambda: F.silu(x), "ctu forward": lambda: ctu(x, 0.9)}
        times = measure.overhead(forward)
    both = {
        "silu forward+backward": lambda: torch.autograd.grad(F.silu(leaf), leaf, dy),
        "ctu forward+backward": lambda: torch.autograd.grad(ctu(leaf, 0.9), leaf, dy),
    }
    return times | measure.overhead(both)


# The bars of the shape that the kernels are tuned on, as (what, how it is computed, bound per dtype).
TUNED = "ResNet-50 stage 1"


def bars(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios on the tuned shape that have bounds, with these."""
    rows = []
    for r in records:
        if r["case"] != TUNED or r["parameters"] != "per channel":
            continue
        f, b, bf16 = r["forward_ms"], r["forward_backward_ms"], r["dtype"] == "bf16"
        ratios = [
            ("forward / copy_", f["ours"] / f["copy"], "<=", 3.2 if bf16 else 1.6),
            ("forward+backward / ReLU forward+backward", b["ours"] / b["relu"], "<=", 2.0 if bf16 else 1.7),
            ("forward+backward: official eager / ours", b["official"] / b["ours"], ">=", 11 if bf16 else 9),
            ("bytes saved / bytes of x", r["saved_bytes_over_x"]["ours"], "<=", 1.001),
        ]
        if "official compiled" in b:
            ratios.insert(2, ("forward+backward: official compiled / ours", b["official compiled"] / b["ours"], ">=",
                             4 if bf16 else 3.5))  # fmt: skip
        rows += [measure.bar(r["dtype"], *row) for row in ratios]
    return rows
