"""Integer arithmetic."""

from __future__ import annotations

from functools import partial

import numpy as np

from .decode import Instruction, Step, elementwise, handles
from .values import RAW, SIGNED, TYPES, U64

INTS = "u16 s16 u32 s32 u64 s64"


def saturating(op: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """add.sat and sub.sat of s32."""
    wide = a.astype(np.int64) + b if op == "add" else a.astype(np.int64) - b
    return np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32)


@handles("add sub", INTS)
def add(i: Instruction) -> Step:
    """add, sub, with .sat for s32 and .cc for 32 and 64 bits."""
    i.arity(3)
    if i.flag("cc"):
        return carry(i, use=False)
    if i.type == "s32" and i.flag("sat"):
        return elementwise(i, partial(saturating, i.opcode))
    return elementwise(i, np.add if i.opcode == "add" else np.subtract)


@handles("addc subc", "u32 s32 u64 s64")
def add_carry(i: Instruction) -> Step:
    """The middle and end of a carry chain."""
    i.arity(3)
    return carry(i, use=True, keep=not i.flag("cc"))


def carry(i: Instruction, use: bool, keep: bool = False) -> Step:
    """add/sub with carry (borrow) out, and in when `use`; `keep` leaves the flag as it is."""
    raw, size = "b64" if i.type.endswith("64") else "b32", TYPES[i.type].size
    a, b, write, sub = i.source(1, raw), i.source(2, raw), i.dest(0, raw), i.opcode.startswith("sub")
    dtype = RAW[size]

    def step(m) -> None:
        x, y = np.broadcast_arrays(a(m), b(m))
        c = m.carry[m.lanes] if use else np.zeros(1, bool)
        if sub:
            out = x - y - c.astype(dtype)
            flag = (x < y) | ((x == y) & c)
        else:
            out = x + y + c.astype(dtype)
            flag = (out < x) | ((out == x) & c & (y == dtype(2 ** (8 * size) - 1)))
        if not keep:
            m.carry[m.lanes] = flag
        write(m, out)

    return step


def mul_hi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper half of the double-width product."""
    size = a.itemsize
    if size < 8:
        wide = (SIGNED if a.dtype.kind == "i" else RAW)[2 * size]
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    x, y, low = a.view(U64), b.view(U64), U64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> U64(32), y & low, y >> U64(32)
    middle = x1 * y0 + ((x0 * y0) >> U64(32))
    cross = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> U64(32)) + (cross >> U64(32))
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.view(a.dtype)


def mul_wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Double-width product."""
    wide = (SIGNED if a.dtype.kind == "i" else RAW)[2 * a.itemsize]
    return a.astype(wide) * b.astype(wide)


def low24(a: np.ndarray) -> np.ndarray:
    """Low 24 bits, sign-extended for signed types."""
    return (a << a.dtype.type(8)) >> a.dtype.type(8)


def mul24_hi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper 32 of the 48 bits of a 24-bit product."""
    wide = np.int64 if a.dtype.kind == "i" else U64
    return ((low24(a).astype(wide) * low24(b).astype(wide)) >> wide(16)).astype(a.dtype)


@handles("mul mad", INTS)
def multiply(i: Instruction) -> Step:
    """mul and mad with .lo, .hi, .wide; mad.lo.cc and mad.hi.cc start a carry chain."""
    half = i.need("lo", "hi", "wide")
    mad = i.opcode == "mad"
    i.arity(4 if mad else 3)
    t = TYPES[i.type]
    if half == "wide":
        if t.size == 8:
            raise i.unsupported()
        wide = f"{t.kind}{16 * t.size}"
        if not mad:
            return elementwise(i, mul_wide, result=wide)
        return elementwise(i, lambda a, b, c: mul_wide(a, b) + c, i.type, i.type, wide, result=wide)
    product = mul_hi if half == "hi" else np.multiply
    if not mad:
        return elementwise(i, product)
    if i.flag("cc"):
        return mad_carry(i, product, use=False)
    if i.type == "s32" and half == "hi" and i.flag("sat"):
        return elementwise(i, lambda a, b, c: saturating("add", mul_hi(a, b), c))
    return elementwise(i, lambda a, b, c: product(a, b) + c)


@handles("madc", "u32 s32 u64 s64")
def multiply_carry(i: Instruction) -> Step:
    """mad with carry in."""
    i.arity(4)
    product = mul_hi if i.need("lo", "hi") == "hi" else np.multiply
    return mad_carry(i, product, use=True, keep=not i.flag("cc"))


def mad_carry(i: Instruction, product, use: bool, keep: bool = False) -> Step:
    """product(a, b) + c with carry out."""
    size, t = TYPES[i.type].size, i.type
    a, b, c, write = i.source(1, t), i.source(2, t), i.source(3, t), i.dest(0, t)
    raw = RAW[size]

    def step(m) -> None:
        x, y = np.broadcast_arrays(product(a(m), b(m)).view(raw), c(m).view(raw))
        flag_in = m.carry[m.lanes] if use else np.zeros(1, bool)
        out = x + y + flag_in.astype(raw)
        if not keep:
            m.carry[m.lanes] = (out < x) | ((out == x) & flag_in & (y == raw(2 ** (8 * size) - 1)))
        write(m, out)

    return step


@handles("mul24 mad24", "u32 s32")
def multiply24(i: Instruction) -> Step:
    """24-bit products."""
    hi = i.need("lo", "hi") == "hi"
    product = mul24_hi if hi else lambda a, b: low24(a) * low24(b)
    i.arity(4 if i.opcode == "mad24" else 3)
    if i.opcode == "mul24":
        return elementwise(i, product)
    return elementwise(i, lambda a, b, c: product(a, b) + c)


@handles("sad", INTS)
def sad(i: Instruction) -> Step:
    """c + |a - b|."""
    i.arity(4)
    return elementwise(i, lambda a, b, c: c + np.where(a < b, b - a, a - b))


def divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    """Truncating division. Division by zero is unspecified on the device; here it gives all ones (rem: a)."""
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        raw = RAW[a.itemsize]
        ua, ub = np.where(a < 0, -a, a).view(raw), np.where(safe < 0, -safe, safe).view(raw)
        q = (ua // ub).view(a.dtype)
        q = np.where((a < 0) != (safe < 0), -q, q)
    else:
        q = a // safe
    if remainder:
        return np.where(zero, a, a - q * safe)
    return np.where(zero, ~np.zeros(1, a.dtype), q)


@handles("div", INTS)
def div(i: Instruction) -> Step:
    """Integer division."""
    i.arity(3)
    return elementwise(i, partial(divide, remainder=False))


@handles("rem", INTS)
def rem(i: Instruction) -> Step:
    """Integer remainder."""
    i.arity(3)
    return elementwise(i, partial(divide, remainder=True))


@handles("abs neg", "s16 s32 s64")
def negate(i: Instruction) -> Step:
    """abs and neg; both wrap at the most negative value."""
    i.arity(2)
    return elementwise(i, np.negative if i.opcode == "neg" else np.abs)


@handles("min max", INTS)
def minmax(i: Instruction) -> Step:
    """Integer min and max, with .relu for s32."""
    i.arity(3)
    function = np.minimum if i.opcode == "min" else np.maximum
    if i.type == "s32" and i.flag("relu"):
        return elementwise(i, lambda a, b: np.maximum(function(a, b), np.int32(0)))
    return elementwise(i, function)
