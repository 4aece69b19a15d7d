"""Triton kernels for channelwise ops: one skeleton (loops, masks, sums), handed an op's scalar functions.

A program owns a rectangle of a view (groups, outer, channels, inner), cut so that its parameters are constants of the
program. PLANE: rows of one channel's ``inner`` neighbouring values; constants are scalars. Otherwise, for short
``inner``: rows of whole periods (channels * inner); every lane keeps the constants of its channel over many rows.

Sums have a fixed order: lanes add up over a program's rows, a tree adds up a program's lanes, and a second kernel adds
up the programs, in float64. Where one program sees all of a channel, it finishes on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

EXACT = tl.constexpr(0)
FAST = tl.constexpr(1)
DOUBLE = tl.constexpr(2)

SUMS = tl.constexpr(7)  # the op's own five, then those of the prologue's scale and shift


@dataclass(frozen=True)
class Math:
    """An op's scalar functions; GRADE is one of the three above, STATIC the op's static arguments after channel_dim.

    derive(params, GRADE, STATIC) -> constants        forward(w, constants, GRADE, STATIC) -> y
    gradients(w, constants, GRADE, STATIC) -> (d/dw, five terms)    finish(params, sums, STATIC) -> gradients of params
    fallbacks: values of absent parameters. prologue: whether parameters 3 and 4 are a scale and a shift before the op.
    """

    derive: Any
    forward: Any
    gradients: Any
    finish: Any
    fallbacks: tuple[float, ...]
    prologue: bool


@triton.jit
def _param(
    p, g, c, channels, mask, fallback: tl.constexpr, bit: tl.constexpr, GROUPED: tl.constexpr, SPREAD: tl.constexpr
):
    """Parameter number ``bit`` of channel c; GROUPED and SPREAD are masks of those with a row a group, a value a channel."""
    if p is None:
        return (c * 0).to(tl.float32) + fallback
    else:
        at = c * 0
        if SPREAD >> bit & 1:
            at = c
        if GROUPED >> bit & 1:
            at += g * (channels if SPREAD >> bit & 1 else 1)
        return tl.load(p + at, mask=mask, other=fallback)


@triton.jit
def _params(
    p0, p1, p2, p3, p4, g, c, channels, mask, FALLBACKS: tl.constexpr, GROUPED: tl.constexpr, SPREAD: tl.constexpr
):
    return (
        _param(p0, g, c, channels, mask, FALLBACKS[0], 0, GROUPED, SPREAD),
        _param(p1, g, c, channels, mask, FALLBACKS[1], 1, GROUPED, SPREAD),
        _param(p2, g, c, channels, mask, FALLBACKS[2], 2, GROUPED, SPREAD),
        _param(p3, g, c, channels, mask, FALLBACKS[3], 3, GROUPED, SPREAD),
        _param(p4, g, c, channels, mask, FALLBACKS[4], 4, GROUPED, SPREAD),
    )


@triton.jit
def _store(d0, d1, d2, d3, d4, grads, s, at, mask, PROLOGUE: tl.constexpr):
    """Parameter gradients; ``at`` is their index as [group, channel]. A null pointer is a gradient nobody wants."""
    if d0 is not None:
        tl.store(d0 + at, grads[0].to(d0.dtype.element_ty), mask=mask)
    if d1 is not None:
        tl.store(d1 + at, grads[1].to(d1.dtype.element_ty), mask=mask)
    if d2 is not None:
        tl.store(d2 + at, grads[2].to(d2.dtype.element_ty), mask=mask)
    if d3 is not None:
        tl.store(d3 + at, (s[5] if PROLOGUE else grads[3]).to(d3.dtype.element_ty), mask=mask)
    if d4 is not None:
        tl.store(d4 + at, (s[6] if PROLOGUE else grads[4]).to(d4.dtype.element_ty), mask=mask)


@triton.jit
def _place(
    channels, inner, row_units, rows, row_cuts, rows_per, col_cuts, cols_per, PLANE: tl.constexpr, UNIT: tl.constexpr
):
    """Where this program works. Lengths come in units of UNIT values, so that the compiler knows what divides them."""
    pid = tl.program_id(0)
    col_cut = pid % col_cuts
    pid = pid // col_cuts
    row_cut = pid % row_cuts
    pid = pid // row_cuts
    plane = pid * 0
    if PLANE:
        plane = pid % channels
        pid = pid // channels
    if PLANE:  # a plane may have more than 2^31 values, a period may not
        begin = col_cut.to(tl.int64) * cols_per
        end = tl.minimum(begin + cols_per, inner)
    else:
        begin = col_cut * cols_per
        end = tl.minimum(begin + cols_per, row_units)
    first = row_cut * rows_per
    return pid, plane, row_cut, row_cut * col_cuts + col_cut, begin, end, first, tl.minimum(first + rows_per, rows)


@triton.jit
def _channel(plane, cols, channels, inner, PLANE: tl.constexpr, WRAP: tl.constexpr, UNIT: tl.constexpr):
    """Channel of this program, or of each of its lanes."""
    if PLANE:
        return plane
    else:
        c = cols // inner
        return c % channels if WRAP else c


@triton.jit
def _number(v, DOUBLES: tl.constexpr):
    return v.to(tl.float64) if DOUBLES else v.to(tl.float32)


@triton.jit
def _prologue(
    x, residual, at, lane, live, scale, shift, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, DOUBLES: tl.constexpr
):
    w = x
    if HAS_SCALE:
        w = w * scale
    if HAS_SHIFT:
        w = w + shift
    if residual is not None:
        w = w + _number(tl.load(residual + at + lane, mask=live, other=0.0), DOUBLES)
    return w


@triton.jit
def forward_kernel(
    x, residual, y, p0, p1, p2, p3, p4,
    channels, inner, row_units, rows, row_cuts, rows_per, col_cuts, cols_per, group_units,
    DERIVE: tl.constexpr, FORWARD: tl.constexpr, STATIC: tl.constexpr, FALLBACKS: tl.constexpr, PROLOGUE: tl.constexpr,
    GRADE: tl.constexpr, GROUPED: tl.constexpr, SPREAD: tl.constexpr,
    PLANE: tl.constexpr, WRAP: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    DOUBLES: tl.constexpr = GRADE == 2
    inner_units = inner // UNIT if PLANE else inner
    g, plane, _cut, _slot, begin, end, first, last = _place(
        channels, inner_units, row_units, rows, row_cuts, rows_per, col_cuts, cols_per, PLANE, UNIT
    )
    lane = tl.arange(0, LANES)
    cols = begin * UNIT + lane
    c = _channel(plane, cols, channels, inner, PLANE, WRAP, UNIT)
    known = c < channels
    p = _params(p0, p1, p2, p3, p4, g, c, channels, known, FALLBACKS, GROUPED, SPREAD)
    k = DERIVE(p, GRADE, STATIC)
    scale, shift = _number(p[3], DOUBLES), _number(p[4], DOUBLES)
    for row in tl.range(first, last):
        start = g.to(tl.int64) * group_units + row.to(tl.int64) * row_units
        if PLANE:
            start += plane * inner_units
        for step in tl.range(begin, end, LANES // UNIT):
            at = (start + step) * UNIT
            live = lane < (end - step) * UNIT
            if WRAP:
                live = live & (lane < (group_units - row.to(tl.int64) * row_units - step) * UNIT)
            w = _number(tl.load(x + at + lane, mask=live, other=0.0), DOUBLES)
            w = _prologue(
                w,
                residual,
                at,
                lane,
                live,
                scale,
                shift,
                PROLOGUE and p3 is not None,
                PROLOGUE and p4 is not None,
                DOUBLES,
            )
            tl.store(y + at + lane, FORWARD(w, k, GRADE, STATIC).to(y.dtype.element_ty), mask=live)


@triton.jit
def backward_kernel(
    x, residual, dy, dx, dresidual, partial, p0, p1, p2, p3, p4, d0, d1, d2, d3, d4,
    channels, inner, row_units, rows, row_cuts, rows_per, col_cuts, cols_per, group_units,
    DERIVE: tl.constexpr, GRADIENTS: tl.constexpr, FINISH: tl.constexpr,
    STATIC: tl.constexpr, FALLBACKS: tl.constexpr, PROLOGUE: tl.constexpr,
    GRADE: tl.constexpr, GROUPED: tl.constexpr, SPREAD: tl.constexpr, WANTED: tl.constexpr,
    PLANE: tl.constexpr, WRAP: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """WANTED: mask of the sums to make. They go to ``partial``, or where that is null, through FINISH to d0 to d4."""
    DOUBLES: tl.constexpr = GRADE == 2
    inner_units = inner // UNIT if PLANE else inner
    g, plane, row_cut, slot, begin, end, first, last = _place(
        channels, inner_units, row_units, rows, row_cuts, rows_per, col_cuts, cols_per, PLANE, UNIT
    )
    lane = tl.arange(0, LANES)
    cols = begin * UNIT + lane
    c = _channel(plane, cols, channels, inner, PLANE, WRAP, UNIT)
    known = c < channels
    p = _params(p0, p1, p2, p3, p4, g, c, channels, known, FALLBACKS, GROUPED, SPREAD)
    k = DERIVE(p, GRADE, STATIC)
    scale, shift = _number(p[3], DOUBLES), _number(p[4], DOUBLES)
    zero = tl.zeros([LANES], tl.float64 if DOUBLES else tl.float32)
    s0, s1, s2, s3, s4, s5, s6 = zero, zero, zero, zero, zero, zero, zero
    for row in tl.range(first, last):
        start = g.to(tl.int64) * group_units + row.to(tl.int64) * row_units
        if PLANE:
            start += plane * inner_units
        for step in tl.range(begin, end, LANES // UNIT):
            at = (start + step) * UNIT
            live = lane < (end - step) * UNIT
            if WRAP:
                live = live & (lane < (group_units - row.to(tl.int64) * row_units - step) * UNIT)
            v = _number(tl.load(x + at + lane, mask=live, other=0.0), DOUBLES)
            up = _number(tl.load(dy + at + lane, mask=live, other=0.0), DOUBLES)
            w = _prologue(
                v,
                residual,
                at,
                lane,
                live,
                scale,
                shift,
                PROLOGUE and p3 is not None,
                PROLOGUE and p4 is not None,
                DOUBLES,
            )
            slope, t0, t1, t2, t3, t4 = GRADIENTS(w, k, GRADE, STATIC)
            grad = up * slope
            if dresidual is not None:
                tl.store(dresidual + at + lane, grad.to(dresidual.dtype.element_ty), mask=live)
            if dx is not None:
                if PROLOGUE and p3 is not None:
                    tl.store(dx + at + lane, (grad * scale).to(dx.dtype.element_ty), mask=live)
                else:
                    tl.store(dx + at + lane, grad.to(dx.dtype.element_ty), mask=live)
            if WANTED & 15:
                s0 += up * t0
                s1 += up * t1
                s2 += up * t2
                s3 += up * t3
            if WANTED & 16:
                s4 += up * t4
            if WANTED & 32:
                s5 += grad * v
            if WANTED & 64:
                s6 += grad
    if WANTED:
        sums = (s0, s1, s2, s3, s4, s5, s6)
        mask = cols < row_units * UNIT
        column = cols
        length = row_units * UNIT
        if PLANE:
            sums = (
                tl.sum(s0, 0),
                tl.sum(s1, 0),
                tl.sum(s2, 0),
                tl.sum(s3, 0),
                tl.sum(s4, 0),
                tl.sum(s5, 0),
                tl.sum(s6, 0),
            )
            mask, column, length = known, plane, channels
        if partial is not None:
            slots = row_cuts * col_cuts if PLANE else row_cuts
            to = partial + (g.to(tl.int64) * slots + (slot if PLANE else row_cut)) * SUMS * length + column
            for i in tl.static_range(SUMS):
                if WANTED >> i & 1:
                    tl.store(to + i * length, sums[i], mask=mask)
        else:
            _store(d0, d1, d2, d3, d4, FINISH(p, sums, STATIC), sums, g * channels + c, mask, PROLOGUE)


@triton.jit
def finish_kernel(
    partial, p0, p1, p2, p3, p4, d0, d1, d2, d3, d4,
    channels, inner, length, slots, repeat,
    FINISH: tl.constexpr, STATIC: tl.constexpr, FALLBACKS: tl.constexpr, PROLOGUE: tl.constexpr,
    GROUPED: tl.constexpr, SPREAD: tl.constexpr, WANTED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """partial[group, slot, sum, repeat, channel, inner] -> gradients[group, channel]. ROWS x LANES: terms x channels."""
    blocks = tl.cdiv(channels, LANES)
    g, c = tl.program_id(0) // blocks, tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    known = c < channels
    zero = tl.zeros([ROWS, LANES], tl.float64)
    s0, s1, s2, s3, s4, s5, s6 = zero, zero, zero, zero, zero, zero, zero
    terms = slots * repeat * inner
    for begin in tl.range(0, terms, ROWS):
        term = begin + tl.arange(0, ROWS)
        i, r, slot = term % inner, term // inner % repeat, term // (inner * repeat)
        at = (
            (g.to(tl.int64) * slots + slot[:, None]) * SUMS * length
            + (r[:, None] * channels + c[None, :]) * inner
            + i[:, None]
        )
        live = (term < terms)[:, None] & known[None, :]
        if WANTED & 15:
            s0 += tl.load(partial + at, mask=live, other=0.0).to(tl.float64)
            s1 += tl.load(partial + at + length, mask=live, other=0.0).to(tl.float64)
            s2 += tl.load(partial + at + 2 * length, mask=live, other=0.0).to(tl.float64)
            s3 += tl.load(partial + at + 3 * length, mask=live, other=0.0).to(tl.float64)
        if WANTED & 16:
            s4 += tl.load(partial + at + 4 * length, mask=live, other=0.0).to(tl.float64)
        if WANTED & 32:
            s5 += tl.load(partial + at + 5 * length, mask=live, other=0.0).to(tl.float64)
        if WANTED & 64:
            s6 += tl.load(partial + at + 6 * length, mask=live, other=0.0).to(tl.float64)
    sums = (tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0), tl.sum(s4, 0), tl.sum(s5, 0), tl.sum(s6, 0))
    p = _params(p0, p1, p2, p3, p4, g, c, channels, known, FALLBACKS, GROUPED, SPREAD)
    _store(d0, d1, d2, d3, d4, FINISH(p, sums, STATIC), sums, g * channels + c, known, PROLOGUE)
