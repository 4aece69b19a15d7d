"""Triton kernels for the executor's own tests. Import only where Triton is installed."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def gate(x, y, scale, channels, inner, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    s = tl.load(scale + (i // inner) % channels, mask=m, other=1.0)
    v = tl.load(x + i, mask=m, other=0.0).to(tl.float32)
    tl.store(y + i, (s * v * tl.sigmoid(v) + libdevice.log1p(tl.exp(-tl.abs(v)))).to(y.dtype.element_ty), mask=m)


@triton.jit
def double_math(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    v = tl.load(x + i, mask=m, other=1.0)
    tl.store(y + i, libdevice.exp(-v * v) / (1.0 + tl.sqrt(tl.abs(v))) + libdevice.tanh(v), mask=m)


@triton.jit
def row_sums(x, partial, columns, splits, BLOCK: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(part * BLOCK, columns, splits * BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * columns + i, mask=i < columns, other=0.0).to(tl.float32)
    tl.store(partial + row * splits + part, tl.sum(total, 0))


@triton.jit
def finish(partial, out, splits, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(partial + tl.program_id(0) * splits + i, mask=i < splits, other=0.0)
    tl.store(out + tl.program_id(0), tl.sum(v, 0))


@triton.jit
def last_program(x, partial, counter, out, ORDERED: tl.constexpr, BLOCK: tl.constexpr):
    """The last program to arrive adds up the columns of all, in their order. The counter is left at zero."""
    lane = tl.arange(0, BLOCK)
    at = tl.program_id(0) * BLOCK + lane
    tl.store(partial + at, 2 * tl.load(x + at))
    if ORDERED:
        tl.debug_barrier()  # the atomic is one thread's: it publishes what a barrier has ordered before it
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.range(tl.num_programs(0)):
            total += tl.load(partial + i * BLOCK + lane)
        tl.store(out + lane, total)
        tl.store(counter, 0)


@triton.jit
def noise(out, seed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.randint(seed, i), mask=i < n)


@triton.jit
def attention(q, k, v, o, length, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    rows, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    mine = rows[:, None] < length
    qs = tl.load(q + rows[:, None] * D + d[None, :], mask=mine, other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    weight = tl.zeros([M], tl.float32)
    total = tl.zeros([M, D], tl.float32)
    for start in range(0, length, N):
        cols = start + tl.arange(0, N)
        here = cols[:, None] < length
        ks = tl.load(k + cols[:, None] * D + d[None, :], mask=here, other=0.0)
        vs = tl.load(v + cols[:, None] * D + d[None, :], mask=here, other=0.0)
        score = tl.where(cols[None, :] < length, tl.dot(qs, tl.trans(ks)) * 0.125, float("-inf"))
        peak = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - peak[:, None])
        keep = tl.exp(top - peak)
        weight = weight * keep + tl.sum(p, 1)
        total = total * keep[:, None] + tl.dot(p.to(vs.dtype), vs)
        top = peak
    tl.store(o + rows[:, None] * D + d[None, :], (total / weight[:, None]).to(o.dtype.element_ty), mask=mine)
