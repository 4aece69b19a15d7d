"""Instructions on floats, conversions, comparisons and moves. Importing this adds them to the cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest

np = pytest.importorskip("numpy", minversion="2.0")

from ptx import oracle  # noqa: E402
from ptx.oracle import FLOATS, bits_of, from_float, is_negative, to_float, to_int, wrap  # noqa: E402
from ptx_cases import case, floats, ints  # noqa: E402

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
