"""Triton kernels of the forward pass: FlashAttention-2, with the head edit in the epilogue.

A program owns M queries of one head and walks over the keys they see, N at a time: first and last blocks, where some
pairs are hidden, compare positions; those between do not. Scores are in units of log 2; ``peak`` is the largest so far of
a query, ``total`` the sum of 2 to the power of (score - peak), ``acc`` the sum of those times values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_tile(p, rows, cols, row_stride, limit, ROWS: tl.constexpr, COLS: tl.constexpr, PADDED: tl.constexpr):
    """p[rows, cols], zero where a row is not below ``limit`` (ROWS) or a column is padding (COLS < PADDED)."""
    at = p + rows[:, None] * row_stride + cols[None, :]
    if ROWS and COLS < PADDED:
        return tl.load(at, mask=(rows[:, None] < limit) & (cols[None, :] < COLS), other=0.0)
    elif ROWS:
        return tl.load(at, mask=rows[:, None] < limit, other=0.0)
    elif COLS < PADDED:
        return tl.load(at, mask=cols[None, :] < COLS, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def hide(s, rows, cols, shift, keys, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Scores, -inf where the query at position row + shift does not see the key. ``rows`` and ``cols`` broadcast against s."""
    seen = cols < keys
    if RIGHT:
        seen = seen & (cols <= rows + (shift + right))
    if LEFT:
        seen = seen & (cols >= rows + (shift - left))
    return tl.where(seen, s, -INFINITY)


@triton.jit
def apply_mask(s, mask, rows, cols, row_stride, col_stride, tokens, keys, KIND: tl.constexpr):
    """Scores, in units of log 2, with a user's mask: booleans as bytes (KIND & 1), or addends; one for all queries, or one
    for each (KIND & 2). ``rows`` and ``cols`` as for :func:`hide`."""
    at, inside = mask + cols.to(tl.int64) * col_stride, cols < keys
    if KIND & 2:
        at, inside = at + rows.to(tl.int64) * row_stride, inside & (rows < tokens)
    if KIND & 1:
        return tl.where(tl.load(at, mask=inside, other=0) != 0, s, -INFINITY)
    else:
        return s + tl.load(at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def walk(
    acc, total, peak, q, k, v, mask, rows, begin, end, shift, tokens, keys, left, right, factor,
    k_stride, v_stride, mask_row, mask_col,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Keys ``begin`` to ``end``. EDGE: some may be hidden."""
    n, d, e = tl.arange(0, N), tl.arange(0, BD), tl.arange(0, BE)
    for start in tl.range(begin, end, N):
        cols = start + n
        ks = load_tile(k + start.to(tl.int64) * k_stride, n, d, k_stride, keys - start, EDGE, D, BD)
        s = tl.dot(q, tl.trans(ks), input_precision=PRECISION) * factor
        if mask is not None:
            s = apply_mask(s, mask, rows[:, None], cols[None, :], mask_row, mask_col, tokens, keys, KIND)
        if EDGE:
            s = hide(s, rows[:, None], cols[None, :], shift, keys, left, right, LEFT, RIGHT)
        top = tl.maximum(peak, tl.max(s, 1))
        base = top
        if EDGE:  # a query that has seen nothing yet
            base = tl.where(top == -INFINITY, 0.0, top)
        p = tl.exp2(s - base[:, None])
        keep = tl.exp2(peak - base)
        total = total * keep + tl.sum(p, 1)
        vs = load_tile(v + start.to(tl.int64) * v_stride, n, e, v_stride, keys - start, EDGE, E, BE)
        acc = tl.dot(p.to(vs.dtype), vs, acc * keep[:, None], input_precision=PRECISION)
        peak = top
    return acc, total, peak


@triton.jit
def walk_range(
    acc, total, peak, q, k, v, mask, rows, first, last, begin, end, shift, tokens, keys, left, right, factor,
    k_stride, v_stride, mask_row, mask_col,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The keys from ``begin``, a multiple of N, to ``end`` that queries ``first`` to ``last`` see."""
    low, high = begin, tl.minimum(end, keys)
    if RIGHT:
        high = tl.minimum(high, tl.maximum(last + shift + right + 1, 0))
    if LEFT:
        low = tl.maximum(low, tl.maximum(first + shift - left, 0) // N * N)
    if mask is not None:  # there is no telling which keys are seen
        return walk(
            acc, total, peak, q, k, v, mask, rows, low, high, shift, tokens, keys, left, right, factor,
            k_stride, v_stride, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
        )  # fmt: skip
    whole_high = high  # the keys from whole_low to whole_high are seen by all these queries
    if RIGHT:
        whole_high = tl.minimum(whole_high, tl.maximum(first + shift + right + 1, 0))
    whole_low = low
    if LEFT:
        whole_low = tl.maximum(low, (tl.maximum(last + shift - left, 0) + N - 1) // N * N)
        whole_low = tl.maximum(low, tl.minimum(whole_low, (high + N - 1) // N * N))
    whole_high = tl.maximum(whole_high // N * N, whole_low)
    if LEFT:
        acc, total, peak = walk(
            acc, total, peak, q, k, v, mask, rows, low, whole_low, shift, tokens, keys, left, right, factor,
            k_stride, v_stride, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
        )  # fmt: skip
    acc, total, peak = walk(
        acc, total, peak, q, k, v, mask, rows, whole_low, whole_high, shift, tokens, keys, left, right, factor,
        k_stride, v_stride, mask_row, mask_col, False, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
    )  # fmt: skip
    return walk(
        acc, total, peak, q, k, v, mask, rows, whole_high, high, shift, tokens, keys, left, right, factor,
        k_stride, v_stride, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
    )  # fmt: skip


@triton.jit
def row_of(p, h, e, E: tl.constexpr, ONCE: tl.constexpr):
    """p[h]. A load of fewer values than a program has threads, and all that is computed from it, the compiler repeats in
    every thread for each of its elements; with ONCE, more are loaded."""
    if ONCE:
        i = tl.arange(0, 256)
        row = tl.load(p + h * E + i, mask=i < E, other=0.0)
        return tl.sum(tl.reshape(row, [256 // e.shape[0], e.shape[0]]), 0).to(tl.float32)
    else:
        return tl.load(p + h * E + e, mask=e < E, other=0.0).to(tl.float32)


@triton.jit
def edit_scale(m, g_m, h, e, E: tl.constexpr, ONCE: tl.constexpr):
    """1 + g_m m of a head; 1 where nothing is scaled."""
    if m is None:
        return e * 0.0 + 1.0
    else:
        value = row_of(m, h, e, E, ONCE)
        if g_m is not None:
            value = value * tl.load(g_m + h).to(tl.float32)
        return 1.0 + value


@triton.jit
def edit_offset(a, g_a, h, e, E: tl.constexpr, ONCE: tl.constexpr):
    """g_a a of a head."""
    value = row_of(a, h, e, E, ONCE)
    if g_a is not None:
        value = value * tl.load(g_a + h).to(tl.float32)
    return value


@triton.jit
def write_outputs(
    acc, total, peak, y, z, lse, m, a, g_m, g_a, h, i, inside, at, e, E: tl.constexpr
):  # fmt: skip
    """The epilogue: from sums to outputs, the edit on the way. Rows go to index ``i`` of lse, offset ``at`` of y and z."""
    blind = total == 0.0
    out = acc * (1.0 / tl.where(blind, 1.0, total))[:, None]
    live = inside[:, None] & (e < E)[None, :]
    if lse is not None:
        tl.store(lse + i, tl.where(blind, INFINITY, peak + tl.log2(total)), mask=inside)
    if z is not None:
        tl.store(z + at[:, None] + e[None, :], out.to(z.dtype.element_ty), mask=live)
    if m is not None:
        out = out * edit_scale(m, g_m, h, e, E, cuda_capability_geq(10))[None, :]
    if a is not None:
        out = out + edit_offset(a, g_a, h, e, E, cuda_capability_geq(10))[None, :]
    tl.store(y + at[:, None] + e[None, :], out.to(y.dtype.element_ty), mask=live)


@triton.jit
def sequence(starts_q, starts_k, b, tokens, keys):
    """Where sequence b begins in packed queries and keys, and its lengths; unpacked, offsets of 0."""
    if starts_q is None:
        return tokens * 0, keys * 0, tokens, keys
    else:
        q0, k0 = tl.load(starts_q + b), tl.load(starts_k + b)
        return q0, k0, tl.load(starts_q + b + 1) - q0, tl.load(starts_k + b + 1) - k0


@triton.jit
def forward_kernel(
    q, k, v, mask, y, z, lse, m, a, g_m, g_a, starts_q, starts_k,
    heads, group, tokens, keys, blocks, left, right, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_col, y_batch, y_head, y_row, lse_batch, lse_head,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % blocks
    if RIGHT:  # the last queries see the most: they start first
        block = blocks - 1 - block
    h = pid // blocks % heads
    b = (pid // blocks // heads).to(tl.int64)
    q0, k0, tokens, keys = sequence(starts_q, starts_k, b, tokens, keys)
    first = block * M
    if first < tokens:
        rows, d, e = first + tl.arange(0, M), tl.arange(0, BD), tl.arange(0, BE)
        start = q0.to(tl.int64) + first
        near = tl.arange(0, M)
        qs = load_tile(
            q + b * q_batch + h.to(tl.int64) * q_head + start * q_row, near, d, q_row, tokens - first, True, D, BD
        )
        g = (h // group).to(tl.int64)
        k += b * k_batch + g * k_head + k0.to(tl.int64) * k_row
        v += b * v_batch + g * v_head + k0.to(tl.int64) * v_row
        if mask is not None:
            mask += b * mask_batch + h.to(tl.int64) * mask_head
        acc = tl.zeros([M, BE], tl.float32)
        total = tl.zeros([M], tl.float32)
        peak = tl.full([M], -INFINITY, tl.float32)
        acc, total, peak = walk_range(
            acc, total, peak, qs, k, v, mask, rows, first, tl.minimum(first + M, tokens) - 1, 0, keys,
            keys - tokens, tokens, keys, left, right, factor, k_row, v_row, mask_row, mask_col,
            LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
        )  # fmt: skip
        at = b * y_batch + h.to(tl.int64) * y_head + (start + near) * y_row
        index = b * lse_batch + h.to(tl.int64) * lse_head + start + near
        write_outputs(acc, total, peak, y, z, lse, m, a, g_m, g_a, h, index, rows < tokens, at, e, E)
