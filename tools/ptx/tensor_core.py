"""mma.sync, ldmatrix, stmatrix and movmatrix on fragments spread over a warp.

Products are exact and summed in float64, then rounded once; the device's order of additions is not specified.
wgmma, tcgen05 and sparse or integer mma are refused.
"""

from __future__ import annotations

import numpy as np

from .decode import Collective, Instruction, handles
from .spaces import load, store
from .values import U16, U32, canonical, narrow, widen

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def fragment(m, reads: list, fmt: str) -> np.ndarray:
    """Registers of a fragment as float64 [warps, 32, elements]; 16-bit formats hold two elements a register."""
    columns = [m.rows(np.broadcast_to(r(m), (m.n,))) for r in reads]
    stacked = np.ascontiguousarray(np.stack(columns, -1))
    if fmt in ("f16", "bf16"):
        return widen(stacked.view(U16), fmt)
    return widen(stacked, "tf32") if fmt == "tf32" else stacked.astype(np.float64)


def a_positions(k: int, fmt: str) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each element of the 16 x k operand, [32, elements]."""
    if fmt == "tf32":
        e = np.arange(k // 2)
        return GROUP[:, None] + 8 * (e % 2), MEMBER[:, None] + 4 * (e // 2)
    e = np.arange(k // 2)
    return GROUP[:, None] + 8 * (e // 2 % 2), 2 * MEMBER[:, None] + e % 2 + 8 * (e // 4)


def b_positions(k: int, fmt: str) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each element of the k x 8 operand."""
    e = np.arange(k // 4)
    columns = np.broadcast_to(GROUP[:, None], (32, len(e)))
    if fmt == "tf32":
        return MEMBER[:, None] + 4 * e, columns
    return 2 * MEMBER[:, None] + e % 2 + 8 * (e // 2), columns


def c_positions() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each element of the 16 x 8 accumulator."""
    e = np.arange(4)
    return GROUP[:, None] + 8 * (e // 2), 2 * MEMBER[:, None] + e % 2


SHAPES = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16")}
SHAPES |= {("m16n8k8", "tf32"), ("m16n8k4", "tf32")}


@handles("mma", "f32 f16 f64")
def mma(i: Instruction) -> Collective:
    """D = A B + C."""
    i.need("sync")
    i.need("aligned")
    shape = i.need("m16n8k16", "m16n8k8", "m16n8k4", "m8n8k4")
    i.need("row")
    i.need("col")
    i.arity(4)
    if i.type == "f64" and shape == "m8n8k4":
        return mma_f64(i)
    rest = list(i.modifiers)
    i.modifiers.clear()
    if len(rest) != 3 or rest[1] != rest[2] or rest[0] != i.type or (shape, rest[1]) not in SHAPES:
        raise i.unsupported()
    fmt, accumulator, k = rest[1], i.type, int(shape.split("k")[1])
    if accumulator == "f16" and fmt != "f16":
        raise i.unsupported()
    c_type = "f32" if accumulator == "f32" else "b32"
    a, b = ([i.source(t, "b32") for t in i.vector(n)] for n in (1, 2))
    c, d = [i.source(t, c_type) for t in i.vector(3)], [i.dest(t, c_type) for t in i.vector(0)]
    per = 1 if fmt == "tf32" else 2
    if (len(a), len(b), len(c), len(d)) != (k // 2 // per, k // 4 // per, *(2 * [4 if accumulator == "f32" else 2])):
        raise i.unsupported("registers")
    at_a, at_b, at_c = a_positions(k, fmt), b_positions(k, fmt), c_positions()

    def step(m) -> None:
        warps = m.total // 32
        left, right, total = np.zeros((warps, 16, k)), np.zeros((warps, k, 8)), np.zeros((warps, 16, 8))
        left[:, at_a[0], at_a[1]] = fragment(m, a, fmt)
        right[:, at_b[0], at_b[1]] = fragment(m, b, fmt)
        total[:, at_c[0], at_c[1]] = fragment(m, c, accumulator)
        with np.errstate(all="ignore"):
            out = (left @ right + total)[:, at_c[0], at_c[1]].reshape(-1, 4)[m.lanes]
            if accumulator == "f32":
                columns = canonical(out.astype(np.float32))
            else:
                columns = np.ascontiguousarray(narrow(out, "f16")).view(U32)
        for n, write in enumerate(d):
            write(m, np.ascontiguousarray(columns[:, n]))

    return Collective(step, None)


def mma_f64(i: Instruction) -> Collective:
    """The fp64 8 x 8 x 4 product."""
    if i.modifiers != ["f64"] * 3:
        raise i.unsupported()
    i.modifiers.clear()
    names = [i.vector(n) for n in range(4)]
    if [len(v) for v in names] != [2, 1, 1, 2]:
        raise i.unsupported("registers")
    (a,), (b,), c = ([i.source(t, "f64") for t in names[n]] for n in (1, 2, 3))
    d = [i.dest(t, "f64") for t in names[0]]

    def step(m) -> None:
        warps = m.total // 32
        left, right, total = np.zeros((warps, 8, 4)), np.zeros((warps, 4, 8)), np.zeros((warps, 8, 8))
        left[:, GROUP, MEMBER] = m.rows(np.broadcast_to(a(m), (m.n,)))
        right[:, MEMBER, GROUP] = m.rows(np.broadcast_to(b(m), (m.n,)))
        for n, read in enumerate(c):
            total[:, GROUP, 2 * MEMBER + n] = m.rows(np.broadcast_to(read(m), (m.n,)))
        with np.errstate(all="ignore"):
            out = canonical(left @ right + total)
        for n, write in enumerate(d):
            write(m, out[:, GROUP, 2 * MEMBER + n].reshape(-1)[m.lanes])

    return Collective(step, None)


def tiles(i: Instruction) -> tuple[int, bool]:
    """Number of 8 x 8 matrices and whether they are transposed."""
    i.need("sync")
    i.need("aligned")
    i.need("m8n8")
    count = int(i.need("x1", "x2", "x4")[1:])
    transposed = i.flag("trans")
    i.need("shared", "shared::cta")
    i.arity(2)
    i.program.access(16)
    return count, transposed


def spread(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """[warps, 8, 8] halves to the register of each lane, [warps, 32]."""
    rows = rows.transpose(0, 2, 1) if transposed else rows
    low, high = rows[:, GROUP, 2 * MEMBER], rows[:, GROUP, 2 * MEMBER + 1]
    return low.astype(U32) | (high.astype(U32) << U32(16))


def collect(register: np.ndarray, transposed: bool) -> np.ndarray:
    """The inverse of `spread`."""
    out = np.zeros((len(register), 8, 8), U16)
    out[:, GROUP, 2 * MEMBER] = (register & U32(0xFFFF)).astype(U16)
    out[:, GROUP, 2 * MEMBER + 1] = (register >> U32(16)).astype(U16)
    return out.transpose(0, 2, 1) if transposed else out


@handles("ldmatrix", "b16")
def ldmatrix(i: Instruction) -> Collective:
    """Load 8 x 8 matrices; lanes 8n to 8n + 7 give the row addresses of matrix n."""
    count, transposed = tiles(i)
    address, _ = i.address(1)
    names = i.vector(0)
    if len(names) != count:
        raise i.unsupported("registers")
    writes = [i.dest(n, "b32") for n in names]

    def step(m) -> None:
        ids = m.ids
        where = np.broadcast_to(address(m), (m.n,)).reshape(-1, 32)
        values = []
        for n in range(count):
            lanes = slice(8 * n, 8 * n + 8)
            m.select(ids.reshape(-1, 32)[:, lanes].reshape(-1))
            data = load(m, "shared", where[:, lanes].reshape(-1), 16)
            values.append(spread(np.ascontiguousarray(data).view(U16).reshape(-1, 8, 8), transposed))
        m.select(ids)
        for write, value in zip(writes, values):
            write(m, value.reshape(-1))

    return Collective(step, None)


@handles("stmatrix", "b16")
def stmatrix(i: Instruction) -> Collective:
    """Store 8 x 8 matrices."""
    count, transposed = tiles(i)
    address, _ = i.address(0)
    names = i.vector(1)
    if len(names) != count:
        raise i.unsupported("registers")
    reads = [i.source(n, "b32") for n in names]

    def step(m) -> None:
        ids = m.ids
        where = np.broadcast_to(address(m), (m.n,)).reshape(-1, 32)
        values = [np.broadcast_to(r(m), (m.n,)).reshape(-1, 32) for r in reads]
        for n, value in enumerate(values):
            lanes = slice(8 * n, 8 * n + 8)
            m.select(ids.reshape(-1, 32)[:, lanes].reshape(-1))
            rows = np.ascontiguousarray(collect(value, transposed)).reshape(-1, 8)
            store(m, "shared", where[:, lanes].reshape(-1), rows.view(np.uint8))
        m.select(ids)

    return Collective(step, None)


@handles("movmatrix", "b16")
def movmatrix(i: Instruction) -> Collective:
    """Transpose an 8 x 8 matrix held by a warp."""
    i.need("sync")
    i.need("aligned")
    i.need("m8n8")
    i.need("trans")
    i.arity(2)
    read, write = i.source(1, "b32"), i.dest(0, "b32")

    def step(m) -> None:
        value = np.broadcast_to(read(m), (m.n,)).reshape(-1, 32)
        write(m, spread(collect(value, False), True).reshape(-1))

    return Collective(step, None)
