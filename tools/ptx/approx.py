"""The approximate units: the exact value, then the documented worst-case error in the direction the run asks for.

`Machine.approx` is 0 (exact, rounded), +1 or -1. Sections are those of the PTX ISA manual, version 9.1. It bounds div, rcp
and ex2 in units in the last place, sqrt, rsqrt and tanh by relative errors, sin, cos and the 16-bit tanh by absolute ones;
lg2 has an absolute bound between 1/2 and 2 and a relative one outside. Values the manual tabulates (zeros, infinities,
NaN) stay exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Instruction, Step, handles
from .packed import halves, join
from .values import U32, U64, canonical, flush, flush_half, narrow, widen

# Units in the last place, from the correctly rounded result.
ULPS = {
    "div": 2,  # 9.7.3.8, .approx and .full
    "rcp": 1,  # 9.7.3.13, .f32
    "ex2": 2,  # 9.7.3.21, .f32; editions before ulps were counted said 2^-22.5, which is less
}
# unit, format: (relative bound, absolute bound)
BOUNDS: dict[tuple[str, str], tuple[float, float]] = {
    ("sqrt", "f32"): (2**-23, 0.0),  # 9.7.3.15
    ("rsqrt", "f32"): (2**-22.9, 0.0),  # 9.7.3.16
    ("tanh", "f32"): (2**-11, 0.0),  # 9.7.3.22
    ("tanh", "f16"): (0.0, 2**-10.987),  # 9.7.4.9
    ("tanh", "bf16"): (0.0, 2**-8),  # 9.7.4.9
    ("ex2", "f16"): (2**-9.9, 0.0),  # 9.7.4.10
    ("ex2", "bf16"): (2**-7, 0.0),  # 9.7.4.10
    # 9.7.3.14 and 9.7.3.17 give no number: "gross", from the 20 upper bits of the mantissa, to 20 bits. Taken to be two
    # units of the last of those, on top of the bits that are cut off on the way in and out.
    ("rcp", "f64"): (2**-19, 0.0),
    ("rsqrt", "f64"): (2**-19, 0.0),
}
LG2 = 2.0**-22  # 9.7.3.20
SINE = (
    (2 * np.pi, 2.0**-20.5),
    (100 * np.pi, 2.0**-14.7),
    (np.inf, 2.0),
)  # 9.7.3.18 and .19; no guarantee beyond 100 pi

EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
}


def perturb(name: str, fmt: str, x: np.ndarray, y: np.ndarray, sign: int) -> np.ndarray:
    """The exact value y of unit(x), moved by the worst documented error."""
    if name == "lg2":
        moved = y + sign * np.where((x > 0.5) & (x < 2), 1.0, np.abs(y)) * LG2
    elif name in ("sin", "cos"):
        moved = y + sign * np.select([np.abs(x) <= limit for limit, _ in SINE], [bound for _, bound in SINE])
    else:
        relative, absolute = BOUNDS[name, fmt]
        moved = y + sign * (relative * np.abs(y) + absolute)
    return np.where(~np.isfinite(x) | ~np.isfinite(y) | (x == 0), y, moved)


def step_ulps(y: np.ndarray, fixed: np.ndarray, steps: int) -> np.ndarray:
    """float32 y moved up by ``steps`` units in the last place, but for zeros, infinities, NaN and where it is ``fixed``."""
    size = (y.view(U32) & U32(0x7FFFFFFF)).astype(np.int64)
    moved = np.clip(size + np.where(np.signbit(y), -steps, steps), 0, 0x7F800000).astype(U32).view(np.float32)
    return np.where((y != 0) & np.isfinite(y) & ~fixed, np.copysign(moved, y), y)


def evaluate(name: str, fmt: str, x: np.ndarray, sign: int) -> np.ndarray:
    """unit(x) on float64, without the final rounding."""
    with np.errstate(all="ignore"):
        y = EXACT[name](x)
        return perturb(name, fmt, x, y, sign) if sign else y


@handles("ex2 tanh", "f32 f16 bf16 f16x2 bf16x2")
@handles("lg2 sin cos", "f32")
@handles("rsqrt", "f32 f64")
def unit(i: Instruction) -> Step:
    """One operand through an approximate unit (also rcp.approx and sqrt.approx)."""
    i.arity(2)
    i.need("approx")
    name, fmt = i.opcode, i.type.removesuffix("x2")
    if fmt == "f64":
        return gross(i)
    ftz = i.flag("ftz")
    if name == "ex2" and fmt == "bf16" and not ftz:
        raise i.unsupported("expects .ftz")
    if name == "tanh" and ftz:
        raise i.unsupported()
    read, write = i.source(1, i.type), i.dest(0, i.type)
    if fmt == "f32":

        def step(m) -> None:
            a = flush(read(m)) if ftz else read(m)
            ulps = ULPS.get(name)
            y = evaluate(name, fmt, a.astype(np.float64), 0 if ulps else m.approx)
            with np.errstate(all="ignore"):
                y = canonical(y.astype(np.float32))
            if ulps and m.approx:
                y = step_ulps(y, (a == 0) | ~np.isfinite(a), m.approx * ulps)
            write(m, flush(y) if ftz else y)

        return step

    def part(raw: np.ndarray, sign: int) -> np.ndarray:
        raw = flush_half(raw, fmt) if ftz else raw
        out = narrow(evaluate(name, fmt, widen(raw, fmt), sign), fmt)
        return flush_half(out, fmt) if ftz else out

    return lambda m: write(m, join([part(p, m.approx) for p in halves(read(m), 2)]))


def gross(i: Instruction) -> Step:
    """rcp.approx.ftz.f64 and rsqrt.approx{.ftz}.f64. Without .ftz rsqrt is a refined, nearly exact result."""
    name, ftz = i.opcode, i.flag("ftz")
    if name == "rcp" and not ftz:
        raise i.unsupported("expects .ftz")
    read, write = i.source(1, "f64"), i.dest(0, "f64")
    upper = U64(0xFFFFFFFF00000000)

    def step(m) -> None:
        a = read(m)
        if ftz:
            a = (np.ascontiguousarray(a).view(U64) & upper).view(np.float64)
            a = np.where(np.abs(a) < 2.0**-1022, np.copysign(0.0, a), a)
        with np.errstate(all="ignore"):
            y = EXACT[name](a)
            if ftz:
                y = perturb(name, "f64", a, y, m.approx) if m.approx else y
                y = np.where(np.abs(y) < 2.0**-1022, np.copysign(0.0, y), y)
                y = np.where(np.isnan(y), y, (y.view(U64) & upper).view(np.float64))
        write(m, canonical(y))

    return step


def divide(i: Instruction) -> Step:
    """div.full.f32 and div.approx.f32: within 2 ulp; .approx loses divisors above 2**126."""
    approximate = i.need("approx", "full") == "approx"
    ftz = i.flag("ftz")
    reads, write = [i.source(1, "f32"), i.source(2, "f32")], i.dest(0, "f32")

    def step(m) -> None:
        a, b = (flush(r(m)) if ftz else r(m) for r in reads)
        with np.errstate(all="ignore"):
            q = canonical(a / b)
            if m.approx:
                q = step_ulps(q, ~np.isfinite(b), m.approx * ULPS["div"])
            if approximate:
                huge = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
                q = np.where(huge, np.where(~np.isfinite(a), np.float32(np.nan), np.copysign(np.float32(0), q)), q)
        write(m, canonical(flush(q) if ftz else q))

    return step
