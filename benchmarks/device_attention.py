"""Attention with the edit on a GPU: fused, separate, and without the edit, with the cost model's predictions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctkernels.functional import attention_head_edit
from ctkernels.ops.attention import cost_model
from ctkernels.ops.attention.problem import KEEP_LSE, KEEP_Z, Problem
from ctkernels.ops.attention.providers import PROVIDERS, Call
from ctkernels.ops.attention.reference import UNBOUNDED
from ctkernels.ops.attention.triton import launch as triton_launch

from .device import DTYPES, interleaved_graphs
from .report import table

FUSED, SEPARATE = "fused", "separate"
EDITED, PLAIN = "kernels with the edit", "the same without"
CALLS = 4  # on the same tensors, which except for the smallest case are larger than the L2 cache
TORCH = {"torch": None, "torch, flash": SDPBackend.FLASH_ATTENTION, "torch, cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Case:
    """Sizes and options of a call, causal by default."""

    name: str
    batch: int
    heads: int
    groups: int
    tokens: int
    keys: int
    head_dim: int
    options: dict[str, Any] = field(default_factory=dict)
    padded: bool = False

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k and v in the layout of projections, in which the heads of a token are adjacent."""
        generator = torch.Generator("cuda").manual_seed(0)
        shapes = ((self.tokens, self.heads), (self.keys, self.groups), (self.keys, self.groups))
        return [
            torch.randn(self.batch, t, h, self.head_dim, generator=generator, device="cuda").to(dtype).transpose(1, 2)
            for t, h in shapes
        ]

    def mask(self) -> Tensor | None:
        """The mask of left-padded sequences, of which the first has no padding; None without padding."""
        if not self.padded:
            return None
        first = torch.arange(self.batch, device="cuda") * (self.keys // (2 * self.batch))
        return (torch.arange(self.keys, device="cuda") >= first[:, None])[:, None, None, :]


CASES = [
    Case("8 x 1024, 16 heads of 64", 8, 16, 16, 1024, 1024, 64),
    Case("4 x 2048, 32 heads of 128, 8 of keys", 4, 32, 8, 2048, 2048, 128),
    Case("1 x 8192, 32 heads of 128", 1, 32, 32, 8192, 8192, 128),
    Case("4 x 2048, 16 heads of 128, all keys", 4, 16, 16, 2048, 2048, 128, {"is_causal": False}),
    Case("1 x 8192, 32 heads of 128, window 1024", 1, 32, 32, 8192, 8192, 128, {"window": 1024}),
    Case("8 x 1024, 16 heads of 128, padded", 8, 16, 16, 1024, 1024, 128, padded=True),
    Case("decoding, 16 x 4096 keys, 32 heads of 128, 8 of keys", 16, 32, 8, 1, 4096, 128),
]
QUICK = CASES[:1]


def run(dtypes: list[str], quick: bool, seconds: float, only: str = "") -> list[dict[str, Any]]:
    """Return a record per dtype and case with ``only`` in its name."""
    records = []
    for case in (c for c in (QUICK if quick else CASES) if only in c.name):
        for dtype in dtypes:
            records.append(_one(case, dtype, seconds))
            print(f"{case.name}, {dtype} done", file=sys.stderr)
    return records


def _one(case: Case, dtype: str, seconds: float) -> dict[str, Any]:
    q, k, v = case.tensors(DTYPES[dtype])
    shapes = ((case.heads, case.head_dim),) * 2 + ((case.heads,),) * 2
    edits = [torch.randn(s, device="cuda").requires_grad_() for s in shapes]
    options = {"is_causal": True, "enable_gqa": case.heads != case.groups, "attn_mask": case.mask()} | case.options
    plain = {key: value for key, value in options.items() if key != "window"}

    def edited(implementation: str) -> Callable[..., Tensor]:
        return lambda *t: attention_head_edit(*t, *edits, implementation=implementation, **options)

    def torchs(kernel: SDPBackend | None) -> Callable[..., Tensor]:
        def call(*t: Tensor) -> Tensor:
            if kernel is None:
                return F.scaled_dot_product_attention(*t, **plain)
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(*t, **plain)

        return call

    left = options["window"] - 1 if "window" in options else UNBOUNDED
    right = 0 if options["is_causal"] else UNBOUNDED
    call = Call(q, k, v, options["attn_mask"], left, right, False)
    others = [name for name, provider in PROVIDERS.items() if provider.refusal(call) is None]
    ours = [FUSED, SEPARATE, *others]
    functions = {name: edited(name) for name in ours}
    half = q.dtype != torch.float32  # torch's kernels need 16 bits
    if half and "window" not in options and options["attn_mask"] is None and case.tokens > 1:
        functions |= {name: torchs(kernel) for name, kernel in TORCH.items()}
    leaves, dy = [t.detach().requires_grad_() for t in (q, k, v)], torch.randn_like(q)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2)

    def forward(f: Callable[..., Tensor]) -> Callable[[int], None]:
        def call(_: int) -> None:
            with torch.no_grad():
                f(q, k, v)

        return call

    def both(name: str, f: Callable[..., Tensor]) -> Callable[[int], Any]:
        wanted = [*leaves, *(edits if name in ours else [])]
        return lambda _: torch.autograd.grad(f(*leaves), wanted, dy)

    times = {"forward_ms": interleaved_graphs({n: forward(f) for n, f in functions.items()}, CALLS, seconds)}
    if case.tokens > 1:
        times["forward_backward_ms"] = interleaved_graphs(
            {n: both(n, f) for n, f in functions.items()}, CALLS, 2 * seconds
        )
    seen: Any = (options["attn_mask"], None, None, 0, 0, case.head_dim**-0.5, left, right)
    times |= _price(Problem(q, k, v, *edits, *seen), dy, seconds)
    predicted = {
        key: {
            e.implementation: e.seconds * 1e3
            for e in cost_model.estimates(q, k, v, options["attn_mask"], left, right, t)
        }
        for key, t in (("forward_ms", False), ("forward_backward_ms", True))
    }
    chosen = cost_model.estimates(q, k, v, options["attn_mask"], left, right, False)
    pairs = case.tokens * case.keys * (0.5 if options["is_causal"] and case.tokens > 1 else 1.0)
    if "window" in options:
        pairs = case.tokens * options["window"]
    return {
        "op": "attention_head_edit",
        "case": case.name,
        "problem": {k: v for k, v in asdict(case).items() if k != "name"},
        "dtype": dtype,
        **times,
        "predicted": predicted,
        "absent": {name: provider.refusal(call) for name, provider in PROVIDERS.items() if name not in others},
        "torch_kernel": next(e.attention for e in chosen if e.implementation == SEPARATE),
        "forward_tflops": 4e-9 * case.batch * case.heads * pairs * case.head_dim / times["forward_ms"][FUSED],
    }


def _price(edited: Problem, dy: Tensor, seconds: float) -> dict[str, dict[str, float]]:
    """Times of the kernels alone with and without the edit, where backward needs the output itself: inference, and forward
    and backward in training."""
    plain = edited._replace(m=None, a=None, g_m=None, g_a=None)
    if edited.mask is not None:
        shape = (*edited.q.shape[:3], edited.k.shape[2])
        edited, plain = (p._replace(mask=p.mask.expand(shape)) for p in (edited, plain))
    launch = triton_launch
    with torch.no_grad():
        times = {
            "kernels_inference_ms": {
                EDITED: lambda _: launch.forward(edited, 0),
                PLAIN: lambda _: launch.forward(plain, 0),
            }
        }
        if edited.q.shape[2] > 1:
            _, z, lse = launch.forward(edited, KEEP_Z | KEEP_LSE)
            times["kernels_forward_ms"] = {
                EDITED: lambda _: launch.forward(edited, KEEP_Z | KEEP_LSE),
                PLAIN: lambda _: launch.forward(plain, KEEP_LSE),
            }
            times["kernels_backward_ms"] = {
                EDITED: lambda _: launch.backward(dy, z, lse, edited, 0b1111111),
                PLAIN: lambda _: launch.backward(dy, z, lse, plain, 0b111),
            }
        return {key: interleaved_graphs(runs, CALLS, seconds) for key, runs in times.items()}


def text(records: list[dict[str, Any]]) -> str:
    """Measured and predicted times, forward and forward + backward."""
    blocks = []
    for key in ("forward_ms", "forward_backward_ms"):
        rows = []
        for r in (r for r in records if key in r):
            ms, predicted = r[key], r["predicted"][key]
            cells = [f"{ms[n]:.3f}" if n in ms else "" for n in (FUSED, SEPARATE, *PROVIDERS, *TORCH)]
            forecast = [f"{predicted[n]:.3f}" for n in (FUSED, SEPARATE)]
            rows.append([r["case"], r["dtype"], *cells, *forecast, r["torch_kernel"]])
        head = [
            "case",
            "dtype",
            FUSED,
            SEPARATE,
            *PROVIDERS,
            *TORCH,
            "fused, predicted",
            "separate, predicted",
            "torch's kernel",
        ]
        title = f"attention_head_edit, {key.removesuffix('_ms').replace('_', ' + ')}, ms on the device"
        blocks.append(f"{title}\n{table(head, rows)}")
    rows = []
    for r in records:
        prices = [r[key] for key in ("kernels_inference_ms", "kernels_forward_ms", "kernels_backward_ms") if key in r]
        cells = [f"{ms[EDITED] / ms[PLAIN]:.3f}" for ms in prices]
        rows.append([r["case"], r["dtype"], *cells, *[""] * (3 - len(cells)), f"{r['forward_tflops']:.0f}"])
    head = ["case", "dtype", "inference", "training, forward", "backward", "TFLOP/s, forward"]
    blocks.append(f"fused kernels, time with the edit / without it\n{table(head, rows)}")
    return "\n\n".join(blocks)
