"""Independent truth for instruction tests: Python integers, `struct` and exact rationals. Shares no code with the
executor; slow and obvious on purpose."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

# format: significand bits, smallest exponent, largest exponent, total bits
FLOATS = {"f16": (11, -14, 15, 16), "bf16": (8, -126, 127, 16)}
FLOATS |= {"f32": (24, -126, 127, 32), "f64": (53, -1022, 1023, 64)}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FF8000000000000}


def bits_of(type_name: str) -> int:
    """Width of a PTX type."""
    if type_name.endswith("x2"):
        return 2 * bits_of(type_name[:-2])
    return FLOATS[type_name][3] if type_name in FLOATS else int(type_name[1:])


def to_int(bits: int, type_name: str) -> int:
    """The integer that bits mean."""
    n = bits_of(type_name)
    bits &= (1 << n) - 1
    return bits - (1 << n) if type_name[0] == "s" and bits >> (n - 1) else bits


def wrap(value: int, type_name: str) -> int:
    """The bits of an integer, modulo the width."""
    return value & ((1 << bits_of(type_name)) - 1)


def to_float(bits: int, fmt: str) -> float:
    """The number that bits mean; exact, as every format fits into a double."""
    if fmt == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    if fmt == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    if fmt == "f32":
        return struct.unpack("<f", struct.pack("<I", bits))[0]
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def from_float(value: float, fmt: str) -> int:
    """The bits of a number the format holds exactly."""
    if math.isnan(value):
        return NAN[fmt]
    if fmt == "f16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    if fmt == "f64":
        return struct.unpack("<Q", struct.pack("<d", value))[0]
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits >> 16 if fmt == "bf16" else bits


def round_to(x: Fraction, fmt: str, mode: str = "rn", negative_zero: bool = False) -> float:
    """A rational rounded to a format; overflow as IEEE 754 has it."""
    precision, emin, emax, _ = FLOATS[fmt]
    if x == 0:
        return -0.0 if negative_zero else 0.0
    negative, size = x < 0, abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, emin) - precision + 1)
    whole, rest = divmod(size / step, 1)
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    elif mode == "rna":
        up = rest >= Fraction(1, 2)
    elif mode == "rz":
        up = False
    else:
        up = rest > 0 and (mode == "rm") == negative
    value = (whole + up) * step
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** emax
    if value > largest:
        stays = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        value = float(largest) if stays else math.inf
    return -float(value) if negative else float(value)


def is_negative(x: float) -> bool:
    """The sign bit."""
    return math.copysign(1.0, x) < 0


def add(x: float, y: float, fmt: str, mode: str = "rn") -> float:
    """Rounded sum."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return x + y
    negative = is_negative(x) if x == 0 and y == 0 and is_negative(x) == is_negative(y) else mode == "rm"
    return round_to(Fraction(x) + Fraction(y), fmt, mode, negative)


def mul(x: float, y: float, fmt: str, mode: str = "rn") -> float:
    """Rounded product."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return x * y
    return round_to(Fraction(x) * Fraction(y), fmt, mode, is_negative(x) != is_negative(y))


def fma(x: float, y: float, z: float, fmt: str, mode: str = "rn") -> float:
    """Product and sum in one rounding."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return x * y + z
    if not math.isfinite(z):
        return z
    sign = is_negative(x) != is_negative(y)
    negative = sign if x * y == 0 and 0 in (x, y) and z == 0 and sign == is_negative(z) else mode == "rm"
    return round_to(Fraction(x) * Fraction(y) + Fraction(z), fmt, mode, negative)


def div(x: float, y: float, fmt: str, mode: str = "rn") -> float:
    """Rounded quotient."""
    negative = is_negative(x) != is_negative(y)
    if math.isnan(x) or math.isnan(y) or (x == 0 and y == 0) or (math.isinf(x) and math.isinf(y)):
        return math.nan
    if math.isinf(x) or y == 0:
        return -math.inf if negative else math.inf
    if math.isinf(y):
        return -0.0 if negative else 0.0
    return round_to(Fraction(x) / Fraction(y), fmt, mode, negative)


def sqrt(x: float, fmt: str, mode: str = "rn") -> float:
    """Rounded square root, through an integer root with bits to spare."""
    if math.isnan(x) or x < 0:
        return math.nan
    if x == 0 or math.isinf(x):
        return x
    exact = Fraction(x)
    shift = 2 * max(0, 160 + exact.denominator.bit_length() - exact.numerator.bit_length() // 2)
    scaled = (exact.numerator << shift) // exact.denominator
    root = math.isqrt(scaled)
    inexact = root * root != scaled or (exact.numerator << shift) % exact.denominator
    return round_to(Fraction(2 * root + bool(inexact), 2 << (shift // 2)), fmt, mode)


def minmax(x: float, y: float, largest: bool, nan: bool = False) -> float:
    """-0 < +0; NaN loses, or wins under .NaN."""
    if math.isnan(x) or math.isnan(y):
        return math.nan if nan or (math.isnan(x) and math.isnan(y)) else (y if math.isnan(x) else x)
    key: Callable[[float], tuple[float, bool]] = lambda v: (v, not is_negative(v))  # noqa: E731
    return max(x, y, key=key) if largest else min(x, y, key=key)


def flush(x: float, fmt: str = "f32") -> float:
    """Subnormals to zero."""
    return math.copysign(0.0, x) if abs(x) < 2.0 ** FLOATS[fmt][1] else x


def saturate(x: float) -> float:
    """Clamp to [0, 1], NaN to 0."""
    return 0.0 if math.isnan(x) or x <= 0 else min(x, 1.0)
