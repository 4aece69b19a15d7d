"""Triton kernels of the backward pass.

Let G be the gradient of the edited output and p = 1 + g_m m a head's scale. Attention's backward pass then starts from
dz = G p. ``prepare_kernel``, which reads z and G for delta = rowsum(dz z) anyway, writes dz and the partial sums of the edit's
gradients, S1 = sum G z and S0 = sum G, to slots that ``edit_kernel`` reduces in order. Without a scale, dz is G.

Keys and queries have a kernel each, so that one program owns each sum: no atomics, the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import INFINITY, apply_mask, edit_scale, hide, load_tile, sequence


@triton.jit
def prepare_kernel(
    z, dy, dz, delta, partial, m, g_m, starts_q, heads, tokens, blocks,
    z_batch, z_head, z_row, dy_batch, dy_head, dy_row, dz_batch, dz_head, dz_row, delta_batch, delta_head,
    E: tl.constexpr, BE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """dz and delta [B, H, T] of M queries, and their partial sums S1 and S0 in ``partial`` [B * blocks, H, 2, E]."""
    pid = tl.program_id(0)
    h, slot = pid % heads, pid // heads
    b, first = (slot // blocks).to(tl.int64), slot % blocks * M
    q0, _k0, tokens, _keys = sequence(starts_q, starts_q, b, tokens, tokens)
    offsets, e = tl.arange(0, M), tl.arange(0, BE)
    start, head = q0.to(tl.int64) + first, h.to(tl.int64)
    left = tokens - first
    g = load_tile(dy + b * dy_batch + head * dy_head + start * dy_row, offsets, e, dy_row, left, True, E, BE).to(
        tl.float32
    )
    zs = g
    if z is not None:
        zs = load_tile(z + b * z_batch + head * z_head + start * z_row, offsets, e, z_row, left, True, E, BE).to(
            tl.float32
        )
    if delta is not None:
        dz_rows = g
        if dz is not None:  # rounded, as the other kernels read it
            rounded = (g * edit_scale(m, g_m, h, e, E, False)[None, :]).to(dz.dtype.element_ty)
            at = dz + b * dz_batch + head * dz_head + (start + offsets)[:, None] * dz_row + e[None, :]
            tl.store(at, rounded, mask=(offsets < left)[:, None] & (e < E)[None, :])
            dz_rows = rounded.to(tl.float32)
        at = delta + b * delta_batch + head * delta_head + start + offsets
        tl.store(at, tl.sum(dz_rows * zs, 1), mask=offsets < left)
    if partial is not None:
        at = partial + ((slot.to(tl.int64) * heads + h) * 2) * E + e
        if z is not None:
            tl.store(at, tl.sum(g * zs, 0), mask=e < E)
        tl.store(at + E, tl.sum(g, 0), mask=e < E)


@triton.jit
def _vector_gradient(edit, gate, d_edit, d_gate, s, h, e, E: tl.constexpr):
    """Gradients of an edit vector and its gate, from S1 or S0."""
    inside = e < E
    if d_edit is not None:
        value = s
        if gate is not None:
            value = value * tl.load(gate + h)
        tl.store(d_edit + h * E + e, value.to(d_edit.dtype.element_ty), mask=inside)
    if d_gate is not None:
        d = tl.sum(s * tl.load(edit + h * E + e, mask=inside, other=0.0), 0)
        tl.store(d_gate + h, d.to(d_gate.dtype.element_ty))


@triton.jit
def edit_kernel(
    partial, m, a, g_m, g_a, dm, da, dg_m, dg_a, heads, slots,
    SCALED: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Reduces S1 and S0 of one head in float64 and writes the edit's gradients. SCALED: with S1."""
    h, e, row = tl.program_id(0), tl.arange(0, BE), tl.arange(0, ROWS)
    s1, s0 = tl.zeros([ROWS, BE], tl.float64), tl.zeros([ROWS, BE], tl.float64)
    for start in tl.range(0, slots, ROWS):
        slot = start + row
        live = (slot[:, None] < slots) & (e[None, :] < E)
        at = partial + ((slot.to(tl.int64) * heads + h) * 2)[:, None] * E + e[None, :]
        if SCALED:
            s1 += tl.load(at, mask=live, other=0.0).to(tl.float64)
        s0 += tl.load(at + E, mask=live, other=0.0).to(tl.float64)
    _vector_gradient(m, g_m, dm, dg_m, tl.sum(s1, 0), h, e, E)
    _vector_gradient(a, g_a, da, dg_a, tl.sum(s0, 0), h, e, E)


@triton.jit
def _walk_queries(
    dk, dv, k, v, q, dz, lse, delta, mask, cols, begin, end, shift, tokens, keys, left, right, factor,
    q_stride, dz_stride, mask_row, mask_col,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Adds the contributions of queries ``begin`` to ``end`` to dk and dv of the keys ``cols``."""
    offsets, d, e = tl.arange(0, M), tl.arange(0, BD), tl.arange(0, BE)
    for start in tl.range(begin, end, M):
        rows = start + offsets
        start64 = start.to(tl.int64)
        inside = rows < tokens
        qs = load_tile(q + start64 * q_stride, offsets, d, q_stride, tokens - start, True, D, BD)
        s = tl.dot(k, tl.trans(qs), input_precision=PRECISION) * factor
        if mask is not None:
            s = apply_mask(s, mask, rows[None, :], cols[:, None], mask_row, mask_col, tokens, keys, KIND)
        if EDGE:
            s = hide(s, rows[None, :], cols[:, None], shift, keys, left, right, LEFT, RIGHT)
        w = tl.exp2(s - tl.load(lse + rows, mask=inside, other=INFINITY)[None, :])
        g = load_tile(dz + start64 * dz_stride, offsets, e, dz_stride, tokens - start, True, E, BE)
        dv = tl.dot(w.to(g.dtype), g, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        ds = w * (dp - tl.load(delta + rows, mask=inside, other=0.0)[None, :])
        dk = tl.dot(ds.to(qs.dtype), qs, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, mask, dz, lse, delta, dk, dv, starts_q, starts_k,
    heads, group, tokens, keys, blocks, left, right, factor, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_row, mask_col,
    dz_batch, dz_head, dz_row, lse_batch, lse_head, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys, from one query head; the caller sums over heads that share keys."""
    pid = tl.program_id(0)
    block, h, b = pid % blocks, pid // blocks % heads, (pid // blocks // heads).to(tl.int64)
    q0, k0, tokens, keys = sequence(starts_q, starts_k, b, tokens, keys)
    first = block * N
    if first < keys:
        offsets, d, e = tl.arange(0, N), tl.arange(0, BD), tl.arange(0, BE)
        cols, shift = first + offsets, keys - tokens
        head, g, start = h.to(tl.int64), (h // group).to(tl.int64), k0.to(tl.int64) + first
        room = keys - first
        ks = load_tile(k + b * k_batch + g * k_head + start * k_row, offsets, d, k_row, room, True, D, BD)
        vs = load_tile(v + b * v_batch + g * v_head + start * v_row, offsets, e, v_row, room, True, E, BE)
        q += b * q_batch + head * q_head + q0.to(tl.int64) * q_row
        dz += b * dz_batch + head * dz_head + q0.to(tl.int64) * dz_row
        lse += b * lse_batch + head * lse_head + q0
        delta += b * lse_batch + head * lse_head + q0
        if mask is not None:
            mask += b * mask_batch + head * mask_head
        # queries low to high see some of these keys, queries full_low to full_high all of them
        low, high = 0, tokens
        full_low, full_high = 0, tokens
        last = tl.minimum(first + N, keys) - 1
        if RIGHT:
            low = tl.maximum(first - shift - right, 0) // M * M
            full_low = (tl.maximum(last - shift - right, 0) + M - 1) // M * M
        if LEFT:
            high = tl.minimum(tl.maximum(last - shift + left + 1, 0), tokens)
            full_high = tl.maximum(first - shift + left + 1, 0) // M * M
        else:
            full_high = tl.cdiv(tokens, M) * M
        full_low = tl.minimum(full_low, tl.cdiv(high, M) * M)
        full_low = tl.maximum(full_low, low)
        full_high = tl.maximum(tl.minimum(full_high, tl.cdiv(high, M) * M), full_low)
        if mask is not None:  # one loop: any pair may be hidden
            full_low = tl.cdiv(high, M) * M
            full_high = full_low
        dks, dvs = tl.zeros([N, BD], tl.float32), tl.zeros([N, BE], tl.float32)
        if RIGHT or mask is not None:
            dks, dvs = _walk_queries(
                dks, dvs, ks, vs, q, dz, lse, delta, mask, cols, low, full_low, shift, tokens, keys, left, right, factor,
                q_row, dz_row, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, M,
            )  # fmt: skip
        if mask is None:
            dks, dvs = _walk_queries(
                dks, dvs, ks, vs, q, dz, lse, delta, mask, cols, full_low, full_high, shift, tokens, keys, left, right, factor,
                q_row, dz_row, mask_row, mask_col, False, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, M,
            )  # fmt: skip
        if LEFT and mask is None:
            dks, dvs = _walk_queries(
                dks, dvs, ks, vs, q, dz, lse, delta, mask, cols, full_high, high, shift, tokens, keys, left, right, factor,
                q_row, dz_row, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, M,
            )  # fmt: skip
        live = cols[:, None] < keys
        at_dk = dk + b * dk_batch + head * dk_head + (start + offsets)[:, None] * dk_row + d[None, :]
        at_dv = dv + b * dv_batch + head * dv_head + (start + offsets)[:, None] * dv_row + e[None, :]
        tl.store(at_dk, (dks * scale).to(dk.dtype.element_ty), mask=live & (d[None, :] < D))
        tl.store(at_dv, dvs.to(dv.dtype.element_ty), mask=live & (e[None, :] < E))


@triton.jit
def _walk_keys(
    dq, q, dz, k, v, lse, delta, mask, rows, begin, end, shift, tokens, keys, left, right, factor,
    k_stride, v_stride, mask_row, mask_col,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds the contributions of keys ``begin`` to ``end`` to dq of the queries ``rows``."""
    offsets, d, e = tl.arange(0, N), tl.arange(0, BD), tl.arange(0, BE)
    for start in tl.range(begin, end, N):
        cols = start + offsets
        ks = load_tile(k + start.to(tl.int64) * k_stride, offsets, d, k_stride, keys - start, EDGE, D, BD)
        s = tl.dot(q, tl.trans(ks), input_precision=PRECISION) * factor
        if mask is not None:
            s = apply_mask(s, mask, rows[:, None], cols[None, :], mask_row, mask_col, tokens, keys, KIND)
        if EDGE:
            s = hide(s, rows[:, None], cols[None, :], shift, keys, left, right, LEFT, RIGHT)
        w = tl.exp2(s - lse[:, None])
        vs = load_tile(v + start.to(tl.int64) * v_stride, offsets, e, v_stride, keys - start, EDGE, E, BE)
        ds = w * (tl.dot(dz, tl.trans(vs), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(ks.dtype), ks, dq, input_precision=PRECISION)
    return dq


@triton.jit
def queries_kernel(
    q, k, v, mask, dz, lse, delta, dq, starts_q, starts_k,
    heads, group, tokens, keys, blocks, left, right, factor, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_row, mask_col,
    dz_batch, dz_head, dz_row, lse_batch, lse_head, dq_batch, dq_head, dq_row,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of M queries of one head."""
    pid = tl.program_id(0)
    block = pid % blocks
    if RIGHT:
        block = blocks - 1 - block
    h, b = pid // blocks % heads, (pid // blocks // heads).to(tl.int64)
    q0, k0, tokens, keys = sequence(starts_q, starts_k, b, tokens, keys)
    first = block * M
    if first < tokens:
        offsets, d, e = tl.arange(0, M), tl.arange(0, BD), tl.arange(0, BE)
        rows, shift, room = first + offsets, keys - tokens, tokens - first
        head, g, start = h.to(tl.int64), (h // group).to(tl.int64), q0.to(tl.int64) + first
        qs = load_tile(q + b * q_batch + head * q_head + start * q_row, offsets, d, q_row, room, True, D, BD)
        dzs = load_tile(dz + b * dz_batch + head * dz_head + start * dz_row, offsets, e, dz_row, room, True, E, BE)
        at = b * lse_batch + head * lse_head + start + offsets
        lses = tl.load(lse + at, mask=rows < tokens, other=INFINITY)
        deltas = tl.load(delta + at, mask=rows < tokens, other=0.0)
        k += b * k_batch + g * k_head + k0.to(tl.int64) * k_row
        v += b * v_batch + g * v_head + k0.to(tl.int64) * v_row
        if mask is not None:
            mask += b * mask_batch + head * mask_head
        last = tl.minimum(first + M, tokens) - 1
        low, high = 0, keys
        full_low, full_high = 0, keys
        if RIGHT:
            high = tl.minimum(tl.maximum(last + shift + right + 1, 0), keys)
            full_high = tl.minimum(tl.maximum(first + shift + right + 1, 0), keys)
        if LEFT:
            low = tl.maximum(first + shift - left, 0) // N * N
            full_low = (tl.maximum(last + shift - left, 0) + N - 1) // N * N
        full_low = tl.maximum(tl.minimum(full_low, tl.cdiv(high, N) * N), low)
        full_high = tl.maximum(full_high // N * N, full_low)
        if mask is not None:  # one loop: any pair may be hidden
            full_high = low
        dqs = tl.zeros([M, BD], tl.float32)
        if LEFT and mask is None:
            dqs = _walk_keys(
                dqs, qs, dzs, k, v, lses, deltas, mask, rows, low, full_low, shift, tokens, keys, left, right, factor,
                k_row, v_row, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
            )  # fmt: skip
        if mask is None:
            dqs = _walk_keys(
                dqs, qs, dzs, k, v, lses, deltas, mask, rows, full_low, full_high, shift, tokens, keys, left, right, factor,
                k_row, v_row, mask_row, mask_col, False, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
            )  # fmt: skip
        dqs = _walk_keys(
            dqs, qs, dzs, k, v, lses, deltas, mask, rows, full_high, high, shift, tokens, keys, left, right, factor,
            k_row, v_row, mask_row, mask_col, True, LEFT, RIGHT, KIND, PRECISION, D, E, BD, BE, N,
        )  # fmt: skip
        at_dq = dq + b * dq_batch + head * dq_head + (start + offsets)[:, None] * dq_row + d[None, :]
        tl.store(at_dq, (dqs * scale).to(dq.dtype.element_ty), mask=(rows < tokens)[:, None] & (d[None, :] < D))
