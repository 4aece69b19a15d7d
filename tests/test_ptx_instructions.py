"""Every instruction the PTX executor knows, against Python integers, `struct` and exact rationals."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import pytest

np = pytest.importorskip("numpy", minversion="2.0")

from ptx import HANDLERS, Unsupported, load, oracle  # noqa: E402
from ptx.approx import BOUNDS, ULPS  # noqa: E402
from ptx.bench import evaluate, handler_key, kernel, samples  # noqa: E402
from ptx.oracle import FLOATS, bits_of, from_float, is_negative, to_float, to_int, wrap  # noqa: E402


@dataclass
class Case:
    """An instruction form, the types its operand bits are drawn from, its result types and the truth for one row."""

    form: str
    operands: list[str]
    results: list[str]
    truth: Callable[..., object]
    limit: list[tuple[int, int]] = field(default_factory=list)  # (operand, modulus): keep an operand small
    count: int = 512


CASES: list[Case] = []


def case(form: str, operands: str, results: str, truth: Callable[..., object], **more) -> None:
    CASES.append(Case(form, operands.split(), results.split(), truth, **more))


def ints(form: str, types: str, result: str, function: Callable[..., int], **more) -> None:
    """A case on integers: operands and result are numbers, not bits."""
    names = types.split()
    case(form, types, result, lambda *b: wrap(function(*[to_int(v, t) for v, t in zip(b, names)]), result), **more)


def floats(form: str, types: str, result: str, function: Callable[..., float], **more) -> None:
    """A case on floats: operands and result are Python floats."""
    names = types.split()

    def truth(*b: int) -> int:
        return from_float(function(*[to_float(v, t) for v, t in zip(b, names)]), result)

    case(form, types, result, truth, **more)


# -- integers

INT16, INT = ("u16", "s16"), ("u32", "s32", "u64", "s64")


def quotient(a: int, b: int) -> int:
    """Truncating division; all ones for a zero divisor, as the executor documents."""
    return -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


for t in INT16 + INT:
    n = bits_of(t)
    top, bottom = (2**n - 1, 0) if t[0] == "u" else (2 ** (n - 1) - 1, -(2 ** (n - 1)))
    ints(f"add.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: a + b)
    ints(f"sub.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: a - b)
    ints(f"mul.lo.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: a * b)
    ints(f"mul.hi.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b, n=n: (a * b) >> n)
    ints(f"mad.lo.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{t} {t} {t}", t, lambda a, b, c: a * b + c)
    ints(f"mad.hi.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{t} {t} {t}", t, lambda a, b, c, n=n: ((a * b) >> n) + c)
    ints(f"sad.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{t} {t} {t}", t, lambda a, b, c: c + abs(a - b))
    ints(f"div.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, quotient)
    ints(f"rem.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: a if b == 0 else a - quotient(a, b) * b)
    ints(f"min.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, min)
    ints(f"max.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, max)
    ints(f"shr.{t} {{d}}, {{a}}, {{b}};", f"{t} u32", t, lambda a, b: a >> min(b, 80), limit=[(1, 80)])
    if t[0] == "s":
        ints(f"neg.{t} {{d}}, {{a}};", t, t, lambda a: -a)
        ints(f"abs.{t} {{d}}, {{a}};", t, t, abs)
    if n < 64:
        w = f"{t[0]}{2 * n}"
        ints(f"mul.wide.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", w, lambda a, b: a * b)
        ints(f"mad.wide.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{t} {t} {w}", w, lambda a, b, c: a * b + c)
ints("add.sat.s32 {d}, {a}, {b};", "s32 s32", "s32", lambda a, b: max(-(2**31), min(2**31 - 1, a + b)))
ints("sub.sat.s32 {d}, {a}, {b};", "s32 s32", "s32", lambda a, b: max(-(2**31), min(2**31 - 1, a - b)))
ints("mad.hi.sat.s32 {d}, {a}, {b}, {c};", "s32 s32 s32", "s32",
     lambda a, b, c: max(-(2**31), min(2**31 - 1, ((a * b) >> 32) + c)))  # fmt: skip
ints("min.relu.s32 {d}, {a}, {b};", "s32 s32", "s32", lambda a, b: max(min(a, b), 0))
ints("max.relu.s32 {d}, {a}, {b};", "s32 s32", "s32", lambda a, b: max(a, b, 0))
ints("add.s32 {d}, {a}, -5;", "s32", "s32", lambda a: a - 5)
ints("add.u64 {d}, {a}, 0xFFFFFFFF00000000U;", "u64", "u64", lambda a: a + 0xFFFFFFFF00000000)


def low24(a: int, t: str) -> int:
    a &= 0xFFFFFF
    return a - (1 << 24) if t == "s32" and a >> 23 else a


for t in ("u32", "s32"):
    for half, shift in (("lo", 0), ("hi", 16)):
        product = lambda a, b, t=t, s=shift: (low24(a, t) * low24(b, t)) >> s  # noqa: E731
        ints(f"mul24.{half}.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, product)
        ints(f"mad24.{half}.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{t} {t} {t}", t, lambda a, b, c, p=product: p(a, b) + c)

# Carry chains work on two words at once: {x} and {y} are the upper words.
for n in (32, 64):
    for s in "us":
        t, u = f"{s}{n}", f"u{n}"
        mask = 2**n - 1

        def chain(form: str, function: Callable[[int, int], int], n: int = n, u: str = u, mask: int = mask) -> None:
            def truth(a: int, b: int, c: int, x: int) -> tuple[int, int]:
                value = function(a | c << n, b | x << n)
                return value & mask, value >> n & mask

            case(form, f"{u} {u} {u} {u}", f"{u} {u}", truth)

        chain(f"add.cc.{t} {{d}}, {{a}}, {{b}};\n  addc.{t} {{e}}, {{c}}, {{x}};", lambda a, b: a + b)
        chain(f"sub.cc.{t} {{d}}, {{a}}, {{b}};\n  subc.{t} {{e}}, {{c}}, {{x}};", lambda a, b: a - b)
        chain(f"add.cc.{t} {{d}}, {{a}}, {{b}};\n  addc.cc.{t} {{e}}, {{c}}, {{x}};", lambda a, b: a + b)
        # a * b + (c, x) in double width
        case(
            f"mad.lo.cc.{t} {{d}}, {{a}}, {{b}}, {{c}};\n  madc.hi.{t} {{e}}, {{a}}, {{b}}, {{x}};",
            f"{u} {u} {u} {u}",
            f"{u} {u}",
            lambda a, b, c, x, t=t, n=n, mask=mask: (
                (a * b + c) & mask,
                ((to_int(a, t) * to_int(b, t) >> n) + ((a * b & mask) + c >> n) + x) & mask,
            ),
        )
case(
    "add.cc.u32 {d}, {a}, {b};\n  addc.cc.u32 {e}, {c}, {x};\n  addc.u32 {d}, 0, 0;",
    "u32 u32 u32 u32",
    "u32 u32",
    lambda a, b, c, x: ((a + b + ((c + x) << 32)) >> 64 & 1, (a + b + ((c + x) << 32)) >> 32 & 0xFFFFFFFF),
)

# -- bits

for n in (16, 32, 64):
    t = f"b{n}"
    mask = 2**n - 1
    ints(f"and.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: a & b)
    ints(f"or.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: a | b)
    ints(f"xor.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: a ^ b)
    ints(f"not.{t} {{d}}, {{a}};", t, t, lambda a: ~a)
    ints(f"cnot.{t} {{d}}, {{a}};", t, t, lambda a: int(a == 0))
    ints(f"shl.{t} {{d}}, {{a}}, {{b}};", f"{t} u32", t, lambda a, b: a << min(b, 80), limit=[(1, 80)])
    ints(f"shr.{t} {{d}}, {{a}}, {{b}};", f"{t} u32", t, lambda a, b: a >> min(b, 80), limit=[(1, 80)])
case("and.pred {d}, {a}, {b};", "pred pred", "pred", lambda a, b: a & b, count=8)
case("or.pred {d}, {a}, {b};", "pred pred", "pred", lambda a, b: a | b, count=8)
case("xor.pred {d}, {a}, !{b};", "pred pred", "pred", lambda a, b: a ^ b ^ 1, count=8)
case("not.pred {d}, {a};", "pred", "pred", lambda a: a ^ 1, count=8)
case("mov.pred {d}, {a};", "pred", "pred", lambda a: a, count=8)
for direction in "lr":
    for mode in ("clamp", "wrap"):

        def funnel(a: int, b: int, c: int, left: bool = direction == "l", clamp: bool = mode == "clamp") -> int:
            shift = min(c, 32) if clamp else c & 31
            return ((a | b << 32) << shift >> 32) if left else (a | b << 32) >> shift

        ints(f"shf.{direction}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", "u32 u32 u32", "u32", funnel, limit=[(2, 70)])


def bytes_of(a: int, b: int) -> list[int]:
    return list((a | b << 32).to_bytes(8, "little"))


def prmt(a: int, b: int, c: int) -> int:
    out = 0
    for k in range(4):
        s = c >> 4 * k & 15
        byte = bytes_of(a, b)[s & 7]
        out |= ((255 if byte >> 7 else 0) if s & 8 else byte) << 8 * k
    return out


PRMT = {  # selected bytes, lowest first, for c = 0..3
    "f4e": ["0123", "1234", "2345", "3456"],
    "b4e": ["0765", "1076", "2107", "3210"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["0123", "1123", "2223", "3333"],
    "ecr": ["0000", "0111", "0122", "0123"],
    "rc16": ["0101", "2323", "0101", "2323"],
}
ints("prmt.b32 {d}, {a}, {b}, {c};", "u32 u32 u32", "u32", prmt)
for mode, rows in PRMT.items():
    ints(f"prmt.b32.{mode} {{d}}, {{a}}, {{b}}, {{c}};", "u32 u32 u32", "u32",
         lambda a, b, c, r=rows: sum(bytes_of(a, b)[int(k)] << 8 * n for n, k in enumerate(r[c & 3])))  # fmt: skip
for table in (0x96, 0xE8, 0x3C, 0x80, 0x01, 0xFE, 0xC5):
    ints(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", "u32 u32 u32", "u32",
         lambda a, b, c, t=table: sum(
             (t >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k for k in range(32)))  # fmt: skip
for n in (32, 64):
    ints(f"popc.b{n} {{d}}, {{a}};", f"u{n}", "u32", lambda a: a.bit_count())
    ints(f"clz.b{n} {{d}}, {{a}};", f"u{n}", "u32", lambda a, n=n: n - a.bit_length())
    ints(f"brev.b{n} {{d}}, {{a}};", f"u{n}", f"u{n}", lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2))
    for s in "us":
        t = f"{s}{n}"

        def bfind(a: int) -> int:
            return (~a if a < 0 else a).bit_length() - 1

        ints(f"bfind.{t} {{d}}, {{a}};", t, "u32", bfind)
        ints(f"bfind.shiftamt.{t} {{d}}, {{a}};", t, "u32", lambda a, n=n: -1 if bfind(a) < 0 else n - 1 - bfind(a))

        def bfe(a: int, b: int, c: int, n: int = n, signed: bool = s == "s") -> int:
            # The reference is the loop of the instruction's definition.
            bits, pos, length = a & (2**n - 1), b & 255, c & 255
            fill = 0 if not signed or length == 0 else bits >> min(pos + length - 1, n - 1) & 1
            return sum((bits >> pos + k & 1 if k < length and pos + k < n else fill) << k for k in range(n))

        ints(f"bfe.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{t} u32 u32", f"u{n}", bfe, limit=[(1, 80), (2, 80)])

    def bfi(a: int, b: int, c: int, d: int, n: int = n) -> int:
        pos, length = c & 255, d & 255
        for k in range(length):
            if pos + k < n:
                b = b & ~(1 << pos + k) | (a >> k & 1) << pos + k
        return b

    ints(f"bfi.b{n} {{d}}, {{a}}, {{b}}, {{c}}, {{x}};", f"u{n} u{n} u32 u32", f"u{n}", bfi, limit=[(2, 80), (3, 80)])
for mode in ("clamp", "wrap"):
    cut = (lambda v: min(v, 32)) if mode == "clamp" else (lambda v: v & 31)
    ints(f"bmsk.{mode}.b32 {{d}}, {{a}}, {{b}};", "u32 u32", "u32", lambda a, b, c=cut: (1 << c(b)) - 1 << c(a),
         limit=[(0, 40), (1, 40)])  # fmt: skip
    ints(f"szext.{mode}.u32 {{d}}, {{a}}, {{b}};", "u32 u32", "u32",
         lambda a, b, c=cut: a & (1 << c(b)) - 1, limit=[(1, 40)])  # fmt: skip
    ints(f"szext.{mode}.s32 {{d}}, {{a}}, {{b}};", "u32 u32", "s32",
         lambda a, b, c=cut: (a & (1 << c(b)) - 1) - ((a >> c(b) - 1 & 1) << c(b)) if c(b) else 0,
         limit=[(1, 40)])  # fmt: skip


def fns(mask: int, base: int, offset: int) -> int:
    base &= 31
    if offset == 0:
        return base if mask >> base & 1 else -1
    found = [k for k in (range(base, 32) if offset > 0 else range(base, -1, -1)) if mask >> k & 1]
    return found[abs(offset) - 1] if abs(offset) <= len(found) else -1


ints("fns.b32 {d}, {a}, {b}, {c};", "u32 u32 s32", "u32", fns, limit=[(1, 32), (2, 9)])
ints("fns.b32 {d}, {a}, {b}, -2;", "u32 u32", "u32", lambda a, b: fns(a, b, -2), limit=[(1, 32)])
for x in "us":
    for y in "us":
        t = "s32" if "s" in x + y else "u32"
        ints(f"dp4a.{x}32.{y}32 {{d}}, {{a}}, {{b}}, {{c}};", f"u32 u32 {t}", t,
             lambda a, b, c, x=x, y=y: c + sum(
                 to_int(a >> 8 * k & 255, x + "8") * to_int(b >> 8 * k & 255, y + "8") for k in range(4)))  # fmt: skip

# -- fp32 and fp64

MODES = ("rn", "rz", "rm", "rp")
for t in ("f32", "f64"):
    for mode in MODES:
        floats(f"add.{mode}.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b, t=t, m=mode: oracle.add(a, b, t, m))
        floats(f"sub.{mode}.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b, t=t, m=mode: oracle.add(a, -b, t, m))
        floats(f"mul.{mode}.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b, t=t, m=mode: oracle.mul(a, b, t, m))
        truth = lambda a, b, c, t=t, m=mode: oracle.fma(a, b, c, t, m)  # noqa: E731
        floats(f"fma.{mode}.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{t} {t} {t}", t, truth, count=2048)
        floats(f"div.{mode}.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b, t=t, m=mode: oracle.div(a, b, t, m))
        floats(f"rcp.{mode}.{t} {{d}}, {{a}};", t, t, lambda a, t=t, m=mode: oracle.div(1.0, a, t, m))
        floats(f"sqrt.{mode}.{t} {{d}}, {{a}};", t, t, lambda a, t=t, m=mode: oracle.sqrt(a, t, m))
    floats(f"mad.rn.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{t} {t} {t}", t, lambda a, b, c, t=t: oracle.fma(a, b, c, t))
    floats(f"neg.{t} {{d}}, {{a}};", t, t, lambda a: -a)
    floats(f"abs.{t} {{d}}, {{a}};", t, t, abs)
    floats(f"min.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: oracle.minmax(a, b, False))
    floats(f"max.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t, lambda a, b: oracle.minmax(a, b, True))
    n = bits_of(t)
    case(f"copysign.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t,
         lambda a, b, n=n: b & ~(1 << n - 1) | a & 1 << n - 1)  # fmt: skip
    smallest = 2.0 ** FLOATS[t][1]
    for kind, holds in {
        "finite": math.isfinite,
        "infinite": math.isinf,
        "number": lambda v: not math.isnan(v),
        "notanumber": math.isnan,
        "normal": lambda v, s=smallest: math.isfinite(v) and abs(v) >= s,
        "subnormal": lambda v, s=smallest: 0 < abs(v) < s,
    }.items():
        case(f"testp.{kind}.{t} {{d}}, {{a}};", t, "pred", lambda a, t=t, f=holds: int(f(to_float(a, t))))
ftz = oracle.flush
f3 = "f32 f32 f32"
floats("add.ftz.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: ftz(oracle.add(ftz(a), ftz(b), "f32")))
floats("sub.ftz.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: ftz(oracle.add(ftz(a), -ftz(b), "f32")))
floats("mul.rz.ftz.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: ftz(oracle.mul(ftz(a), ftz(b), "f32", "rz")))
floats("fma.rn.ftz.f32 {d}, {a}, {b}, {c};", f3, "f32", lambda a, b, c: ftz(oracle.fma(ftz(a), ftz(b), ftz(c), "f32")))
floats("add.sat.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: oracle.saturate(oracle.add(a, b, "f32")))
floats("mul.sat.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: oracle.saturate(oracle.mul(a, b, "f32")))
floats("fma.rn.sat.f32 {d}, {a}, {b}, {c};", f3, "f32", lambda a, b, c: oracle.saturate(oracle.fma(a, b, c, "f32")))
floats("div.rn.ftz.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: ftz(oracle.div(ftz(a), ftz(b), "f32")))
floats("sqrt.rn.ftz.f32 {d}, {a};", "f32", "f32", lambda a: ftz(oracle.sqrt(ftz(a), "f32")))
floats("abs.ftz.f32 {d}, {a};", "f32", "f32", lambda a: abs(ftz(a)))
floats("min.NaN.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: oracle.minmax(a, b, False, True))
floats("max.NaN.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: oracle.minmax(a, b, True, True))
floats("max.ftz.f32 {d}, {a}, {b};", "f32 f32", "f32", lambda a, b: oracle.minmax(ftz(a), ftz(b), True))
floats("max.f32 {d}, {a}, {b}, {c};", f3, "f32", lambda a, b, c: oracle.minmax(oracle.minmax(a, b, True), c, True))
floats("min.NaN.f32 {d}, {a}, {b}, {c};", f3, "f32",
       lambda a, b, c: oracle.minmax(oracle.minmax(a, b, False, True), c, False, True))  # fmt: skip
for t in ("f32", "f16", "bf16"):
    floats(f"min.xorsign.abs.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", t,
           lambda a, b: math.copysign(oracle.minmax(abs(a), abs(b), False),
                                      -1.0 if is_negative(a) != is_negative(b) else 1.0))  # fmt: skip
floats("add.f32 {d}, {a}, 0f3FC00000;", "f32", "f32", lambda a: oracle.add(a, 1.5, "f32"))
floats("add.f64 {d}, {a}, 0dC004000000000000;", "f64", "f64", lambda a: oracle.add(a, -2.5, "f64"))

# -- fp16, bf16 and pairs


def packed(form: str, fmt: str, arity: int, function: Callable[..., float]) -> None:
    """The scalar form, and the x2 form on two independent halves."""
    width = FLOATS[fmt][3]

    def pair(*words: int) -> int:
        parts = [[w >> k * width & (1 << width) - 1 for w in words] for k in (0, 1)]
        low, high = (from_float(function(*[to_float(v, fmt) for v in p]), fmt) for p in parts)
        return low | high << width

    if fmt != "f32":
        floats(form.replace("TYPE", fmt), " ".join([fmt] * arity), fmt, function)
    # The columns hold one half each; the form joins them and the truth sees the joined words.
    wide = fmt + "x2"
    names = "abcxyz"[: 2 * arity]
    size = 2 * width
    lines = [f"{{ .reg .b{size} %w<{arity}>;"]
    for k in range(arity):
        lines.append(f"mov.b{size} %w{k}, {{ {{{names[2 * k]}}}, {{{names[2 * k + 1]}}} }};")
    body = form.replace("TYPE", wide)
    for k in range(arity):
        body = body.replace("{" + "abc"[k] + "}", f"%w{k}")
    text = "\n  ".join([*lines, body]) + " }"
    truth = lambda *h: pair(*[h[2 * k] | h[2 * k + 1] << width for k in range(arity)])  # noqa: E731
    case(text, " ".join([fmt] * (2 * arity)), f"b{size}", truth)


def relu(v: float) -> float:
    return v if math.isnan(v) or v > 0 else 0.0


for fmt in ("f16", "bf16"):
    for rn in ("", ".rn"):
        packed(f"add{rn}.TYPE {{d}}, {{a}}, {{b}};", fmt, 2, lambda a, b, f=fmt: oracle.add(a, b, f))
    packed("sub.TYPE {d}, {a}, {b};", fmt, 2, lambda a, b, f=fmt: oracle.add(a, -b, f))
    packed("mul.TYPE {d}, {a}, {b};", fmt, 2, lambda a, b, f=fmt: oracle.mul(a, b, f))
    packed("fma.rn.TYPE {d}, {a}, {b}, {c};", fmt, 3, lambda a, b, c, f=fmt: oracle.fma(a, b, c, f))
    packed("fma.rn.relu.TYPE {d}, {a}, {b}, {c};", fmt, 3, lambda a, b, c, f=fmt: relu(oracle.fma(a, b, c, f)))
    packed("min.TYPE {d}, {a}, {b};", fmt, 2, lambda a, b: oracle.minmax(a, b, False))
    packed("max.TYPE {d}, {a}, {b};", fmt, 2, lambda a, b: oracle.minmax(a, b, True))
    packed("max.NaN.TYPE {d}, {a}, {b};", fmt, 2, lambda a, b: oracle.minmax(a, b, True, True))
    for op, bit in (("neg", lambda v: v ^ 0x8000), ("abs", lambda v: v & 0x7FFF)):  # bits, also of NaN
        case(f"{op}.{fmt} {{d}}, {{a}};", "u16", "u16", bit)
        case(f"{op}.{fmt}x2 {{d}}, {{a}};", "u32", "u32", lambda a, g=bit: g(a & 0xFFFF) | g(a >> 16) << 16)
h = lambda v: oracle.flush(v, "f16")  # noqa: E731
floats("add.ftz.f16 {d}, {a}, {b};", "f16 f16", "f16", lambda a, b: h(oracle.add(h(a), h(b), "f16")))
floats("mul.sat.f16 {d}, {a}, {b};", "f16 f16", "f16", lambda a, b: oracle.saturate(oracle.mul(a, b, "f16")))
floats("fma.rn.ftz.sat.f16 {d}, {a}, {b}, {c};", "f16 f16 f16", "f16",
       lambda a, b, c: h(oracle.saturate(oracle.fma(h(a), h(b), h(c), "f16"))))  # fmt: skip
for mode in ("rn", "rz"):
    packed(f"add.{mode}.TYPE {{d}}, {{a}}, {{b}};", "f32", 2, lambda a, b, m=mode: oracle.add(a, b, "f32", m))
    packed(f"sub.{mode}.TYPE {{d}}, {{a}}, {{b}};", "f32", 2, lambda a, b, m=mode: oracle.add(a, -b, "f32", m))
    packed(f"mul.{mode}.TYPE {{d}}, {{a}}, {{b}};", "f32", 2, lambda a, b, m=mode: oracle.mul(a, b, "f32", m))
    fused = lambda a, b, c, m=mode: oracle.fma(a, b, c, "f32", m)  # noqa: E731
    packed(f"fma.{mode}.TYPE {{d}}, {{a}}, {{b}}, {{c}};", "f32", 3, fused)
packed("fma.rn.ftz.TYPE {d}, {a}, {b}, {c};", "f32", 3, lambda a, b, c: ftz(oracle.fma(ftz(a), ftz(b), ftz(c), "f32")))

# -- conversions

INTS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def limits(t: str) -> tuple[int, int]:
    n = bits_of(t)
    return (0, 2**n - 1) if t[0] == "u" else (-(2 ** (n - 1)), 2 ** (n - 1) - 1)


def register(t: str) -> str:
    """Bits a register of this type has in the test kernel: 8-bit values sit in 16."""
    return t if bits_of(t) > 8 else "u16"


for source in INTS:
    for target in INTS:
        wide = target if bits_of(target) > 8 else target[0] + "16"
        ints(f"cvt.{target}.{source} {{d}}, {{a}};", register(source), register(target),
             lambda a, s=source, t=target: to_int(wrap(to_int(a, s), t), t), count=64)  # fmt: skip
    for target in ("u8", "s8", "s16", "u32", "s32"):
        ints(f"cvt.sat.{target}.{source} {{d}}, {{a}};", register(source), register(target),
             lambda a, s=source, t=target: max(limits(t)[0], min(limits(t)[1], to_int(a, s))), count=64)  # fmt: skip
    for target in FLOATS:
        for mode in MODES:
            case(f"cvt.{mode}.{target}.{source} {{d}}, {{a}};", register(source), target,
                 lambda a, s=source, t=target, m=mode: from_float(
                     oracle.round_to(Fraction(to_int(a, s)), t, m), t), count=128)  # fmt: skip
ints("cvt.s64.s32 {d}, {a};", "s32", "s64", lambda a: a)
ints("cvt.u16.u32 {d}, {a};", "u32", "u16", lambda a: a)


def to_integer(value: float, source: str, target: str, mode: str) -> int:
    low, high = limits(target)
    if math.isnan(value):
        return to_int(1 << bits_of(target) - 1, target) if source == "f64" or bits_of(target) == 64 else 0
    if math.isinf(value):
        return high if value > 0 else low
    return max(low, min(high, ROUND[mode](Fraction(value))))


for source in FLOATS:
    for target in INTS:
        for mode in ROUND:
            case(f"cvt.{mode}.{target}.{source} {{d}}, {{a}};", source, register(target),
                 lambda a, s=source, t=target, m=mode: wrap(to_integer(to_float(a, s), s, t, m), register(t)),
                 count=128)  # fmt: skip


def convert(value: float, target: str, mode: str = "rn") -> float:
    if not math.isfinite(value):
        return value
    return oracle.round_to(Fraction(value), target, mode, is_negative(value))


def integral(value: float, mode: str) -> float:
    return math.copysign(float(ROUND[mode](Fraction(value))), value) if math.isfinite(value) else value


for source in FLOATS:
    for target in FLOATS:
        narrowing = FLOATS[target][0] < FLOATS[source][0] or {source, target} == {"f16", "bf16"}
        for mode in MODES if narrowing else ("",):
            floats(f"cvt{'.' + mode if mode else ''}.{target}.{source} {{d}}, {{a}};", source, target,
                   lambda a, t=target, m=mode: convert(a, t, m or "rn"))  # fmt: skip
    for mode in ROUND:
        floats(f"cvt.{mode}.{source}.{source} {{d}}, {{a}};", source, source, lambda a, m=mode: integral(a, m))
floats("cvt.rn.ftz.f32.f64 {d}, {a};", "f64", "f32", lambda a: ftz(convert(a, "f32")))
floats("cvt.ftz.f64.f32 {d}, {a};", "f32", "f64", ftz)
floats("cvt.sat.f32.f32 {d}, {a};", "f32", "f32", oracle.saturate)
floats("cvt.rn.sat.f32.f64 {d}, {a};", "f64", "f32", lambda a: oracle.saturate(convert(a, "f32")))
floats("cvt.rn.ftz.f16.f32 {d}, {a};", "f32", "f16", lambda a: convert(ftz(a), "f16"))
for fmt in ("f16", "bf16"):
    largest = float((2 - Fraction(2) ** (1 - FLOATS[fmt][0])) * Fraction(2) ** FLOATS[fmt][2])
    floats(f"cvt.rn.relu.{fmt}.f32 {{d}}, {{a}};", "f32", fmt, lambda a, f=fmt: relu(convert(a, f)))
    floats(f"cvt.rn.satfinite.{fmt}.f32 {{d}}, {{a}};", "f32", fmt,
           lambda a, f=fmt, m=largest: v if math.isnan(v := convert(a, f)) else max(-m, min(m, v)))  # fmt: skip
    for mode in ("rn", "rz", "rn.relu"):
        edit = relu if "relu" in mode else lambda v: v
        case(f"cvt.{mode}.{fmt}x2.f32 {{d}}, {{a}}, {{b}};", "f32 f32", "b32",
             lambda a, b, f=fmt, m=mode[:2], e=edit: from_float(e(convert(to_float(a, "f32"), f, m)), f) << 16
             | from_float(e(convert(to_float(b, "f32"), f, m)), f))  # fmt: skip


def tf32(a: int, mode: str) -> int:
    """11 bits of significand in the upper bits of an fp32."""
    value = to_float(a, "f32")
    if math.isnan(value):
        return 0x7FFFFFFF
    if math.isinf(value):
        return a
    low = a & 0x1FFF
    up = {"rz": False, "rna": low >= 0x1000, "rn": low > 0x1000 or (low == 0x1000 and a >> 13 & 1)}[mode]
    return (a & ~0x1FFF) + (0x2000 if up else 0)


for mode in ("rna", "rn", "rz"):
    case(f"cvt.{mode}.tf32.f32 {{d}}, {{a}};", "f32", "b32", lambda a, m=mode: tf32(a, m))

# -- comparisons

COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
ALIAS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def float_compare(name: str, a: float, b: float) -> bool:
    nan = math.isnan(a) or math.isnan(b)
    if name in ("num", "nan"):
        return nan == (name == "nan")
    if name.endswith("u"):
        return nan or COMPARE[name[:-1]](a, b)
    return not nan and COMPARE[name](a, b)


for t in ("u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64"):
    names = list(COMPARE) if t[0] != "b" else ["eq", "ne"]
    for name in names + (list(ALIAS) if t[0] == "u" else []):
        holds = COMPARE[ALIAS.get(name, name)]
        case(f"setp.{name}.{t} {{d}}|{{e}}, {{a}}, {{b}};", f"{t} {t}", "pred pred",
             lambda a, b, f=holds, t=t: (int(f(to_int(a, t), to_int(b, t))), int(not f(to_int(a, t), to_int(b, t)))),
             count=200)  # fmt: skip
    case(f"set.ne.u32.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", "u32", lambda a, b: 0xFFFFFFFF if a != b else 0)
for t in FLOATS:
    for name in [*COMPARE, *(c + "u" for c in COMPARE), "num", "nan"]:
        case(f"setp.{name}.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", "pred",
             lambda a, b, n=name, t=t: int(float_compare(n, to_float(a, t), to_float(b, t))), count=400)  # fmt: skip
    case(f"set.lt.s32.{t} {{d}}, {{a}}, {{b}};", f"{t} {t}", "u32",
         lambda a, b, t=t: 0xFFFFFFFF if float_compare("lt", to_float(a, t), to_float(b, t)) else 0)  # fmt: skip
case("set.geu.f32.f32 {d}, {a}, {b};", "f32 f32", "f32",
     lambda a, b: 0x3F800000 if float_compare("geu", to_float(a, "f32"), to_float(b, "f32")) else 0)  # fmt: skip
case("setp.eq.ftz.f32 {d}, {a}, {b};", "f32 f32", "pred",
     lambda a, b: int(float_compare("eq", ftz(to_float(a, "f32")), ftz(to_float(b, "f32")))))  # fmt: skip
for name, join in {"and": lambda p, c: p & c, "or": lambda p, c: p | c, "xor": lambda p, c: p ^ c}.items():
    case(f"setp.lt.{name}.s32 {{d}}|{{e}}, {{a}}, {{b}}, !{{c}};", "s32 s32 pred", "pred pred",
         lambda a, b, c, j=join: (j(int(to_int(a, "s32") < to_int(b, "s32")), 1 - c),
                                  j(int(to_int(a, "s32") >= to_int(b, "s32")), 1 - c)))  # fmt: skip
    case(f"set.gt.{name}.u32.u32 {{d}}, {{a}}, {{b}}, {{c}};", "u32 u32 pred", "u32",
         lambda a, b, c, j=join: 0xFFFFFFFF * j(int(a > b), c))  # fmt: skip
for fmt in ("f16", "bf16"):
    case(f"setp.leu.{fmt}x2 {{d}}|{{e}}, {{a}}, {{b}};", "u32 u32", "pred pred",
         lambda a, b, f=fmt: tuple(
             int(float_compare("leu", to_float(a >> s & 0xFFFF, f), to_float(b >> s & 0xFFFF, f))) for s in (0, 16)),
         count=1024)  # fmt: skip
for t in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"):
    raw = f"u{bits_of(t)}"
    case(f"selp.{t} {{d}}, {{a}}, {{b}}, {{c}};", f"{raw} {raw} pred", raw, lambda a, b, c: a if c else b, count=64)
    case(f"slct.{t}.s32 {{d}}, {{a}}, {{b}}, {{c}};", f"{raw} {raw} s32", raw,
         lambda a, b, c: a if to_int(c, "s32") >= 0 else b, count=256)  # fmt: skip
case("slct.b32.f32 {d}, {a}, {b}, {c};", "u32 u32 f32", "u32", lambda a, b, c: a if to_float(c, "f32") >= 0 else b)
case("slct.ftz.b32.f32 {d}, {a}, {b}, {c};", "u32 u32 f32", "u32",
     lambda a, b, c: a if ftz(to_float(c, "f32")) >= 0 else b)  # fmt: skip

# -- moves

for t in ("b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"):
    raw = f"u{bits_of(t)}"
    case(f"mov.{t} {{d}}, {{a}};", raw, raw, lambda a: a, count=64)
case("mov.b32 {d}, { {a}, {b} };", "u16 u16", "u32", lambda a, b: a | b << 16, count=64)
case("mov.b64 {d}, { {a}, {b} };", "u32 u32", "u64", lambda a, b: a | b << 32, count=64)
case("mov.b64 {d}, { {a}, {b}, {c}, {x} };", "u16 u16 u16 u16", "u64",
     lambda a, b, c, x: a | b << 16 | c << 32 | x << 48, count=64)  # fmt: skip
case("mov.b32 { {d}, {e} }, {a};", "u32", "u16 u16", lambda a: (a & 0xFFFF, a >> 16), count=64)
case("mov.b64 { {d}, _ }, {a};", "u64", "u32", lambda a: a & 0xFFFFFFFF, count=64)
case("mov.f32 {d}, 0fBF800000;", "u32", "u32", lambda a: 0xBF800000, count=8)
case("mov.u32 {d}, WARP_SZ;", "u32", "u32", lambda a: 32, count=8)


def _same(got: int, want: int, t: str) -> bool:
    if got == want:
        return True
    return t == "f64" and math.isnan(to_float(got, t)) and math.isnan(to_float(want, t))


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.form.replace("\n", " "))
def test_instruction(c: Case) -> None:
    columns = samples(c.operands, zlib.crc32(c.form.encode()), c.count)
    for k, modulus in c.limit:
        columns[k] = [v % modulus for v in columns[k]]
    got = evaluate(c.form, list(zip(c.operands, columns)), c.results)
    for row, values in enumerate(zip(*columns)):
        want = c.truth(*values)
        want = want if isinstance(want, tuple) else (want,)
        for n, t in enumerate(c.results):
            shown = ", ".join(hex(v) for v in values)
            assert _same(got[n][row], want[n], t), f"{c.form} on {shown}: {got[n][row]:#x}, not {want[n]:#x}"


# -- approximate units: right to one unit in the last place, and moved by the documented error when asked to

UNITS = {
    "ex2": (lambda x: 2.0**x, (-20.0, 20.0)),
    "lg2": (math.log2, (1e-3, 1e3)),
    "sin": (math.sin, (-6.0, 6.0)),
    "cos": (math.cos, (-6.0, 6.0)),
    "tanh": (math.tanh, (-4.0, 4.0)),
    "rcp": (lambda x: 1 / x, (0.01, 100.0)),
    "sqrt": (math.sqrt, (0.01, 100.0)),
    "rsqrt": (lambda x: 1 / math.sqrt(x), (0.01, 100.0)),
}
APPROXIMATE = [
    *(f"{u}.approx{z}.f32" for u in UNITS for z in ("", ".ftz") if (u, z) != ("tanh", ".ftz")),
    *("ex2.approx.f16", "ex2.approx.f16x2", "ex2.approx.ftz.bf16", "ex2.approx.ftz.bf16x2"),
    *("tanh.approx.f16", "tanh.approx.f16x2", "tanh.approx.bf16", "tanh.approx.bf16x2"),
    *("rsqrt.approx.f64", "rsqrt.approx.ftz.f64", "rcp.approx.ftz.f64"),
]


def documented(unit: str, fmt: str, x: float, y: float) -> float:
    """The bound on the absolute error of unit(x) == y."""
    if unit == "lg2":
        return 2.0**-22 if 0.5 < x < 2 else abs(y) * 2.0**-22
    if unit in ("sin", "cos"):
        return 2.0**-20.5
    if fmt == "f32" and unit in ULPS:
        return ULPS[unit] * 2.0 ** (math.frexp(y)[1] - 24)
    relative, absolute = BOUNDS[unit, fmt]
    return relative * abs(y) + absolute


@pytest.mark.parametrize("form", APPROXIMATE)
def test_approximate_unit(form: str) -> None:
    unit, fmt = form.split(".")[0], form.split(".")[-1].removesuffix("x2")
    pair = form.endswith("x2")
    truth, (low, high) = UNITS[unit]
    if fmt in ("f16", "bf16"):
        low, high = low / 2, high / 2  # keeps clear of subnormal results
    steps = [from_float(oracle.round_to(Fraction(low + (high - low) * k / 255), fmt), fmt) for k in range(256)]
    if fmt == "f64":  # the gross units see the upper half only
        steps = [s & 0xFFFFFFFF00000000 for s in steps]
    words = [s | steps[-1 - k] << 16 for k, s in enumerate(steps)] if pair else steps
    width = f"b{bits_of(fmt) * (2 if pair else 1)}"
    ulp = 2.0 ** (1 - FLOATS[fmt][0])
    gross = form in ("rsqrt.approx.ftz.f64", "rcp.approx.ftz.f64")
    for sign in (0, 1, -1):
        (got,) = evaluate(f"{form} {{d}}, {{a}};", [(width, words)], [width], approx=sign)
        for raw, out in zip(steps, got):
            x, y = to_float(raw, fmt), to_float(out & (1 << bits_of(fmt)) - 1, fmt)
            exact = truth(x)
            error = documented(unit, fmt, x, exact) if (unit, form) != ("rsqrt", "rsqrt.approx.f64") else 0.0
            slack = abs(exact) * (2.0**-20 if gross else ulp) * 1.01 + 1e-300
            assert abs(y - (exact + sign * error)) <= slack, (form, sign, x, y, exact)


SPECIALS = {  # operand: result, as tabulated for each unit
    "ex2.approx.f32": [(-math.inf, 0.0), (0.0, 1.0), (-0.0, 1.0), (math.inf, math.inf), (math.nan, math.nan)],
    "lg2.approx.f32": [(0.0, -math.inf), (-1.0, math.nan), (math.inf, math.inf), (math.nan, math.nan)],
    "sin.approx.f32": [(0.0, 0.0), (-0.0, -0.0), (math.inf, math.nan), (math.nan, math.nan)],
    "cos.approx.f32": [(0.0, 1.0), (-0.0, 1.0), (math.inf, math.nan)],
    "tanh.approx.f32": [(math.inf, 1.0), (-math.inf, -1.0), (0.0, 0.0), (-0.0, -0.0), (math.nan, math.nan)],
    "rcp.approx.f32": [(0.0, math.inf), (-0.0, -math.inf), (math.inf, 0.0), (-math.inf, -0.0), (math.nan, math.nan)],
    "rcp.approx.ftz.f32": [(2.0**-140, math.inf), (2.0**127.5, 0.0)],
    "sqrt.approx.f32": [(0.0, 0.0), (-0.0, -0.0), (math.inf, math.inf), (-1.0, math.nan)],
    "rsqrt.approx.f32": [(0.0, math.inf), (-0.0, -math.inf), (math.inf, 0.0), (-1.0, math.nan)],
    "rcp.approx.ftz.f64": [(0.0, math.inf), (-math.inf, -0.0), (2.0**-1070, math.inf)],
    "rsqrt.approx.f64": [(0.0, math.inf), (math.inf, 0.0), (-1.0, math.nan)],
}


@pytest.mark.parametrize("form", SPECIALS)
def test_approximate_specials(form: str) -> None:
    fmt = form.split(".")[-1]
    xs = [from_float(oracle.round_to(Fraction(x), fmt, "rn", is_negative(x)) if math.isfinite(x) else x, fmt)
          for x, _ in SPECIALS[form]]  # fmt: skip
    for sign in (0, 1, -1):
        (got,) = evaluate(f"{form} {{d}}, {{a}};", [(f"b{bits_of(fmt)}", xs)], [f"b{bits_of(fmt)}"], approx=sign)
        for (x, want), raw in zip(SPECIALS[form], got):
            assert _same(raw, from_float(want, fmt), fmt), (form, sign, x, hex(raw))


@pytest.mark.parametrize("form", ["div.full.f32", "div.approx.f32", "div.full.ftz.f32", "div.approx.ftz.f32"])
def test_approximate_division(form: str) -> None:
    columns = samples(["f32", "f32"], 5)
    edit = ftz if "ftz" in form else lambda v: v
    for sign in (0, 1, -1):
        (got,) = evaluate(f"{form} {{d}}, {{a}}, {{b}};", list(zip(["f32", "f32"], columns)), ["f32"], approx=sign)
        moved = 0
        for a, b, raw in zip(*columns, got):
            x, y = edit(to_float(a, "f32")), edit(to_float(b, "f32"))
            if "approx" in form and 2.0**126 < abs(y) < math.inf:
                assert math.isfinite(x) == (to_float(raw, "f32") == 0.0)
                assert math.isfinite(x) or math.isnan(to_float(raw, "f32"))
                continue
            want = from_float(edit(oracle.div(x, y, "f32")), "f32")
            ends = math.isinf(to_float(want, "f32")) or math.isinf(y) or to_float(want, "f32") == 0
            flushed = "ftz" in form and to_float(raw, "f32") == 0 and abs(to_float(want, "f32")) < 2.0**-125
            assert flushed or abs(raw - want) <= (0 if sign == 0 or ends else 2), (form, sign, x, y)
            moved += raw != want
        assert (moved > 100) == (sign != 0)


# -- refusals

REFUSED = [
    "wgmma.fence.sync.aligned;",
    "tcgen05.wait::ld.sync.aligned;",
    "mbarrier.init.shared.b64 [%r0], 1;",
    "cp.async.bulk.commit_group;",
    "cp.async.mbarrier.arrive.shared.b64 [%r0];",
    "add.f128 %f0, %f1, %f2;",
    "add.rn.wild.f32 %f0, %f1, %f2;",
    "add.ftz.f64 %d0, %d1, %d2;",
    "fma.f32 %f0, %f1, %f2, %f3;",
    "div.f32 %f0, %f1, %f2;",
    "cvt.f32.f64 %f0, %d0;",
    "cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;",
    "mov.u32 %r0, %clock;",
    "mov.u64 %d0, %globaltimer;",
    "mov.u32 %r0, %smid;",
    "add.s32 %r0, %d0, %r1;",
    "add.s32 %r0, %r1;",
    "add.s32 %r0, %r1, nonsense;",
    "vadd.s32.u32.s32 %r0, %r1, %r2;",
    "tex.2d.v4.f32.f32 {%f0,%f1,%f2,%f3}, [t, {%f4,%f5}];",
    "call %d0, (p), proto;",
    "call missing;",
    "bra nowhere;",
    "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%r0,%r1}, {%r4}, {%r8}, {%r0,%r1};",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.f16.f32 {%f0,%f1,%f2,%f3}, {%r0,%r1}, {%r4}, {%f0,%f1,%f2,%f3};",
    "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%r2];",
    "atom.global.add.f16 %h0, [%d0], %h1;",
    "atom.global.sub.u32 %r0, [%d0], %r1;",
    "atom.global.exch.b128 %r0, [%d0], %r1;",
    "shfl.bfly.b32 %r0, %r1, 1, 31;",
    "ld.global.v3.f32 {%f0,%f1,%f2}, [%d0];",
    "ld.shared::cluster.f32 %f0, [%r0];",
    "setmaxnreg.inc.sync.aligned.u32 40;",
    "multimem.red.add.f32 [%d0], %f0;",
    "discard.global.L2 [%d0], 128;",
    "alloca.u64 %d0, 16;",
    "barrier.cluster.arrive;",
]


@pytest.mark.parametrize("text", REFUSED)
def test_unknown_is_refused(text: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        load(kernel("  " + text, 1))
    assert text.split()[0].rstrip(";") in str(refusal.value)


# -- completeness

STRUCTURAL = {  # covered by whole kernels in test_ptx_machine.py
    "bra", "brx", "ret", "exit", "trap", "call", "bar", "barrier", "membar", "fence", "griddepcontrol", "nanosleep",
    "ld", "ldu", "st", "cvta", "isspacep", "prefetch", "prefetchu", "applypriority", "discard", "createpolicy",
    "atom", "red", "shfl", "vote", "activemask", "match", "redux", "elect", "cp", "mma", "ldmatrix", "stmatrix",
    "movmatrix",
}  # fmt: skip


def test_every_instruction_is_tested() -> None:
    tested = set()
    for c in CASES:
        for line in c.form.replace("{ .reg", ".reg").split("\n"):
            text = line.strip().removesuffix(" }").strip()
            if not text.startswith("."):
                tested.add(handler_key(text))
    tested |= {handler_key(f) for f in [*APPROXIMATE, "div.full.f32"]}
    missing = {k for k in HANDLERS if k[0] not in STRUCTURAL} - tested
    assert not missing, f"handlers without a test: {sorted(missing)}"
