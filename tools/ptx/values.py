"""Number formats: PTX types as numpy dtypes, and every conversion to a narrower float in one exact rounding.

Values narrower than fp32 travel as raw uint16 and are widened to float64, where products are exact. Sums that float64
cannot hold are rounded to odd first, which makes the second rounding (to the narrow format) come out right.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
RAW = {1: U8, 2: U16, 4: U32, 8: U64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


class Type(NamedTuple):
    """A PTX type: size in bytes, the dtype it is computed in, and u/s/b/f/p (packed pair)."""

    size: int
    dtype: type
    kind: str


TYPES: dict[str, Type] = {
    **{f"u{8 * n}": Type(n, RAW[n], "u") for n in RAW},
    **{f"b{8 * n}": Type(n, RAW[n], "b") for n in RAW},
    **{f"s{8 * n}": Type(n, SIGNED[n], "s") for n in SIGNED},
    "f32": Type(4, np.float32, "f"),
    "f64": Type(8, np.float64, "f"),
    "f16": Type(2, U16, "f"),
    "bf16": Type(2, U16, "f"),
    "tf32": Type(4, U32, "f"),
    "f16x2": Type(4, U32, "p"),
    "bf16x2": Type(4, U32, "p"),
    "f32x2": Type(8, U64, "p"),
    "pred": Type(0, np.bool_, "b"),
}


class Format(NamedTuple):
    """A binary float format: bits of significand (with the hidden one), smallest and largest exponent, raw NaN."""

    precision: int
    emin: int
    emax: int
    nan: int


FORMATS = {
    "f16": Format(11, -14, 15, 0x7FFF),
    "bf16": Format(8, -126, 127, 0x7FFF),
    "tf32": Format(11, -126, 127, 0x7FFFFFFF),
    "f32": Format(24, -126, 127, 0x7FFFFFFF),
    "f64": Format(53, -1022, 1023, 0x7FF8000000000000),
}
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")
TINY32 = 2.0**-126


def widen(raw: np.ndarray, fmt: str) -> np.ndarray:
    """Raw bits (or float array) of a format to float64, exactly."""
    if fmt == "f16":
        return raw.view(np.float16).astype(np.float64)
    if fmt == "bf16":
        return (raw.astype(U32) << U32(16)).view(np.float32).astype(np.float64)
    if fmt == "tf32":
        return (raw & U32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)


def quantise(x: np.ndarray, fmt: str, mode: str = "rn") -> np.ndarray:
    """Round float64 to the values of a narrower format, kept in float64. Overflow follows the rounding mode."""
    f = FORMATS[fmt]
    finite = np.isfinite(x)
    safe = np.where(finite, x, 0.0)
    exponent = np.maximum(np.frexp(safe)[1] - 1, f.emin) - (f.precision - 1)
    scaled = np.ldexp(safe, -exponent)
    if mode == "rn":
        rounded = np.rint(scaled)
    elif mode == "rna":
        rounded = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
    else:
        rounded = {"rz": np.trunc, "rm": np.floor, "rp": np.ceil}[mode](scaled)
    out = np.copysign(np.ldexp(rounded, exponent), safe)
    largest = math.ldexp(2.0 - 2.0 ** (1 - f.precision), f.emax)
    over = np.abs(out) > largest
    if over.any():
        stays = {"rn": False, "rna": False, "rz": True, "rm": out > 0, "rp": out < 0}[mode]
        out = np.where(over, np.where(stays, np.copysign(largest, out), np.copysign(np.inf, out)), out)
    return np.where(finite, out, x)


def narrow(x: np.ndarray, fmt: str, mode: str = "rn") -> np.ndarray:
    """Float64 to the bits of a format (a float array for f32 and f64) in one rounding; NaN becomes canonical."""
    x = np.asarray(x, np.float64)
    if fmt == "f64":
        return x
    if fmt == "f32":
        with np.errstate(all="ignore"):
            return canonical((x if mode == "rn" else quantise(x, "f32", mode)).astype(np.float32))
    if fmt == "f16":
        with np.errstate(all="ignore"):
            raw = (x if mode == "rn" else quantise(x, "f16", mode)).astype(np.float16).view(U16)
        return np.where(np.isnan(x), U16(0x7FFF), raw)
    bits = quantise(x, fmt, mode).astype(np.float32).view(U32)
    if fmt == "tf32":
        return np.where(np.isnan(x), U32(0x7FFFFFFF), bits)
    return np.where(np.isnan(x), U16(0x7FFF), (bits >> U32(16)).astype(U16))


def bf16_from_f32(x: np.ndarray) -> np.ndarray:
    """The common case, round to nearest even from fp32, without the detour through float64."""
    u = np.ascontiguousarray(x).view(U32)
    raw = ((u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), raw)


def canonical(x: np.ndarray) -> np.ndarray:
    """Fp32 results that are NaN are all-ones 0x7fffffff on the device; fp64 is given one quiet NaN."""
    nan = np.isnan(x)
    if nan.any():
        if x.dtype == np.float32:
            return np.where(nan, U32(0x7FFFFFFF), np.ascontiguousarray(x).view(U32)).view(np.float32)
        return np.where(nan, np.float64(np.nan), x)
    return x


def flush(x: np.ndarray) -> np.ndarray:
    """The .ftz of fp32: subnormals become zero of the same sign."""
    tiny = (np.abs(x) < np.float32(TINY32)) & (x != 0)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def flush_half(raw: np.ndarray, fmt: str) -> np.ndarray:
    """The .ftz of the 16-bit formats."""
    exponent, sign = (0x7C00 if fmt == "f16" else 0x7F80), U16(0x8000)
    return np.where(raw & U16(exponent), raw, raw & sign)


def saturate(x: np.ndarray) -> np.ndarray:
    """The .sat of floats: clamp to [0, 1], NaN to +0."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    return np.where(x > zero, np.minimum(x, one), zero)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s + e == a + b exactly, s the rounded sum."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def to_odd(s: np.ndarray, e: np.ndarray) -> np.ndarray:
    """The sum s + e (from two_sum) rounded to odd, so that one more rounding to fewer bits is exact."""
    bits = s.view(np.int64)
    fix = (e != 0) & np.isfinite(s) & np.isfinite(e) & ((bits & 1) == 0)
    return np.where(fix, bits + np.where((e > 0) == (s > 0), 1, -1), bits).view(np.float64)


def sum_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64 rounded to odd."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return to_odd(*two_sum(a, b))


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Fused multiply-add of fp32 arrays. The product is exact in float64; the sum needs care only near ties."""
    p, c64 = a.astype(np.float64) * b, c.astype(np.float64)
    if mode != "rn":
        out = narrow(sum_odd(p, c64), "f32", mode)
        cancelled = (out == 0) & (p + c64 == 0) & (np.signbit(p) != np.signbit(c64))
        return np.where(cancelled, np.float32(-0.0 if mode == "rm" else 0.0), out)
    s = np.asarray(p + c64)
    tie = (s.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    tie |= (np.abs(s) < TINY32) & (s != 0)
    if tie.any():
        full = np.broadcast_arrays(p, c64)
        s = s.copy()
        s[tie] = sum_odd(full[0][tie], full[1][tie])
    return canonical(s.astype(np.float32))


_SPLIT = 134217729.0  # 2**27 + 1


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p + e == a * b exactly (Veltkamp split), for exponents far from the ends of the range."""
    p = a * b
    t = _SPLIT * a
    ah = t - (t - a)
    al = a - ah
    t = _SPLIT * b
    bh = t - (t - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Fused multiply-add of fp64 arrays: error-free transforms, rational arithmetic where those could overflow."""
    a, b, c = (np.asarray(v, np.float64) for v in np.broadcast_arrays(a, b, c))
    with np.errstate(all="ignore"):
        u, ul = two_product(a, b)
        t, tl = two_sum(c, ul)
        v, vl = two_sum(u, t)
        out = v + sum_odd(tl, vl)
        plain = np.where(np.isfinite(a) & np.isfinite(b) & np.isinf(c), c, a * b + c)
        ordinary = np.isfinite(plain) & (np.abs(a) < 2.0**450) & (np.abs(b) < 2.0**450) & (np.abs(c) < 2.0**900)
        ordinary &= (np.abs(u) > 2.0**-900) & (np.abs(plain) > 2.0**-900) & (c != 0)
    out = np.where(ordinary, out, plain)
    exact = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    if mode == "rn":
        exact &= ~ordinary
    for i in zip(*np.nonzero(exact)):
        x, y, z = float(a[i]), float(b[i]), float(c[i])
        value = Fraction(x) * Fraction(y) + Fraction(z)
        out[i] = round_fraction(value, mode, negative_zero(x, y, z, mode) if value == 0 else False)
    return canonical(out)


def negative_zero(x: float, y: float, z: float, mode: str) -> bool:
    """Whether an exact zero x*y + z carries a minus sign."""
    product = math.copysign(1.0, x) * math.copysign(1.0, y) < 0
    if product == (math.copysign(1.0, z) < 0) and (x == 0 or y == 0 or z == 0):
        return product
    return mode == "rm"


def round_fraction(value: Fraction, mode: str, negative: bool = False) -> float:
    """A rational number rounded to fp64 in the given direction. Slow; for rare operands and directed modes."""
    if value == 0:
        return -0.0 if negative else 0.0
    try:
        near = float(value)
    except OverflowError:
        near = math.inf if value > 0 else -math.inf
    if mode == "rn":
        return near
    exact = Fraction(near) if math.isfinite(near) else 2 * value
    down = mode == "rm" or (mode == "rz" and value > 0)
    if down and exact > value:
        return math.nextafter(near, -math.inf)
    if not down and exact < value:
        return math.nextafter(near, math.inf)
    return near
