"""cvt: conversions between all integer types, fp16, bf16, tf32, fp32 and fp64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Instruction, Step, elementwise, handles
from .values import (
    FORMATS,
    ROUNDINGS,
    TYPES,
    U32,
    bf16_from_f32,
    canonical,
    flush,
    narrow,
    saturate,
    to_odd,
    two_sum,
    widen,
)

INT_TYPES = "u8 s8 u16 s16 u32 s32 u64 s64"
FLOAT_TYPES = "f16 bf16 f32 f64"
TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def int_to_int(target: str, sat: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Wraps, or clamps under .sat."""
    dtype = np.dtype(TYPES[target].dtype)
    limits = np.iinfo(dtype)

    def convert(a: np.ndarray) -> np.ndarray:
        if sat:
            low, high = max(limits.min, np.iinfo(a.dtype).min), min(limits.max, np.iinfo(a.dtype).max)
            a = np.clip(a, a.dtype.type(low), a.dtype.type(high))
        return a.astype(dtype)

    return convert


def int_to_float(target: str, mode: str) -> Callable[[np.ndarray], np.ndarray]:
    """One rounding, also from 64 bits."""

    def convert(a: np.ndarray) -> np.ndarray:
        if a.itemsize < 8:
            return narrow(a.astype(np.float64), target, mode)
        low = a & a.dtype.type(0xFFFFFFFF)
        s, e = two_sum((a - low).astype(np.float64), low.astype(np.float64))
        if target != "f64":
            return narrow(to_odd(s, e), target, mode)
        toward = {"rn": None, "rz": 0.0, "rm": -np.inf, "rp": np.inf}[mode]
        if toward is None:
            return s
        wrong = {"rz": (e != 0) & ((e < 0) == (s > 0)), "rm": e < 0, "rp": e > 0}[mode]
        return np.where(wrong, np.nextafter(s, toward), s)

    return convert


def float_to_int(source: str, target: str, mode: str, ftz: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Rounds to an integer and clamps. NaN gives 0, or 1 << (bits - 1) where fp64 or a 64-bit integer is involved."""
    dtype = np.dtype(TYPES[target].dtype)
    limits, bits = np.iinfo(dtype), 8 * dtype.itemsize
    wide = source == "f64" or bits == 64
    nan = np.array([1 << (bits - 1) if wide else 0], f"u{dtype.itemsize}").view(dtype)

    def convert(a: np.ndarray) -> np.ndarray:
        x = TO_INTEGRAL[mode](widen(flush(a) if ftz else a, source))
        with np.errstate(all="ignore"):
            out = np.where((x > limits.min) & (x < limits.max), x, 0.0).astype(dtype)
        out = np.where(x >= float(limits.max), dtype.type(limits.max), out)
        out = np.where(x <= float(limits.min), dtype.type(limits.min), out)
        return np.where(np.isnan(x), nan, out)

    return convert


@handles("cvt", f"{INT_TYPES} {FLOAT_TYPES}")
def cvt(i: Instruction) -> Step:
    """The scalar conversions; the handler's type is the source, the other one in the modifiers is the target."""
    source = i.type
    target = i.need(*(t for t in i.modifiers if t in TYPES), "a target type")
    if target in ("f16x2", "bf16x2"):
        return pack(i, target)
    if target == "tf32":
        return to_tf32(i)
    i.arity(2)
    from_float, to_float = source in FORMATS, target in FORMATS
    ftz = "f32" in (source, target) and i.flag("ftz")
    sat = i.flag("sat")
    read, write = i.source(1, source, wider=True), i.dest(0, target, wider=True)
    if not from_float and not to_float:
        convert = int_to_int(target, sat)
    elif not from_float:
        convert = int_to_float(target, i.need(*ROUNDINGS[:4]))
        if sat:
            inner = convert
            convert = lambda a: saturate_format(inner(a), target)  # noqa: E731
    elif not to_float:
        convert = float_to_int(source, target, i.need(*TO_INTEGRAL), ftz)
    else:
        convert = float_to_float(i, source, target, ftz, sat)

    def step(m) -> None:
        with np.errstate(all="ignore"):
            write(m, convert(read(m)))

    return step


def saturate_format(bits: np.ndarray, fmt: str) -> np.ndarray:
    """.sat of a result in its own format."""
    return narrow(saturate(widen(bits, fmt)), fmt)


def float_to_float(i: Instruction, source: str, target: str, ftz: bool, sat: bool) -> Callable:
    """Widening is exact, narrowing rounds once, the same format may round to an integral value."""
    integral = i.choice(*TO_INTEGRAL)
    mode = i.choice(*ROUNDINGS[:4])
    narrowing = FORMATS[target].precision < FORMATS[source].precision
    if (narrowing or {source, target} == {"f16", "bf16"}) and mode is None:
        raise i.unsupported("rounding")
    relu = target in ("f16", "bf16") and i.flag("relu")
    finite = target in ("f16", "bf16") and i.flag("satfinite")
    if (source, target, mode, relu, finite, sat, ftz) == ("f32", "bf16", "rn", False, False, False, False):
        return bf16_from_f32
    if (source, target, integral, ftz, sat) == ("bf16", "f32", None, False, False):
        return lambda a: canonical((a.astype(U32) << U32(16)).view(np.float32))

    def convert(a: np.ndarray) -> np.ndarray:
        x = widen(flush(a) if ftz and source == "f32" else a, source)
        if integral:
            x = TO_INTEGRAL[integral](x)
        out = finish(x, target, mode or "rn", relu, finite)
        if ftz and target == "f32":
            out = flush(out)
        return saturate_format(out, target) if sat else out

    return convert


def finish(x: np.ndarray, target: str, mode: str, relu: bool, finite: bool) -> np.ndarray:
    """Round to the target; .relu clamps negatives to zero, .satfinite overflow to the largest finite number."""
    if relu:
        x = np.where(x < 0, 0.0, x)
        x = np.where(x == 0, 0.0, x)
    out = narrow(x, target, mode)
    if finite:
        f = FORMATS[target]
        largest = (2.0 - 2.0 ** (1 - f.precision)) * 2.0**f.emax
        over = np.isinf(widen(out, target))
        out = np.where(over, narrow(np.copysign(largest, x), target), out)
    return out


def pack(i: Instruction, target: str) -> Step:
    """cvt.rn.f16x2.f32 d, a, b: a into the upper half, b into the lower."""
    i.arity(3)
    if i.type != "f32":
        raise i.unsupported()
    fmt = target.removesuffix("x2")
    mode, relu, finite = i.need("rn", "rz"), i.flag("relu"), i.flag("satfinite")

    def half(a: np.ndarray) -> np.ndarray:
        if fmt == "bf16" and mode == "rn" and not relu and not finite:
            return bf16_from_f32(a)
        return finish(widen(a, "f32"), fmt, mode, relu, finite)

    return elementwise(
        i, lambda a, b: (half(a).astype(U32) << U32(16)) | half(b).astype(U32), "f32", "f32", result="b32"
    )


def to_tf32(i: Instruction) -> Step:
    """cvt.rna.tf32.f32 and the .rn and .rz forms."""
    i.arity(2)
    if i.type != "f32":
        raise i.unsupported()
    mode, relu, finite = i.need("rna", "rn", "rz"), i.flag("relu"), i.flag("satfinite")
    return elementwise(i, lambda a: finish(widen(a, "f32"), "tf32", mode, relu, finite), "f32", result="b32")
