"""Bit instructions: logic, shifts, fields, permutations, counts."""

from __future__ import annotations

import numpy as np

from .decode import Instruction, Step, elementwise, handles
from .integer import INTS
from .values import RAW, TYPES, U32, U64

BITS = "b16 b32 b64"


@handles("and or xor", BITS)
def logic(i: Instruction) -> Step:
    """Bitwise and, or, xor."""
    i.arity(3)
    return elementwise(i, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.opcode])


@handles("and or xor", "pred")
def logic_pred(i: Instruction) -> Step:
    """The same on predicates."""
    i.arity(3)
    a, b, write = i.predicate(1), i.predicate(2), i.dest(0, "pred")
    function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.opcode]
    return lambda m: write(m, function(a(m), b(m)))


@handles("not", BITS)
def invert(i: Instruction) -> Step:
    """Bitwise not."""
    i.arity(2)
    return elementwise(i, np.invert)


@handles("not", "pred")
def invert_pred(i: Instruction) -> Step:
    """not of a predicate."""
    i.arity(2)
    a, write = i.predicate(1), i.dest(0, "pred")
    return lambda m: write(m, ~a(m))


@handles("cnot", BITS)
def cnot(i: Instruction) -> Step:
    """1 for zero, 0 otherwise."""
    i.arity(2)
    return elementwise(i, lambda a: (a == 0).astype(a.dtype))


@handles("shl", BITS)
def shl(i: Instruction) -> Step:
    """Shift left; counts of the width and more give zero."""
    i.arity(3)
    bits = 8 * TYPES[i.type].size

    def shift(a: np.ndarray, n: np.ndarray) -> np.ndarray:
        return np.where(n < bits, a << (n & U32(bits - 1)).astype(a.dtype), a.dtype.type(0))

    return elementwise(i, shift, i.type, "u32")


@handles("shr", INTS + " " + BITS)
def shr(i: Instruction) -> Step:
    """Shift right, filling with the sign for signed types."""
    i.arity(3)
    bits = 8 * TYPES[i.type].size

    def shift(a: np.ndarray, n: np.ndarray) -> np.ndarray:
        if a.dtype.kind == "i":
            return a >> np.minimum(n, U32(bits - 1)).astype(a.dtype)
        return np.where(n < bits, a >> (n & U32(bits - 1)).astype(a.dtype), a.dtype.type(0))

    return elementwise(i, shift, i.type, "u32")


@handles("shf", "b32")
def funnel(i: Instruction) -> Step:
    """Funnel shift of the 64-bit b:a."""
    i.arity(4)
    left, clamp = i.need("l", "r") == "l", i.need("clamp", "wrap") == "clamp"

    def shift(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        n = (np.minimum(c, U32(32)) if clamp else c & U32(31)).astype(U64)
        wide = a.astype(U64) | (b.astype(U64) << U64(32))
        return (((wide << n) >> U64(32)) if left else (wide >> n)).astype(U32)

    return elementwise(i, shift, "b32", "b32", "u32")


@handles("prmt", "b32")
def permute(i: Instruction) -> Step:
    """Pick four bytes (or replicated signs) out of eight."""
    i.arity(4)
    mode = i.choice("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")

    def selectors(c: np.ndarray) -> list[np.ndarray]:
        if mode is None:
            return [(c >> U32(4 * k)) & U32(15) for k in range(4)]
        n = (c & U32(3)).astype(np.int64)
        table = {
            "f4e": lambda s, k: s + k,
            "b4e": lambda s, k: (s - k) % 8,
            "rc8": lambda s, k: s,
            "ecl": lambda s, k: max(s, k),
            "ecr": lambda s, k: min(s, k),
            "rc16": lambda s, k: (s % 2) * 2 + k % 2,
        }[mode]
        return [np.array([table(s, k) for s in range(4)], U32)[n] for k in range(4)]

    def pick(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        wide = a.astype(U64) | (b.astype(U64) << U64(32))
        out = U32(0)
        for k, s in enumerate(selectors(c)):
            byte = ((wide >> ((s & U32(7)).astype(U64) * U64(8))) & U64(255)).astype(U32)
            byte = np.where(s & U32(8), np.where(byte & U32(128), U32(255), U32(0)), byte)
            out = out | (byte << U32(8 * k))
        return out

    return elementwise(i, pick)


@handles("lop3", "b32")
def lop3(i: Instruction) -> Step:
    """Any function of three bits, given as its truth table."""
    i.arity(5)
    table = i.constant(4)
    if not 0 <= table < 256:
        raise i.unsupported("truth table")
    write, reads = i.dest(0, "b32"), [i.source(k, "b32") for k in (1, 2, 3)]

    def step(m) -> None:
        a, b, c = (r(m) for r in reads)
        out = np.zeros(1, U32)
        for k in range(8):
            if table >> k & 1:
                out = out | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
        write(m, out)

    return step


@handles("popc", "b32 b64")
def popc(i: Instruction) -> Step:
    """Number of set bits."""
    return elementwise(i, lambda a: np.bitwise_count(a).astype(U32), i.type, result="u32")


def top_bit(a: np.ndarray) -> np.ndarray:
    """Index of the highest set bit of an unsigned array, -1 for zero."""
    out = np.full(a.shape, -1, np.int32)
    rest = a.copy()
    for step in (32, 16, 8, 4, 2, 1):
        if step >= 8 * a.itemsize:
            continue
        big = rest >> a.dtype.type(step) != 0
        out += np.where(big, step, 0).astype(np.int32)
        rest = np.where(big, rest >> a.dtype.type(step), rest)
    return out + (a != 0).astype(np.int32)


@handles("clz", "b32 b64")
def clz(i: Instruction) -> Step:
    """Leading zeros."""
    bits = 8 * TYPES[i.type].size
    return elementwise(i, lambda a: (bits - 1 - top_bit(a)).astype(U32), i.type, result="u32")


@handles("bfind", "u32 s32 u64 s64")
def bfind(i: Instruction) -> Step:
    """Highest bit that differs from the sign; all ones when there is none."""
    bits, shift = 8 * TYPES[i.type].size, i.flag("shiftamt")

    def find(a: np.ndarray) -> np.ndarray:
        top = top_bit(np.where(a < 0, ~a, a).view(RAW[a.itemsize]))
        return np.where(top < 0, top, bits - 1 - top if shift else top).astype(np.int32).view(U32)

    return elementwise(i, find, i.type, result="u32")


def reverse_bits(a: np.ndarray) -> np.ndarray:
    """brev."""
    out = a.byteswap()
    for mask, shift in ((0x0F, 4), (0x33, 2), (0x55, 1)):
        pattern = a.dtype.type(int(f"{mask:02x}" * a.itemsize, 16))
        out = ((out & pattern) << a.dtype.type(shift)) | ((out >> a.dtype.type(shift)) & pattern)
    return out


@handles("brev", "b32 b64")
def brev(i: Instruction) -> Step:
    """Bits in reverse order."""
    return elementwise(i, reverse_bits)


@handles("bfe", "u32 s32 u64 s64")
def bfe(i: Instruction) -> Step:
    """Extract a bit field; the sign bit is that of the field (or of the value where the field runs past it)."""
    i.arity(4)
    bits = 8 * TYPES[i.type].size

    def extract(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        raw = RAW[a.itemsize]
        pos, length = (b & U32(255)).astype(np.int64), (c & U32(255)).astype(np.int64)
        shifted = np.where(pos < bits, a.view(raw) >> np.minimum(pos, bits - 1).astype(raw), raw(0))
        low = np.where(length >= bits, ~raw(0), (raw(1) << np.minimum(length, bits - 1).astype(raw)) - raw(1))
        field = shifted & low
        if a.dtype.kind == "i":
            last = np.minimum(pos + length - 1, bits - 1)
            sign = (length > 0) & ((a.view(raw) >> np.maximum(last, 0).astype(raw)) & raw(1)).astype(bool)
            width = np.clip(np.minimum(length, bits - pos), 0, bits - 1)
            fill = np.where((length >= bits) & (pos == 0), raw(0), ~raw(0) << width.astype(raw))
            field = np.where(sign, field | fill, field)
        return field.view(a.dtype)

    return elementwise(i, extract, i.type, "u32", "u32")


@handles("bfi", "b32 b64")
def bfi(i: Instruction) -> Step:
    """Insert the low bits of a into b."""
    i.arity(5)
    bits = 8 * TYPES[i.type].size

    def insert(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        raw = a.dtype.type
        pos, length = (c & U32(255)).astype(np.int64), (d & U32(255)).astype(np.int64)
        low = np.where(length >= bits, ~raw(0), (raw(1) << np.minimum(length, bits - 1).astype(raw)) - raw(1))
        at = np.minimum(pos, bits - 1).astype(raw)
        mask = np.where(pos < bits, low << at, raw(0))
        return (b & ~mask) | ((a << at) & mask)

    return elementwise(i, insert, i.type, i.type, "u32", "u32")


@handles("bmsk", "b32")
def bmsk(i: Instruction) -> Step:
    """A mask of b bits starting at bit a."""
    i.arity(3)
    clamp = i.need("clamp", "wrap") == "clamp"

    def mask(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        pos, length = (np.minimum(v, U32(32)) if clamp else v & U32(31) for v in (a, b))
        wide = ((U64(1) << length.astype(U64)) - U64(1)) << pos.astype(U64)
        return wide.astype(U32)

    return elementwise(i, mask, "u32", "u32")


@handles("szext", "u32 s32")
def szext(i: Instruction) -> Step:
    """Zero- or sign-extend the low b bits."""
    i.arity(3)
    clamp = i.need("clamp", "wrap") == "clamp"

    def extend(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        n = np.minimum(b, U32(32)) if clamp else b & U32(31)
        up = (U32(32) - n).astype(U64)
        low = ((a.view(U32).astype(U64) << up) & U64(0xFFFFFFFF)).astype(U32)
        back = low.view(a.dtype).astype(np.int64) >> up.astype(np.int64)
        return back.astype(a.dtype)

    return elementwise(i, extend, i.type, "u32")


@handles("fns", "b32")
def fns(i: Instruction) -> Step:
    """Position of the n-th set bit counted from a base, up or down."""
    i.arity(4)

    def find(mask: int, base: int, offset: int) -> int:
        if offset == 0:
            return base if mask >> base & 1 else 0xFFFFFFFF
        walk = range(base, 32) if offset > 0 else range(base, -1, -1)
        left = abs(offset)
        for position in walk:
            if mask >> position & 1:
                left -= 1
                if left == 0:
                    return position
        return 0xFFFFFFFF

    def each(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        rows = np.broadcast(a, b, c)
        return np.array([find(int(x), int(y) & 31, int(z)) for x, y, z in rows], U32)

    return elementwise(i, each, "b32", "u32", "s32", result="b32")


@handles("dp4a", "u32 s32")
def dp4a(i: Instruction) -> Step:
    """Dot product of four bytes plus c; the first type is that of a, the second that of b."""
    i.arity(4)
    first = i.need("u32", "s32")
    types = [np.uint8 if t == "u32" else np.int8 for t in (first, i.type)]
    result = "s32" if "s32" in (first, i.type) else "u32"

    def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        a, b = np.broadcast_arrays(a, b)
        x, y = (np.ascontiguousarray(v).view(t).reshape(-1, 4).astype(np.int64) for v, t in zip((a, b), types))
        return ((x * y).sum(1) + c).astype(np.int64).astype(U32)

    return elementwise(i, dot, "b32", "b32", result, result=result)
