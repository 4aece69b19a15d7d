"""Fp16, bf16 and packed pairs (f16x2, bf16x2, f32x2): every operation rounded once, each half on its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Instruction, Step, elementwise, handles
from .floating import extreme, fused
from .values import RAW, U16, U32, canonical, flush, flush_half, narrow, sum_odd, widen

HALVES = "f16 bf16 f16x2 bf16x2"


def halves(raw: np.ndarray, size: int) -> list[np.ndarray]:
    """The parts of packed values, low one first. `size` is that of a part."""
    if raw.itemsize == size:
        return [raw]
    dtype = RAW[size]
    return [raw.astype(dtype), (raw >> raw.dtype.type(8 * size)).astype(dtype)]


def join(parts: list[np.ndarray]) -> np.ndarray:
    """The inverse of `halves`."""
    if len(parts) == 1:
        return parts[0]
    wide = RAW[2 * parts[0].itemsize]
    return parts[0].astype(wide) | (parts[1].astype(wide) << wide(8 * parts[0].itemsize))


def by_part(i: Instruction, function: Callable[..., np.ndarray], size: int = 2) -> Step:
    """Applies `function` (raw parts to raw part) to each part of packed operands."""

    def compute(*operands: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return join([function(*parts) for parts in zip(*[halves(o, size) for o in operands])])

    return elementwise(i, compute)


def clamp(x: np.ndarray, sat: bool, relu: bool) -> np.ndarray:
    """.sat and .relu of float64 values: NaN becomes 0 under .sat and stays NaN under .relu."""
    if sat:
        x = np.where(x > 0, np.minimum(x, 1.0), 0.0)
    return np.where(x < 0, 0.0, x) if relu else x


def half_arithmetic(i: Instruction, function: Callable[..., np.ndarray], relu: bool = False) -> Step:
    """The closure of an fp16/bf16 operation given on float64 (exact, or rounded to odd)."""
    fmt = i.type.removesuffix("x2")
    i.choice("rn")
    ftz = fmt == "f16" and i.flag("ftz")
    sat = fmt == "f16" and i.flag("sat")
    relu = relu and i.flag("relu")

    def compute(*parts: np.ndarray) -> np.ndarray:
        wide = [widen(flush_half(p, fmt) if ftz else p, fmt) for p in parts]
        out = narrow(clamp(function(*wide), sat, False), fmt)
        if relu:
            out = np.where(np.isnan(widen(out, fmt)) | (out < U16(0x8000)), out, U16(0))
        return flush_half(out, fmt) if ftz else out

    return by_part(i, compute)


@handles("add sub", HALVES)
def add(i: Instruction) -> Step:
    """Half add and sub."""
    i.arity(3)
    sub = i.opcode == "sub"
    return half_arithmetic(i, lambda a, b: sum_odd(a, -b if sub else b))


@handles("mul", HALVES)
def mul(i: Instruction) -> Step:
    """Half multiply; exact in float64."""
    i.arity(3)
    return half_arithmetic(i, np.multiply)


@handles("fma", HALVES)
def fma(i: Instruction) -> Step:
    """Half fused multiply-add, with .relu."""
    i.arity(4)
    if "rn" not in i.modifiers:
        raise i.unsupported("rounding")
    return half_arithmetic(i, lambda a, b, c: sum_odd(a * b, c), relu=True)


@handles("neg abs", HALVES)
def negate(i: Instruction) -> Step:
    """Sign operations on the bits; .ftz flushes."""
    i.arity(2)
    fmt = i.type.removesuffix("x2")
    ftz = fmt == "f16" and i.flag("ftz")
    neg = i.opcode == "neg"

    def compute(a: np.ndarray) -> np.ndarray:
        a = flush_half(a, fmt) if ftz else a
        return a ^ U16(0x8000) if neg else a & U16(0x7FFF)

    return by_part(i, compute)


@handles("min max", HALVES)
def minmax(i: Instruction) -> Step:
    """Half min and max."""
    i.arity(3)
    fmt = i.type.removesuffix("x2")
    ftz = fmt == "f16" and i.flag("ftz")
    nan, magnitude = i.flag("NaN"), i.flag("xorsign")
    if magnitude and not i.flag("abs"):
        raise i.unsupported()

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = (flush_half(v, fmt) if ftz else v for v in (a, b))
        return narrow(extreme(i.opcode == "max", nan, magnitude, widen(a, fmt), widen(b, fmt)), fmt)

    return by_part(i, compute)


def pair_arithmetic(i: Instruction, function: Callable) -> Step:
    """The closure of an f32x2 operation."""
    mode = i.choice("rn", "rz", "rm", "rp") or "rn"
    ftz = i.flag("ftz")

    def compute(*parts: np.ndarray) -> np.ndarray:
        xs = [np.ascontiguousarray(p).view(np.float32) for p in parts]
        out = canonical(np.asarray(function(mode, *[flush(x) if ftz else x for x in xs])))
        return (flush(out) if ftz else out).view(U32)

    return by_part(i, compute, size=4)


@handles("add sub mul fma", "f32x2")
def pair(i: Instruction) -> Step:
    """Two fp32 operations at once."""
    from .floating import add_directed, multiply

    i.arity(4 if i.opcode == "fma" else 3)
    return pair_arithmetic(
        i,
        {
            "add": add_directed,
            "sub": lambda mode, a, b: add_directed(mode, a, -b),
            "mul": multiply,
            "fma": fused,
        }[i.opcode],
    )
