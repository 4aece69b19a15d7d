"""Triton kernels of channelwise ops: one skeleton (loops, masks, sums) around an op's scalar functions.

A program works on a tile of a view (groups, outer, channels, inner) in which every lane keeps its channel, so that
parameters are loaded once. PLANE: rows of one channel's ``inner`` neighbouring values, with scalar constants. Otherwise
(lanes), for short ``inner``: rows of whole periods (channels * inner), with constants per lane.

Sums have a fixed order: lanes sum over a program's rows, a tree sums a program's lanes, and a second kernel reduces the
programs' partial sums, in float64. A program that sees all of a channel writes the gradients itself. A third kernel, also in
float64, reduces the gradients of parameters that several channels or groups share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any, cast

import triton
import triton.language as tl

EXACT = tl.constexpr(0)
FAST = tl.constexpr(1)
DOUBLE = tl.constexpr(2)

SUMS = tl.constexpr(7)  # the op's own five, then those of the prologue's scale and shift


@dataclass(frozen=True)
class Math:
    """An op's scalar functions. PRECISION is one of the three above, ATTRS the op's attributes after channel_dim.

    name: of the op, as kernel names have it.
    precompute(params, PRECISION, ATTRS) -> constants        forward(w, constants, PRECISION, ATTRS) -> y
    gradients(w, dy, constants, PRECISION, ATTRS) -> (gradient of w, five terms of sums)
    parameter_gradients(params, sums, ATTRS) -> gradients of params
    fallbacks: values of absent parameters. sums: for each parameter, a mask of the sums that its gradient needs.
    prologue: whether parameters 3 and 4 are a scale and a shift before the op. factor: whether the result is multiplied by a
    second tensor.
    """

    name: str
    precompute: Any
    forward: Any
    gradients: Any
    parameter_gradients: Any
    fallbacks: tuple[float, ...]
    sums: tuple[int, ...]
    prologue: bool
    factor: bool = False

    @cached_property
    def channelwise_kernel(self) -> Any:
        return _kernel(channelwise_kernel, self)

    @cached_property
    def reduce_partials_kernel(self) -> Any:
        return _kernel(reduce_partials_kernel, self)


# Placeholders in the skeletons, replaced by an op's scalar functions in `_kernel`.
precompute = forward = gradients = parameter_gradients = cast(Any, None)


def _kernel(skeleton: Any, math: Math) -> Any:
    """The skeleton as a kernel of one op, whose scalar functions become its globals."""
    functions = {
        "precompute": math.precompute,
        "forward": math.forward,
        "gradients": math.gradients,
        "parameter_gradients": math.parameter_gradients,
    }
    kernel = FunctionType(skeleton.__code__, skeleton.__globals__ | functions, skeleton.__name__)
    kernel.__annotations__, kernel.__doc__ = skeleton.__annotations__, skeleton.__doc__

    def name(specialization: Any) -> str:
        """The name in profilers, such as ``ctu_forward_channelwise_kernel``."""
        direction = "forward" if specialization.constants.get("dy", 0) is None else "backward"
        return f"{math.name}_{direction}_{skeleton.__name__}"

    return triton.jit(kernel, repr=name)


@triton.constexpr_function
def _rank(sum_mask: int, i: int) -> int:
    """Number of sums in the mask before sum i."""
    return bin(sum_mask & ((1 << i) - 1)).count("1")


@triton.jit
def _param(
    p, v, g, c, channels, mask, number: tl.constexpr, fallback: tl.constexpr, rows: tl.constexpr, run: tl.constexpr
):
    """Loads a parameter for channel c of group g: v if it is a number, ``fallback`` if it is absent. run: channels that share a
    value; 0: all of them. rows: group g uses row g % rows; 0: a row per group."""
    if number:
        return (c * 0).to(tl.float64) + v
    elif p is None:
        return (c * 0).to(tl.float32) + fallback
    else:
        at = c * 0
        if run:
            at = c // run
        if rows != 1:
            at += (g % rows if rows else g) * (channels // run if run else 1)
        return tl.load(p + at, mask=mask, other=fallback)


@triton.jit
def _params(
    p0, p1, p2, p3, p4, v0, v1, v2, v3, v4, g, c, channels, mask,
    NUMBERS: tl.constexpr, FALLBACKS: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    return (
        _param(p0, v0, g, c, channels, mask, NUMBERS >> 0 & 1, FALLBACKS[0], ROWS[0], RUNS[0]),
        _param(p1, v1, g, c, channels, mask, NUMBERS >> 1 & 1, FALLBACKS[1], ROWS[1], RUNS[1]),
        _param(p2, v2, g, c, channels, mask, NUMBERS >> 2 & 1, FALLBACKS[2], ROWS[2], RUNS[2]),
        _param(p3, v3, g, c, channels, mask, NUMBERS >> 3 & 1, FALLBACKS[3], ROWS[3], RUNS[3]),
        _param(p4, v4, g, c, channels, mask, NUMBERS >> 4 & 1, FALLBACKS[4], ROWS[4], RUNS[4]),
    )


@triton.jit
def _put(d, value, at, mask):
    """Stores a gradient unless its pointer is null (not requested)."""
    if d is not None:
        tl.store(d + at, value.to(d.dtype.element_ty), mask=mask)


@triton.jit
def _store(d0, d1, d2, d3, d4, grads, at, mask):
    """Parameter gradients; ``at`` is their index as [group, channel]."""
    _put(d0, grads[0], at, mask)
    _put(d1, grads[1], at, mask)
    _put(d2, grads[2], at, mask)
    _put(d3, grads[3], at, mask)
    _put(d4, grads[4], at, mask)


@triton.jit
def _tile(
    channels, inner, row_units, rows, row_cuts, rows_per, col_cuts, cols_per, PLANE: tl.constexpr, UNIT: tl.constexpr
):
    """This program's tile. Lengths are in units of UNIT values, which tells the compiler what divides them."""
    pid = tl.program_id(0)
    col_cut = pid % col_cuts
    pid = pid // col_cuts
    row_cut = pid % row_cuts
    pid = pid // row_cuts
    plane = pid * 0
    if PLANE:
        plane = pid % channels
        pid = pid // channels
    if PLANE:  # a plane may have more than 2^31 values; a period may not
        begin = col_cut.to(tl.int64) * cols_per
        end = tl.minimum(begin + cols_per, inner)
    else:
        begin = col_cut * cols_per
        end = tl.minimum(begin + cols_per, row_units)
    first = row_cut * rows_per
    return pid, plane, row_cut, row_cut * col_cuts + col_cut, begin, end, first, tl.minimum(first + rows_per, rows)


@triton.jit
def _channel(plane, cols, channels, inner, PLANE: tl.constexpr, WRAP: tl.constexpr, UNIT: tl.constexpr):
    """The channel of this program, or of each lane."""
    if PLANE:
        return plane
    else:
        c = cols // inner
        return c % channels if WRAP else c


@triton.jit
def _number(v, DOUBLES: tl.constexpr):
    return v.to(tl.float64) if DOUBLES else v.to(tl.float32)


@triton.jit
def _add(total, term, SUM_MASK: tl.constexpr, i: tl.constexpr):
    return total + term if SUM_MASK >> i & 1 else total


def channelwise_kernel(
    x, residual, factor, dy, out, dresidual, dfactor, partial, p0, p1, p2, p3, p4,
    v0: tl.float64, v1: tl.float64, v2: tl.float64, v3: tl.float64, v4: tl.float64, d0, d1, d2, d3, d4,
    channels, inner, row_units, rows, row_cuts, rows_per, col_cuts, cols_per, group_units,
    ATTRS: tl.constexpr, NUMBERS: tl.constexpr, FALLBACKS: tl.constexpr, PROLOGUE: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr, SUM_MASK: tl.constexpr, PACKED: tl.constexpr,
    PLANE: tl.constexpr, WRAP: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out = op(x) or, with ``dy``, the gradient of x. SUM_MASK: the sums to compute, stored to ``partial``; if that is null, this
    program sees all of a channel and writes the parameter gradients, d0 to d4. Null outputs are not computed. PACKED: rows of
    x and of the factor alternate, and so do those of their gradients."""
    DOUBLES: tl.constexpr = PRECISION == 2
    HAS_SCALE: tl.constexpr = PROLOGUE and (p3 is not None or NUMBERS >> 3 & 1 == 1)
    HAS_SHIFT: tl.constexpr = PROLOGUE and (p4 is not None or NUMBERS >> 4 & 1 == 1)
    inner_units = inner // UNIT if PLANE else inner
    g, plane, row_cut, slot, begin, end, first, last = _tile(
        channels, inner_units, row_units, rows, row_cuts, rows_per, col_cuts, cols_per, PLANE, UNIT
    )
    lane = tl.arange(0, LANES)
    cols = begin * UNIT + lane
    c = _channel(plane, cols, channels, inner, PLANE, WRAP, UNIT)
    known = c < channels
    p = _params(p0, p1, p2, p3, p4, v0, v1, v2, v3, v4, g, c, channels, known, NUMBERS, FALLBACKS, ROWS, RUNS)
    k = precompute(p, PRECISION, ATTRS)
    scale, shift = _number(p[3], DOUBLES), _number(p[4], DOUBLES)
    zero = tl.zeros([LANES], tl.float64 if DOUBLES else tl.float32)
    s = (zero, zero, zero, zero, zero, zero, zero)
    for row in tl.range(first, last):
        start = g.to(tl.int64) * group_units + row.to(tl.int64) * row_units
        packed_offset = start  # a packed x has twice as many values before this row
        if PLANE:
            start += plane * inner_units
        for step in tl.range(begin, end, LANES // UNIT):
            at = (start + step) * UNIT
            x_at = at
            if PACKED:
                x_at += packed_offset * UNIT
            live = lane < (end - step) * UNIT
            if WRAP:
                live = live & (lane < (group_units - row.to(tl.int64) * row_units - step) * UNIT)
            v = _number(tl.load(x + x_at + lane, mask=live, other=0.0), DOUBLES)
            w = v
            if HAS_SCALE:
                w = w * scale
            if HAS_SHIFT:
                w = w + shift
            if residual is not None:
                w = w + _number(tl.load(residual + at + lane, mask=live, other=0.0), DOUBLES)
            if PACKED:
                f = _number(tl.load(x + x_at + row_units * UNIT + lane, mask=live, other=0.0), DOUBLES)
            elif FACTOR:
                f = _number(tl.load(factor + at + lane, mask=live, other=0.0), DOUBLES)
            if dy is None:
                result = forward(w, k, PRECISION, ATTRS)
                if FACTOR:
                    result = result * f
            else:
                up = _number(tl.load(dy + at + lane, mask=live, other=0.0), DOUBLES)
                if FACTOR:
                    df = up * forward(w, k, PRECISION, ATTRS)
                    up = up * f
                    if PACKED:
                        if out is not None:
                            to = out + x_at + row_units * UNIT + lane
                            tl.store(to, df.to(out.dtype.element_ty), mask=live)
                    elif dfactor is not None:
                        tl.store(dfactor + at + lane, df.to(dfactor.dtype.element_ty), mask=live)
                result, t0, t1, t2, t3, t4 = gradients(w, up, k, PRECISION, ATTRS)
                if dresidual is not None:
                    tl.store(dresidual + at + lane, result.to(dresidual.dtype.element_ty), mask=live)
                s = (
                    _add(s[0], t0, SUM_MASK, 0),
                    _add(s[1], t1, SUM_MASK, 1),
                    _add(s[2], t2, SUM_MASK, 2),
                    _add(s[3], t3, SUM_MASK, 3),
                    _add(s[4], t4, SUM_MASK, 4),
                    _add(s[5], result * v, SUM_MASK, 5),
                    _add(s[6], result, SUM_MASK, 6),
                )
                if HAS_SCALE:
                    result = result * scale
            if out is not None:
                to = out + (at if dy is None else x_at) + lane
                tl.store(to, result.to(out.dtype.element_ty), mask=live)
    if SUM_MASK:
        if PLANE:
            s = (
                tl.sum(s[0], 0),
                tl.sum(s[1], 0),
                tl.sum(s[2], 0),
                tl.sum(s[3], 0),
                tl.sum(s[4], 0),
                tl.sum(s[5], 0),
                tl.sum(s[6], 0),
            )
            mask, column, length, slots = known, plane, channels, row_cuts * col_cuts
        else:
            mask, column, length, slots, slot = cols < row_units * UNIT, cols, row_units * UNIT, row_cuts, row_cut
        if partial is not None:
            to = partial + (g.to(tl.int64) * slots + slot) * _rank(SUM_MASK, SUMS) * length + column
            for i in tl.static_range(SUMS):
                if SUM_MASK >> i & 1:
                    tl.store(to + _rank(SUM_MASK, i) * length, s[i], mask=mask)
        else:
            _store(d0, d1, d2, d3, d4, parameter_gradients(p, s, ATTRS), g * channels + c, mask)


@triton.jit
def _total(total, partial, at, length, live, SUM_MASK: tl.constexpr, i: tl.constexpr):
    """Adds the terms of sum i to ``total``."""
    if SUM_MASK >> i & 1:
        return total + tl.load(partial + at + _rank(SUM_MASK, i) * length, mask=live, other=0.0).to(tl.float64)
    else:
        return total


def reduce_partials_kernel(
    partial, p0, p1, p2, p3, p4,
    v0: tl.float64, v1: tl.float64, v2: tl.float64, v3: tl.float64, v4: tl.float64, d0, d1, d2, d3, d4,
    channels, inner, length, slots, repeat,
    ATTRS: tl.constexpr, NUMBERS: tl.constexpr, FALLBACKS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, SUM_MASK: tl.constexpr, TERMS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """partial[group, slot, sum, repeat, channel, inner] -> gradients[group, channel]. TERMS x LANES: terms x channels."""
    blocks = tl.cdiv(channels, LANES)
    g, c = tl.program_id(0) // blocks, tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    known = c < channels
    zero = tl.zeros([TERMS, LANES], tl.float64)
    s = (zero, zero, zero, zero, zero, zero, zero)
    terms = slots * repeat * inner
    for begin in tl.range(0, terms, TERMS):
        term = begin + tl.arange(0, TERMS)
        i, r, slot = term % inner, term // inner % repeat, term // (inner * repeat)
        at = (
            (g.to(tl.int64) * slots + slot[:, None]) * _rank(SUM_MASK, SUMS) * length
            + (r[:, None] * channels + c[None, :]) * inner
            + i[:, None]
        )
        live = (term < terms)[:, None] & known[None, :]
        s = (
            _total(s[0], partial, at, length, live, SUM_MASK, 0),
            _total(s[1], partial, at, length, live, SUM_MASK, 1),
            _total(s[2], partial, at, length, live, SUM_MASK, 2),
            _total(s[3], partial, at, length, live, SUM_MASK, 3),
            _total(s[4], partial, at, length, live, SUM_MASK, 4),
            _total(s[5], partial, at, length, live, SUM_MASK, 5),
            _total(s[6], partial, at, length, live, SUM_MASK, 6),
        )
    sums = (
        tl.sum(s[0], 0),
        tl.sum(s[1], 0),
        tl.sum(s[2], 0),
        tl.sum(s[3], 0),
        tl.sum(s[4], 0),
        tl.sum(s[5], 0),
        tl.sum(s[6], 0),
    )
    p = _params(p0, p1, p2, p3, p4, v0, v1, v2, v3, v4, g, c, channels, known, NUMBERS, FALLBACKS, ROWS, RUNS)
    _store(d0, d1, d2, d3, d4, parameter_gradients(p, sums, ATTRS), g * channels + c, known)


@triton.jit
def _reduce_shared(b, d, groups, channels, rows: tl.constexpr, run: tl.constexpr, LANES: tl.constexpr):
    """d[row, value] = sum of b[group, channel] over the groups of the row and the channels of the value."""
    if d is not None:
        row_count = rows if rows else groups
        shared = run if run else channels
        count = channels // shared
        row, value = tl.program_id(0) // count, tl.program_id(0) % count
        if row < row_count:
            total = tl.zeros([LANES], tl.float64)
            terms = groups // row_count * shared
            for begin in tl.range(0, terms, LANES):
                term = begin + tl.arange(0, LANES)
                g, c = row + term // shared * row_count, value * shared + term % shared
                total += tl.load(b + g.to(tl.int64) * channels + c, mask=term < terms, other=0.0)
            tl.store(d + tl.program_id(0), tl.sum(total, 0).to(d.dtype.element_ty))


@triton.jit
def reduce_shared_kernel(
    b0, b1, b2, b3, b4, d0, d1, d2, d3, d4, groups, channels,
    ROWS: tl.constexpr, RUNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """b[group, channel], in float64 -> gradients d of the parameters that groups or channels share."""
    _reduce_shared(b0, d0, groups, channels, ROWS[0], RUNS[0], LANES)
    _reduce_shared(b1, d1, groups, channels, ROWS[1], RUNS[1], LANES)
    _reduce_shared(b2, d2, groups, channels, ROWS[2], RUNS[2], LANES)
    _reduce_shared(b3, d3, groups, channels, ROWS[3], RUNS[3], LANES)
    _reduce_shared(b4, d4, groups, channels, ROWS[4], RUNS[4], LANES)
