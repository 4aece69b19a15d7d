"""setp, set, selp, slct."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Instruction, Step, handles
from .packed import halves
from .values import TYPES, flush, flush_half, widen

ORDER = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
UNORDERED = {c + "u": c for c in ORDER}


def comparison(i: Instruction) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The comparison of raw operands of the instruction's type."""
    fmt = i.type.removesuffix("x2")
    kind = TYPES[fmt].kind
    names = [*ORDER]
    if kind == "u":
        names += UNSIGNED
    elif kind == "b":
        names = ["eq", "ne"]
    elif kind == "f":
        names += [*UNORDERED, "num", "nan"]
    name = i.need(*names)
    if kind != "f":
        return ORDER[UNSIGNED.get(name, name)]
    ftz = fmt in ("f32", "f16") and i.flag("ftz")

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if ftz:
            a, b = (flush(v) if fmt == "f32" else flush_half(v, fmt) for v in (a, b))
        if fmt in ("f16", "bf16"):
            a, b = widen(a, fmt), widen(b, fmt)
        nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return nan if name == "nan" else ~nan
        if name in UNORDERED:
            return ORDER[UNORDERED[name]](a, b) | nan
        return ORDER[name](a, b) & ~nan

    return compare


def combine(i: Instruction, k: int) -> Callable:
    """The optional `.and/.or/.xor` with a predicate at operand k."""
    name = i.choice("and", "or", "xor")
    if name is None:
        i.arity(k)
        return lambda m, r: r
    i.arity(k + 1)
    c = i.predicate(k)
    function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name]
    return lambda m, r: function(r, c(m))


@handles("setp", "u16 s16 u32 s32 u64 s64 b16 b32 b64 f32 f64 f16 bf16")
def setp(i: Instruction) -> Step:
    """Compare into a predicate `p`, and `p|q` with q the opposite comparison, both combined with c."""
    compare, join = comparison(i), combine(i, 3)
    a, b = i.source(1, i.type), i.source(2, i.type)
    first, second = (i.dest(d, "pred") for d in i.pair(0))

    def step(m) -> None:
        r = compare(a(m), b(m))
        p, q = join(m, r), join(m, ~r)
        first(m, p)
        second(m, q)

    return step


@handles("setp", "f16x2 bf16x2")
def setp_pair(i: Instruction) -> Step:
    """Compare both halves: p is the lower one, q the upper."""
    compare, join = comparison(i), combine(i, 3)
    a, b = i.source(1, i.type), i.source(2, i.type)
    first, second = (i.dest(d, "pred") for d in i.pair(0))

    def step(m) -> None:
        p, q = (join(m, compare(x, y)) for x, y in zip(halves(a(m), 2), halves(b(m), 2)))
        first(m, p)
        second(m, q)

    return step


TRUE = {"u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF, "u16": 0xFFFF, "s16": 0xFFFF}
TRUE |= {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}


@handles("set", "u16 s16 u32 s32 u64 s64 b16 b32 b64 f32 f64 f16 bf16")
def set_(i: Instruction) -> Step:
    """Compare into a number: all ones, or 1.0."""
    target = i.need(*TRUE)
    compare, join = comparison(i), combine(i, 3)
    a, b, write = i.source(1, i.type), i.source(2, i.type), i.dest(0, target)
    raw = f"u{TYPES[target].size}"
    return lambda m: write(m, np.where(join(m, compare(a(m), b(m))), TRUE[target], 0).astype(raw))


@handles("selp", "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64")
def selp(i: Instruction) -> Step:
    """a where the predicate holds, b elsewhere."""
    i.arity(4)
    a, b, p, write = i.source(1, i.type), i.source(2, i.type), i.predicate(3), i.dest(0, i.type)
    return lambda m: write(m, np.where(p(m), a(m), b(m)))


@handles("slct", "s32 f32")
def slct(i: Instruction) -> Step:
    """a where c >= 0, b elsewhere (also for NaN)."""
    i.arity(4)
    target = i.need("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64", i.type)
    ftz = i.type == "f32" and i.flag("ftz")
    a, b, c, write = i.source(1, target), i.source(2, target), i.source(3, i.type), i.dest(0, target)

    def step(m) -> None:
        chooser = flush(c(m)) if ftz else c(m)
        write(m, np.where(chooser >= 0, a(m), b(m)))

    return step
