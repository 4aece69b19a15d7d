"""Triton kernels of the forward pass: FlashAttention-2, with the head edit in the epilogue.

A program owns M queries of one head and loops over the keys they see, N at a time. The first and last tiles, in which some
pairs are hidden, compare positions; full tiles do not. Scores are in units of log 2. Of every query, ``row_max`` is the
running maximum, ``row_sum`` the sum of 2^(score - row_max), ``acc`` the sum of those times the values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_tile(p, rows, cols, row_stride, limit, ROWS: tl.constexpr, COLS: tl.constexpr, PADDED: tl.constexpr):
    """Loads p[rows, cols]; zero for rows from ``limit`` on (if ROWS) and for columns of padding (COLS < PADDED)."""
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
    """Scores, -inf where the query at position row + shift cannot see the key. ``rows`` and ``cols`` broadcast against s."""
    seen = cols < keys
    if RIGHT:
        seen = seen & (cols <= rows + (shift + right))
    if LEFT:
        seen = seen & (cols >= rows + (shift - left))
    return tl.where(seen, s, -INFINITY)


@triton.jit
def apply_mask(s, mask, rows, cols, row_stride, col_stride, tokens, keys, KIND: tl.constexpr):
    """Applies a user's mask to scores, in units of log 2: booleans as bytes (KIND & 1) or addends; one row for all queries, or
    one each (KIND & 2). ``rows`` and ``cols`` as in :func:`hide`."""
    at, inside = mask + cols.to(tl.int64) * col_stride, cols < keys
    if KIND & 2:
        at, inside = at + rows.to(tl.int64) * row_stride, inside & (rows < tokens)
    if KIND & 1:
        return tl.where(tl.load(at, mask=inside, other=0) != 0, s, -INFINITY)
    else:
        return s + tl.load(at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def walk(
    acc, row_sum, row_max, q, k, v, mask, rows, begin, end, shift, tokens, keys, left, right, factor,
    k_stride, v_stride, mask_row, mask_col,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds keys ``begin`` to ``end``. EDGE: some may be hidden."""
    n, d, e = tl.arange(0, N), tl.arange(0, BD), tl.arange(0, BE)
    for start in tl.range(begin, end, N):
        cols = start + n
        ks = load_tile(k + start.to(tl.int64) * k_stride, n, d, k_stride, keys - start, EDGE, D, BD)
        s = tl.dot(q, tl.trans(ks), input_precision=PRECISION) * factor
        if mask is not None:
            s = apply_mask(s, mask, rows[:, None], cols[None, :], mask_row, mask_col, tokens, keys, KIND)
        if EDGE:
            s = hide(s, rows[:, None], cols[None, :], shift, keys, left, right, LEFT, RIGHT)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        base = new_max
        if EDGE:  # a query may have seen no key yet
            base = tl.where(new_max == -INFINITY, 0.0, new_max)
        p = tl.exp2(s - base[:, None])
        rescale = tl.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        vs = load_tile(v + start.to(tl.int64) * v_stride, n, e, v_stride, keys - start, EDGE, E, BE)
        acc = tl.dot(p.to(vs.dtype), vs, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def walk_range(
    acc, row_sum, row_max, q, k, v, mask, rows, first, last, begin, end, shift, tokens, keys, left, right, factor,
    k_stride, v_stride, mask_row, mask_col,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds the keys from ``begin``, a multiple of N, to ``end`` that queries ``first`` to ``last`` see."""
    low, high = begin, tl.minimum(end, keys)
    if RIGHT:
        high = tl.minimum(high, tl.maximum(last + shift + right + 1, 0))
    if LEFT:
        low = tl.maximum(low, tl.maximum(first + shift - left, 0) // N * N)
    if mask is not None:  # any key may be hidden
        return walk(
            acc, row_sum, row_max, q, k, v, mask, rows, low, high, shift, tokens, keys, left, right, factor,
            k_stride, v_stride, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
        )  # fmt: skip
    full_high = high  # all these queries see the keys from full_low to full_high
    if RIGHT:
        full_high = tl.minimum(full_high, tl.maximum(first + shift + right + 1, 0))
    full_low = low
    if LEFT:
        full_low = tl.maximum(low, (tl.maximum(last + shift - left, 0) + N - 1) // N * N)
        full_low = tl.maximum(low, tl.minimum(full_low, (high + N - 1) // N * N))
    full_high = tl.maximum(full_high // N * N, full_low)
    if LEFT:
        acc, row_sum, row_max = walk(
            acc, row_sum, row_max, q, k, v, mask, rows, low, full_low, shift, tokens, keys, left, right, factor,
            k_stride, v_stride, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
        )  # fmt: skip
    acc, row_sum, row_max = walk(
        acc, row_sum, row_max, q, k, v, mask, rows, full_low, full_high, shift, tokens, keys, left, right, factor,
        k_stride, v_stride, mask_row, mask_col, False, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
    )  # fmt: skip
    return walk(
        acc, row_sum, row_max, q, k, v, mask, rows, full_high, high, shift, tokens, keys, left, right, factor,
        k_stride, v_stride, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
    )  # fmt: skip


@triton.jit
def row_of(p, h, e, E: tl.constexpr, ONCE: tl.constexpr):
    """p[h]. The compiler replicates a load of fewer values than a program has threads, and everything computed from it, across
    threads; ONCE avoids that by loading more."""
    if ONCE:
        i = tl.arange(0, 256)
        row = tl.load(p + h * E + i, mask=i < E, other=0.0)
        return tl.sum(tl.reshape(row, [256 // e.shape[0], e.shape[0]]), 0).to(tl.float32)
    else:
        return tl.load(p + h * E + e, mask=e < E, other=0.0).to(tl.float32)


@triton.jit
def edit_scale(m, g_m, h, e, E: tl.constexpr, ONCE: tl.constexpr):
    """1 + g_m m of a head; 1 without m."""
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
    acc, row_sum, row_max, y, z, lse, m, a, g_m, g_a, h, i, inside, at, e, E: tl.constexpr
):  # fmt: skip
    """Epilogue: normalises, edits and stores. Rows go to index ``i`` of lse and offset ``at`` of y and z."""
    no_keys = row_sum == 0.0
    out = acc * (1.0 / tl.where(no_keys, 1.0, row_sum))[:, None]
    live = inside[:, None] & (e < E)[None, :]
    if lse is not None:
        tl.store(lse + i, tl.where(no_keys, INFINITY, row_max + tl.log2(row_sum)), mask=inside)
    if z is not None:
        tl.store(z + at[:, None] + e[None, :], out.to(z.dtype.element_ty), mask=live)
    if m is not None:
        out = out * edit_scale(m, g_m, h, e, E, cuda_capability_geq(10))[None, :]
    if a is not None:
        out = out + edit_offset(a, g_a, h, e, E, cuda_capability_geq(10))[None, :]
    tl.store(y + at[:, None] + e[None, :], out.to(y.dtype.element_ty), mask=live)


@triton.jit
def sequence(starts_q, starts_k, b, tokens, keys):
    """Offsets of sequence b in packed queries and keys, and its lengths; offsets are 0 if unpacked."""
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
    if RIGHT:  # the last queries see the most keys: they start first
        block = blocks - 1 - block
    h = pid // blocks % heads
    b = (pid // blocks // heads).to(tl.int64)
    q0, k0, tokens, keys = sequence(starts_q, starts_k, b, tokens, keys)
    first = block * M
    if first < tokens:
        rows, d, e = first + tl.arange(0, M), tl.arange(0, BD), tl.arange(0, BE)
        start = q0.to(tl.int64) + first
        offsets = tl.arange(0, M)
        qs = load_tile(
            q + b * q_batch + h.to(tl.int64) * q_head + start * q_row, offsets, d, q_row, tokens - first, True, D, BD
        )
        g = (h // group).to(tl.int64)
        k += b * k_batch + g * k_head + k0.to(tl.int64) * k_row
        v += b * v_batch + g * v_head + k0.to(tl.int64) * v_row
        if mask is not None:
            mask += b * mask_batch + h.to(tl.int64) * mask_head
        acc = tl.zeros([M, BE], tl.float32)
        row_sum = tl.zeros([M], tl.float32)
        row_max = tl.full([M], -INFINITY, tl.float32)
        acc, row_sum, row_max = walk_range(
            acc, row_sum, row_max, qs, k, v, mask, rows, first, tl.minimum(first + M, tokens) - 1, 0, keys,
            keys - tokens, tokens, keys, left, right, factor, k_row, v_row, mask_row, mask_col,
            LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
        )  # fmt: skip
        at = b * y_batch + h.to(tl.int64) * y_head + (start + offsets) * y_row
        index = b * lse_batch + h.to(tl.int64) * lse_head + start + offsets
        write_outputs(acc, row_sum, row_max, y, z, lse, m, a, g_m, g_a, h, index, rows < tokens, at, e, E)
