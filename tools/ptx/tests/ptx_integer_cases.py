"""Instructions on integers and bits. Importing this adds them to the cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

np = pytest.importorskip("numpy", minversion="2.0")

from ptx.oracle import bits_of, to_int  # noqa: E402
from ptx_cases import case, ints  # noqa: E402

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
