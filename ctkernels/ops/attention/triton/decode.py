"""Triton kernels for few queries and many keys (split-K): programs share the keys, and a second kernel joins their results.

Query heads that share a key head are rows of one tile, so that each key is read once. Row r is token r % tokens of query
head r // tokens of its group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import INFINITY, walk_range, write_outputs


@triton.jit
def split_kernel(
    q, k, v, mask, part, part_max, part_sum, heads, group, tokens, keys, blocks, splits, per_split, left, right, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_row, mask_col,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Partial results over keys split * per_split to (split + 1) * per_split, as [split, batch, head, token]."""
    pid = tl.program_id(0)
    split, block = pid % splits, pid // splits % blocks
    groups = heads // group
    g = pid // splits // blocks % groups
    b = pid // splits // blocks // groups
    r = block * M + tl.arange(0, M)
    inside = r < group * tokens
    i, h = r % tokens, g * group + r // tokens
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    q += b.to(tl.int64) * q_batch
    at = h.to(tl.int64)[:, None] * q_head + i.to(tl.int64)[:, None] * q_row + d[None, :]
    qs = tl.load(q + at, mask=inside[:, None] & (d[None, :] < D), other=0.0)
    if mask is not None:  # `walk` adds the token's offset
        mask += b.to(tl.int64) * mask_batch + tl.where(inside, h.to(tl.int64) * mask_head, 0)[:, None]
    k += b.to(tl.int64) * k_batch + g.to(tl.int64) * k_head
    v += b.to(tl.int64) * v_batch + g.to(tl.int64) * v_head
    acc = tl.zeros([M, BE], tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    row_max = tl.full([M], -INFINITY, tl.float32)
    acc, row_sum, row_max = walk_range(
        acc, row_sum, row_max, qs, k, v, mask, i, 0, tokens - 1, split * per_split, (split + 1) * per_split,
        keys - tokens, tokens, keys, left, right, factor, k_row, v_row, mask_row, mask_col,
        LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
    )  # fmt: skip
    batch = tl.num_programs(0) // (splits * blocks * groups)
    row = ((split * batch + b).to(tl.int64) * heads + h) * tokens + i
    tl.store(part_max + row, row_max, mask=inside)
    tl.store(part_sum + row, row_sum, mask=inside)
    tl.store(part + row[:, None] * E + e[None, :], acc, mask=inside[:, None] & (e[None, :] < E))


@triton.jit
def join_kernel(
    part, part_max, part_sum, y, z, lse, m, a, g_m, g_a, heads, tokens, rows, splits, y_batch, y_head, y_row,
    E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Joins the splits of M tokens of one head, in order, and edits the result."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(tokens, M)
    block, bh = pid % blocks, pid // blocks
    i = block * M + tl.arange(0, M)
    inside = i < tokens
    e = tl.arange(0, BE)
    row = bh.to(tl.int64) * tokens + i
    acc = tl.zeros([M, BE], tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    row_max = tl.full([M], -INFINITY, tl.float32)
    for _ in tl.range(0, splits):
        part_row_max = tl.load(part_max + row, mask=inside, other=-INFINITY)
        new_max = tl.maximum(row_max, part_row_max)
        base = tl.where(new_max == -INFINITY, 0.0, new_max)
        rescale, weight = tl.exp2(row_max - base), tl.exp2(part_row_max - base)
        row_sum = row_sum * rescale + tl.load(part_sum + row, mask=inside, other=0.0) * weight
        values = tl.load(part + row[:, None] * E + e[None, :], mask=inside[:, None] & (e[None, :] < E), other=0.0)
        acc = acc * rescale[:, None] + values * weight[:, None]
        row_max = new_max
        row += rows
    b, h = bh // heads, bh % heads
    at = b.to(tl.int64) * y_batch + h.to(tl.int64) * y_head + i.to(tl.int64) * y_row
    write_outputs(acc, row_sum, row_max, y, z, lse, m, a, g_m, g_a, h, bh.to(tl.int64) * tokens + i, inside, at, e, E)
