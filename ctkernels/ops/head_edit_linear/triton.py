"""Triton kernels: the pass over the weights, and the parameters' gradients from column sums. Imported on the first CUDA call."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launcher
from .reference import LARGEST, SMALLEST, Edits

_SMALLEST, _LARGEST = tl.constexpr(SMALLEST), tl.constexpr(LARGEST)
ROWS, COLUMNS = 4, 1024  # of weights per step of a program, which takes all columns of its rows
CORRECTED = 16  # rows of dz per step, where a head's columns have to be corrected
# For sums of products across lanes: a product fused into the first addition would leave lanes with different roundings.
_META = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _bounded(p):
    """:func:`.reference.bounded`."""
    size = tl.minimum(tl.maximum(tl.abs(p), _SMALLEST), _LARGEST)
    return tl.where(p < 0, -size, size)


@triton.jit
def _scale(m, g_m, h, at, inside):
    """p = 1 + g_m m of channels ``at`` in heads ``h``; 1 outside."""
    value = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
    if g_m is not None:
        value = value * tl.load(g_m + h, mask=inside, other=0.0).to(tl.float32)
    return 1.0 + value


@triton.jit
def fold_kernel(
    weight, bias, m, a, g_m, g_a, folded, offset, outputs, weight_row, width: tl.constexpr,
    D: tl.constexpr, BOUND: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M rows of W diag(p), and of W q + b."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < outputs
    start = row.to(tl.int64)
    sums = tl.zeros([M, N], tl.float32)
    for first in tl.range(0, width, N):
        c = first + tl.arange(0, N)
        inside = c < width
        both = live[:, None] & inside[None, :]
        w = tl.load(weight + start[:, None] * weight_row + c[None, :], mask=both, other=0.0).to(tl.float32)
        if folded is not None:
            p = _scale(m, g_m, c // D, c, inside)
            if BOUND:
                p = _bounded(p)
            tl.store(
                folded + start[:, None] * width + c[None, :], (w * p[None, :]).to(folded.dtype.element_ty), mask=both
            )
        if offset is not None:
            q = tl.load(a + c, mask=inside, other=0.0).to(tl.float32)
            if g_a is not None:
                q = q * tl.load(g_a + c // D, mask=inside, other=0.0).to(tl.float32)
            sums += w * q[None, :]
    if offset is not None:
        total = tl.sum(sums, 1)
        if bias is not None:
            total += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)
        tl.store(offset + row, total.to(offset.dtype.element_ty), mask=live)


@triton.jit
def finish_kernel(
    dz, s1, s0, m, a, g_m, g_a, dm, da, dg_m, dg_a, rows, dz_row,
    D: tl.constexpr, BD: tl.constexpr, BOUND: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Gradients of a head's parameters from its column sums. BOUND: the weights were scaled by the bounded p, and dz is corrected
    where that is not p."""
    h, d = tl.program_id(0), tl.arange(0, BD)
    inside = d < D
    at = h * D + d
    by = tl.full([BD], 1.0, tl.float32)
    if BOUND:
        p = _scale(m, g_m, at // D, at, inside)
        by = _bounded(p)
        if tl.max(tl.where(p == by, 0, 1), 0) > 0:
            for first in tl.range(0, rows, M):
                row = first + tl.arange(0, M)
                values = dz + row.to(tl.int64)[:, None] * dz_row + at[None, :]
                both = (row < rows)[:, None] & inside[None, :]
                corrected = tl.load(values, mask=both, other=0.0).to(tl.float32) * (p / by)[None, :]
                tl.store(values, corrected.to(dz.dtype.element_ty), mask=both)
    _gradients(s1, m, g_m, dm, dg_m, by, h, at, inside)
    _gradients(s0, a, g_a, da, dg_a, by, h, at, inside)


@triton.jit
def _gradients(sums, vector, gate, d_vector, d_gate, by, h, at, inside):
    """Gradients of a vector and its gate from a head's sums, divided by ``by``."""
    if sums is not None:
        s = tl.load(sums + at, mask=inside, other=0.0).to(tl.float32) / by
        if d_vector is not None:
            value = s
            if gate is not None:
                value = s * tl.load(gate + h).to(tl.float32)
            tl.store(d_vector + at, value.to(d_vector.dtype.element_ty), mask=inside)
        if d_gate is not None:
            product = s * tl.load(vector + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_gate + h, tl.sum(product, 0).to(d_gate.dtype.element_ty))


def fold(weight: Tensor, bias: Tensor | None, edits: Edits, bound: bool) -> tuple[Tensor, Tensor | None]:
    """As :meth:`.op.TorchKernels.fold`."""
    m, a, g_m, g_a = (t if t is None else t.contiguous() for t in edits)
    outputs, width = weight.shape
    folded = None if m is None else torch.empty_like(weight, memory_format=torch.contiguous_format)
    offset = None if a is None else weight.new_empty(outputs)
    args: dict[str, Any] = {"weight": weight, "bias": bias, "m": m, "a": a, "g_m": g_m, "g_a": g_a}
    args |= {"folded": folded, "offset": offset, "outputs": outputs, "weight_row": weight.stride(0)}
    head_dim = (m if a is None else a).shape[1]  # type: ignore[union-attr]
    meta = {"width": width, "D": head_dim, "BOUND": bound, "M": ROWS, "N": COLUMNS, **_META}
    with launcher.guard(weight):
        launcher.launch(fold_kernel, triton.cdiv(outputs, ROWS), args, meta)
    return weight if folded is None else folded, bias if offset is None else offset


def finish(dz: Tensor, s1: Tensor | None, s0: Tensor | None, edits: Edits, bound: bool) -> list[Tensor | None]:
    """As :meth:`.op.TorchKernels.finish`."""
    m, a, g_m, g_a = (t if t is None else t.contiguous() for t in edits)
    present = (s1, s0, s1, s0)
    grads = [None if t is None or s is None else torch.empty_like(t) for t, s in zip((m, a, g_m, g_a), present)]
    heads, head_dim = (m if a is None else a).shape  # type: ignore[union-attr]
    rows = dz.reshape(-1, dz.shape[-1])
    args: dict[str, Any] = {"dz": rows if bound else None, "s1": s1, "s0": s0, "m": m, "a": a, "g_m": g_m, "g_a": g_a}
    args |= dict(zip(("dm", "da", "dg_m", "dg_a"), grads)) | {"rows": rows.shape[0], "dz_row": rows.stride(0)}
    meta = {"D": head_dim, "BD": triton.next_power_of_2(head_dim), "BOUND": bound, "M": CORRECTED, **_META}
    with launcher.guard(dz):
        launcher.launch(finish_kernel, heads, args, meta)
    return grads
