"""The head edit against a broadcast multiplication, the published loop over heads, and the compiled reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ctkernels

from . import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD_DIM = 32, 128
CASES = [("8 x 512 tokens", (8, 512)), ("1 x 512 tokens", (1, 512)), ("decode, 8 x 1 token", (8, 1))]
TUNED = CASES[0][0]


def reference(z: Tensor, m: Tensor, a: Tensor, g_m: Tensor, g_a: Tensor) -> Tensor:
    """The edit in one line of torch, all heads at once."""
    heads = z.unflatten(-1, (HEADS, HEAD_DIM))
    return ((1 + g_m[:, None] * m) * heads + g_a[:, None] * a).flatten(-2).to(z.dtype)


def official(z: Tensor, m: Tensor, a: Tensor, g_m: Tensor, g_a: Tensor) -> Tensor:
    """The loop over heads of the JoLA authors' modelling code: slice, clone, edit, and write back."""
    z = z.clone()
    for h in range(HEADS):
        part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        head = z[..., part].clone()
        z[..., part] = ((1 + g_m[h] * m[h]) * head + g_a[h] * a[h]).to(z.dtype)
    return z


def run(dtypes: list[str], quick: bool, seconds: float, tuned: bool = False) -> list[dict[str, Any]]:
    """Return a record per case and dtype. Raises if a result differs from the float64 reference."""
    return [
        _one(name, lead, d, seconds, compiled=not quick)
        for name, lead in (CASES[1:2] if quick else CASES[: 1 if tuned else None])
        for d in dtypes
    ]


def _one(name: str, lead: tuple[int, int], dtype_name: str, seconds: float, compiled: bool) -> dict[str, Any]:
    dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)

    def data(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    z, dy = (data(*lead, HEADS * HEAD_DIM).to(dtype) for _ in range(2))
    parameters = [data(HEADS, HEAD_DIM), data(HEADS, HEAD_DIM), data(HEADS).sigmoid(), data(HEADS).sigmoid()]
    row = data(HEADS * HEAD_DIM).to(dtype)
    leaf = z.clone().requires_grad_()
    leaves = [p.clone().requires_grad_() for p in parameters]
    wanted = [leaf, *leaves]
    out = torch.empty_like(z)

    _gate(z, parameters)
    edits: dict[str, Callable[..., Tensor]] = {"ours": ctkernels.functional.head_edit, "official": official}
    if compiled:
        torch._dynamo.reset()
        edits["reference compiled"] = torch.compile(reference, dynamic=False)

    mul, forward = measure.without_grad(torch.mul, z, row), {}
    both = {"mul": measure.with_gradients(torch.mul, [leaf, row], [leaf], dy)}
    for edit, f in edits.items():
        forward[edit] = measure.without_grad(f, z, *parameters)
        both[edit] = measure.with_gradients(f, wanted, wanted, dy)
    forward_ms = measure.interleaved({"copy": lambda: out.copy_(z), "mul": mul, **forward}, seconds)
    both_ms = measure.interleaved(both, seconds * 2)
    saved = measure.saved_bytes(lambda: ctkernels.functional.head_edit(leaf, *leaves))
    return {
        "op": "head_edit",
        "case": name,
        "shape": [*lead, HEADS * HEAD_DIM],
        "dtype": dtype_name,
        "parameters": "m, a, gates",
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "saved_bytes_beyond_z": saved - z.nbytes - sum(p.nbytes for p in leaves),
    }


def _gate(z: Tensor, parameters: list[Tensor]) -> None:
    """Check the result against the float64 reference, so that no time is reported for a wrong one."""
    expected = reference(z.double(), *(p.double() for p in parameters))
    error = (ctkernels.functional.head_edit(z, *parameters).double() - expected).abs()
    if not (error <= torch.finfo(z.dtype).eps * (expected.abs() + 4 * z.double().abs() + 4)).all():
        raise AssertionError(
            "head_edit disagrees with the float64 reference; no timings are reported for a wrong kernel"
        )


def call_overhead() -> dict[str, float]:
    """Microseconds per call of the edit of one head of 16 values, and of a layer's gates, two for each of 32 heads."""
    z, dy = torch.randn(1, 16), torch.randn(1, 16)
    leaf = z.clone().requires_grad_()
    m, a = torch.randn(1, 16, requires_grad=True), torch.randn(1, 16, requires_grad=True)
    edit = ctkernels.functional.head_edit

    logits, up = torch.zeros(2 * HEADS, requires_grad=True), torch.randn(2 * HEADS)

    def gates() -> Any:
        return torch.autograd.grad(ctkernels.functional.hard_concrete(logits, training=True), logits, up)

    with torch.no_grad():
        times = measure.overhead({"head_edit forward": lambda: edit(z, m, a)})
    both = {
        "head_edit forward+backward": lambda: torch.autograd.grad(edit(leaf, m, a), (leaf, m, a), dy),
        "gates forward+backward": gates,
        "gates forward+backward, composed": measure.composed(gates),
    }
    return times | measure.overhead(both)


def bars(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios on the tuned shape that have bounds, with these."""
    rows = []
    for r in records:
        if r["case"] != TUNED:
            continue
        f, b, bf16 = r["forward_ms"], r["forward_backward_ms"], r["dtype"] == "bf16"
        ratios = [
            ("forward / copy_", f["ours"] / f["copy"], "<=", 1.6 if bf16 else 1.3),
            ("forward+backward, all gradients / mul, input gradient", b["ours"] / b["mul"], "<=", 1.5),
            ("forward+backward: official loop / ours", b["official"] / b["ours"], ">=", 20),
            ("bytes saved beyond z and the parameters", r["saved_bytes_beyond_z"], "<=", 0),
        ]
        if "reference compiled" in b:
            ratios.insert(3, ("forward+backward: compiled reference / ours", b["reference compiled"] / b["ours"], ">=",
                             2 if bf16 else 1.5))  # fmt: skip
        rows += [measure.bar(r["dtype"], *row) for row in ratios]
    return rows
