"""Every instruction the PTX executor knows, against Python integers, `struct` and exact rationals."""

from __future__ import annotations

import math
import zlib
from fractions import Fraction

import pytest

np = pytest.importorskip("numpy", minversion="2.0")

import ptx_integer_cases  # noqa: E402, F401
from ptx import HANDLERS, Unsupported, load, oracle  # noqa: E402
from ptx.approx import BOUNDS, ULPS  # noqa: E402
from ptx.bench import evaluate, handler_key, kernel, samples  # noqa: E402
from ptx.oracle import FLOATS, bits_of, from_float, is_negative, to_float  # noqa: E402
from ptx_cases import CASES  # noqa: E402
from ptx_float_cases import ftz  # noqa: E402


def _same(got, want, t):
    if got == want:
        return True
    return t == "f64" and math.isnan(to_float(got, t)) and math.isnan(to_float(want, t))


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.form.replace("\n", " "))
def test_instruction(c):
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


def documented(unit, fmt, x, y):
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
def test_approximate_unit(form):
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
def test_approximate_specials(form):
    fmt = form.split(".")[-1]
    xs = [from_float(oracle.round_to(Fraction(x), fmt, "rn", is_negative(x)) if math.isfinite(x) else x, fmt)
          for x, _ in SPECIALS[form]]  # fmt: skip
    for sign in (0, 1, -1):
        (got,) = evaluate(f"{form} {{d}}, {{a}};", [(f"b{bits_of(fmt)}", xs)], [f"b{bits_of(fmt)}"], approx=sign)
        for (x, want), raw in zip(SPECIALS[form], got):
            assert _same(raw, from_float(want, fmt), fmt), (form, sign, x, hex(raw))


@pytest.mark.parametrize("form", ["div.full.f32", "div.approx.f32", "div.full.ftz.f32", "div.approx.ftz.f32"])
def test_approximate_division(form):
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
def test_unknown_is_refused(text):
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


def test_every_instruction_is_tested():
    tested = set()
    for c in CASES:
        for line in c.form.replace("{ .reg", ".reg").split("\n"):
            text = line.strip().removesuffix(" }").strip()
            if not text.startswith("."):
                tested.add(handler_key(text))
    tested |= {handler_key(f) for f in [*APPROXIMATE, "div.full.f32"]}
    missing = {k for k in HANDLERS if k[0] not in STRUCTURAL} - tested
    assert not missing, f"handlers without a test: {sorted(missing)}"
