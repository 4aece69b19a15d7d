"""Fp32 and fp64 arithmetic, correctly rounded, with .ftz, .sat and the directed roundings."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .decode import Instruction, Step, elementwise, handles
from .values import (
    ROUNDINGS,
    TYPES,
    U32,
    U64,
    canonical,
    flush,
    fma32,
    fma64,
    narrow,
    round_fraction,
    saturate,
    sum_odd,
)

FLOATS = "f32 f64"


def modes(i: Instruction, required: bool = False) -> tuple[str, Callable, Callable]:
    """The rounding, and what .ftz and .sat do to operands and to the result."""
    rounding = i.choice(*ROUNDINGS[:4])
    if required and rounding is None:
        raise i.unsupported("rounding")
    ftz = i.type == "f32" and i.flag("ftz")
    sat = i.type == "f32" and i.flag("sat")
    before = flush if ftz else lambda a: a

    def after(x: np.ndarray) -> np.ndarray:
        if ftz:
            x = flush(x)
        return saturate(x) if sat else x

    return rounding or "rn", before, after


def arithmetic(i: Instruction, function: Callable, required: bool = False) -> Step:
    """The closure of a rounded operation; `function(mode, a, b, ...)`."""
    mode, before, after = modes(i, required)

    def compute(*operands: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return after(canonical(np.asarray(function(mode, *[before(a) for a in operands]))))

    return elementwise(i, compute)


def exactly(function: Callable[..., Fraction], mode: str, fallback: Callable, *operands: np.ndarray) -> np.ndarray:
    """A directed rounding through rational arithmetic, one element at a time; non-finite operands use `fallback`."""
    operands = tuple(np.broadcast_arrays(*operands))
    out = np.array(fallback(*operands))
    for at in np.ndindex(out.shape):
        values = [float(a[at]) for a in operands]
        if all(np.isfinite(v) and v != 0 for v in values):
            out[at] = function(*values)
    return out


def add_directed(mode: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of either type in any rounding."""
    if mode == "rn":
        return a + b
    if a.dtype == np.float32:
        total = narrow(sum_odd(a, b), "f32", mode)
        zero = (total == 0) & (np.signbit(a) != np.signbit(b))
        return np.where(zero, np.float32(-0.0 if mode == "rm" else 0.0), total)
    return fma64(a, np.ones(1), b, mode)


@handles("add sub", FLOATS)
def add(i: Instruction) -> Step:
    """Floating add and sub."""
    i.arity(3)
    if i.opcode == "add":
        return arithmetic(i, add_directed)
    return arithmetic(i, lambda mode, a, b: add_directed(mode, a, -b))


def multiply(mode: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a * b of either type in any rounding."""
    if mode == "rn":
        return a * b
    if a.dtype == np.float32:
        return narrow(a.astype(np.float64) * b, "f32", mode)
    product = a * b
    exact = fma64(a, b, np.copysign(0.0, product), mode)
    return np.where(np.isfinite(a) & np.isfinite(b), exact, product)


@handles("mul", FLOATS)
def mul(i: Instruction) -> Step:
    """Floating multiply."""
    i.arity(3)
    return arithmetic(i, multiply)


def fused(mode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One rounding of a * b + c."""
    return fma32(a, b, c, mode) if a.dtype == np.float32 else fma64(a, b, c, mode)


@handles("fma mad", FLOATS)
def fma(i: Instruction) -> Step:
    """fma, and mad, which is the same on every device of interest."""
    i.arity(4)
    return arithmetic(i, fused, required=True)


def quotient(mode: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correctly rounded division."""
    if mode == "rn":
        return a / b
    return _directed(mode, lambda x, y: Fraction(x) / Fraction(y), np.divide, a, b)


def _directed(mode: str, exact: Callable, near: Callable, *operands: np.ndarray) -> np.ndarray:
    single = operands[0].dtype == np.float32

    def value(*xs: float) -> float:
        if single:
            return _round_single(exact(*xs), mode)
        return round_fraction(exact(*xs), mode)

    return exactly(value, mode, near, *operands).astype(operands[0].dtype)


def _round_single(x: Fraction, mode: str) -> float:
    odd = round_fraction(x, "rz")
    if Fraction(odd) != x:  # to odd: between two doubles, take the one whose last bit is set
        bits = int(np.float64(odd).view(U64)) | 1
        odd = float(U64(bits).view(np.float64))
    return float(narrow(np.array([odd]), "f32", mode)[0])


@handles("div", FLOATS)
def div(i: Instruction) -> Step:
    """div.rn and directed; div.full and div.approx are approximate units."""
    i.arity(3)
    if i.type == "f32" and ("approx" in i.modifiers or "full" in i.modifiers):
        from .approx import divide

        return divide(i)
    return arithmetic(i, quotient, required=True)


@handles("rcp", FLOATS)
def rcp(i: Instruction) -> Step:
    """1 / a."""
    i.arity(2)
    if "approx" in i.modifiers:
        from .approx import unit

        return unit(i)
    return arithmetic(i, lambda mode, a: quotient(mode, np.ones(1, a.dtype), a), required=True)


def root(mode: str, a: np.ndarray) -> np.ndarray:
    """Correctly rounded square root."""
    if mode == "rn":
        return np.sqrt(a)

    def directed(x: float, near: float) -> float:
        target = np.float32 if a.dtype == np.float32 else np.float64
        exact, r = Fraction(x), target(near)
        if mode == "rp" and Fraction(float(r)) ** 2 < exact:
            r = np.nextafter(r, target(np.inf))
        elif mode in ("rm", "rz") and Fraction(float(r)) ** 2 > exact:
            r = np.nextafter(r, target(0))
        return float(r)

    near = np.array(np.sqrt(a))
    for at in np.ndindex(near.shape):
        if np.isfinite(near[at]) and near[at] != 0:
            near[at] = directed(float(a[at]), float(near[at]))
    return near


@handles("sqrt", FLOATS)
def sqrt(i: Instruction) -> Step:
    """Square root."""
    i.arity(2)
    if "approx" in i.modifiers:
        from .approx import unit

        return unit(i)
    return arithmetic(i, root, required=True)


def sign_bit(a: np.ndarray) -> np.ndarray:
    """The sign bit of each element as raw bits."""
    raw = U32 if a.itemsize == 4 else U64
    return a.view(raw) & raw(1 << (8 * a.itemsize - 1))


@handles("neg abs", FLOATS)
def negate(i: Instruction) -> Step:
    """neg and abs."""
    i.arity(2)
    function = np.negative if i.opcode == "neg" else np.abs
    return arithmetic(i, lambda mode, a: function(a))


def extreme(largest: bool, nan: bool, magnitude: bool, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min and max with -0 < +0; a NaN loses against a number unless .NaN asks for it."""
    a, b = np.broadcast_arrays(a, b)
    if magnitude:  # .xorsign.abs
        signs = sign_bit(a) ^ sign_bit(b)
        out = extreme(largest, nan, False, np.abs(a), np.abs(b))
        return np.where(np.isnan(out), out, (out.view(signs.dtype) | signs).view(a.dtype))
    first = (a > b) if largest else (a < b)
    first |= (a == b) & (np.signbit(b) if largest else np.signbit(a))
    out = np.where(first, a, b)
    if nan:
        return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), out)
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, out))


@handles("min max", FLOATS)
def minmax(i: Instruction) -> Step:
    """min and max of two operands, or of three for fp32."""
    n = i.arity(3, 4) if i.type == "f32" else i.arity(3)
    largest, nan = i.opcode == "max", i.type == "f32" and i.flag("NaN")
    magnitude = i.type == "f32" and i.flag("xorsign")
    if magnitude and not i.flag("abs"):
        raise i.unsupported()
    absolute = n == 4 and i.flag("abs")

    def pick(mode: str, *xs: np.ndarray) -> np.ndarray:
        xs = tuple(np.abs(x) for x in xs) if absolute else xs
        out = extreme(largest, nan, magnitude, xs[0], xs[1])
        return out if n == 3 else extreme(largest, nan, False, out, xs[2])

    return arithmetic(i, pick)


@handles("copysign", FLOATS)
def copysign(i: Instruction) -> Step:
    """The magnitude of b with the sign of a."""
    i.arity(3)
    raw = "b32" if i.type == "f32" else "b64"

    def copy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        sign = a.dtype.type(1 << (8 * a.itemsize - 1))
        return (a & sign) | (b & ~sign)

    return elementwise(i, copy, raw, raw, result=raw)


@handles("testp", FLOATS)
def testp(i: Instruction) -> Step:
    """Classify a number."""
    i.arity(2)
    kind = i.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    tiny = np.finfo(TYPES[i.type].dtype).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }[kind]
    return elementwise(i, test, result="pred")
