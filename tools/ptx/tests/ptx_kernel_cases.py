"""Kernels on memory, control flow, barriers and atomics.

Each case is a kernel body, its buffers and the contents they must have afterwards, computed with plain Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

np = pytest.importorskip("numpy", minversion="2.0")

from ptx.bench import kernel  # noqa: E402
from ptx.oracle import wrap  # noqa: E402
from ptx.values import TYPES  # noqa: E402

U8, U16, U32, U64, F32 = np.uint8, np.uint16, np.uint32, np.uint64, np.float32


@dataclass
class Case:
    """A kernel body, buffers before, and a function from those to the buffers after (None: whatever)."""

    name: str
    text: str
    before: list
    after: Callable[..., Sequence]
    grid: tuple[int, ...] = (1,)
    block: tuple[int, ...] = (64,)
    shared: int = 0
    launch: dict = field(default_factory=dict)


CASES: list[Case] = []


def case(name: str, body: str, before: list, after: Callable, registers: str = "", module: str = "", **more) -> None:
    CASES.append(Case(name, kernel(body, len(before), registers, module), before, after, **more))


def each(size: int, n: int = 0, register: str = "%at") -> str:
    """The address of this thread's element of buffer n."""
    return f"mad.wide.u32 {register}, %i, {size}, %in{n};"


def numbers(dtype, count: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, count * np.dtype(dtype).itemsize, dtype=U8).view(dtype)


# -- loads and stores

MEMORY = ["b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64"]
for t in MEMORY:
    size = TYPES[t].size
    letter = {1: "h", 2: "h", 4: "f" if t == "f32" else "r", 8: "d"}[size]
    for v in (1, 2, 4, 8):
        if v * size > 32:
            continue
        suffix = f".v{v}" if v > 1 else ""
        regs = ", ".join(f"%{letter}{k}" for k in range(v))
        regs = f"{{{regs}}}" if v > 1 else regs
        for op in ("ld", "ldu") if v == 1 else ("ld",):
            case(
                f"{op}{suffix}.{t}",
                f"{each(size * v)} {op}.global{suffix}.{t} {regs}, [%at];\n"
                f"{each(size * v, 1)} st.global{suffix}.{t} [%at], {regs};",
                [numbers(U8, 64 * size * v), np.zeros(64 * size * v, U8)],
                lambda a, b: (a, a),
            )
for t, dtype in (("u8", U8), ("s8", np.int8), ("u16", U16), ("s16", np.int16), ("s32", np.int32), ("u32", U32)):
    case(
        f"extend {t}",
        f"{each(dtype().itemsize)}\nld.global.{t} %d0, [%at];\n{each(8, 1)}\nst.global.b64 [%at], %d0;",
        [numbers(dtype, 64), np.zeros(64, np.int64)],
        lambda a, b: (a, a.astype(np.int64)),
    )
for load_form, store_form in (
    ("ld.global.nc.L1::no_allocate.L2::128B.f32", "st.global.wt.f32"),
    ("ld.volatile.global.f32", "st.volatile.global.f32"),
    ("ld.relaxed.gpu.global.f32", "st.relaxed.sys.global.f32"),
    ("ld.acquire.gpu.global.f32", "st.release.gpu.global.f32"),
    ("ld.global.ca.f32", "st.global.cs.f32"),
    ("ld.weak.global.L1::evict_last.f32", "st.weak.global.L1::evict_first.f32"),
    ("ld.f32", "st.f32"),
):
    case(
        load_form,
        f"{each(4)}\n{load_form} %f0, [%at];\n{each(4, 1)}\n{store_form} [%at], %f0;",
        [np.arange(64, dtype=F32), np.zeros(64, F32)],
        lambda a, b: (a, a),
    )
case(
    "cache policy",
    f"""createpolicy.fractional.L2::evict_last.b64 %d0, 1.0;
    {each(4)}
    prefetch.global.L2 [%at]; prefetchu.L1 [%at]; applypriority.global.L2::evict_normal [%at], 128;
    ld.global.L2::cache_hint.b32 %r0, [%at], %d0;
    {each(4, 1)}
    st.global.L2::cache_hint.b32 [%at+0], %r0, %d0;""",
    [numbers(U32, 64), np.zeros(64, U32)],
    lambda a, b: (a, a),
)
case(
    "shared, generic and named",
    f"""shl.b32 %r1, %i, 2;
    mov.u32 %r2, buf;
    add.u32 %r3, %r2, %r1;
    st.shared.u32 [%r3], %i;
    bar.sync 0;
    mov.u64 %d0, buf;
    cvta.shared.u64 %d1, %d0;
    sub.u32 %r4, 63, %i;
    mad.wide.u32 %d2, %r4, 4, %d1;
    ld.u32 %r5, [%d2];
    isspacep.shared %p0, %d2;
    isspacep.global %p1, %d2;
    isspacep.global %p2, %in0;
    selp.u32 %r6, 1, 0, %p0; selp.u32 %r7, 2, 0, %p1; selp.u32 %r8, 4, 0, %p2;
    add.u32 %r6, %r6, %r7; add.u32 %r6, %r6, %r8;
    cvta.to.shared.u64 %d3, %d2;
    cvt.u32.u64 %r9, %d3;
    ld.shared.u32 %r10, [%r9];
    ld.shared.u32 %r11, [buf+8];
    {each(16)}
    st.global.v4.u32 [%at], {{%r5, %r6, %r10, %r11}};""",
    [np.zeros((64, 4), U32)],
    lambda a: (np.stack([63 - np.arange(64), np.full(64, 5), 63 - np.arange(64), np.full(64, 2)], 1),),
    module=".shared .align 4 .b8 pad[4];\n.shared .align 16 .b8 buf[256];",
)
case(
    "local memory",
    f"""mov.u64 %d0, depot;
    cvta.local.u64 %d1, %d0;
    and.b32 %r0, %i, 3;
    mad.wide.u32 %d2, %r0, 4, %d1;
    st.u32 [%d2], %i;
    mad.wide.u32 %d3, %r0, 4, %d0;
    ld.local.u32 %r1, [%d3];
    st.local.v2.u32 [depot+8], {{%r1, %r0}};
    ld.local.u32 %r2, [depot+8];
    {each(4)}
    st.global.u32 [%at], %r2;""",
    [np.zeros(64, U32)],
    lambda a: (np.arange(64),),
    registers=".local .align 16 .b8 depot[16];",
)
case(
    "constant and global variables",
    f"""and.b32 %r0, %i, 3;
    mov.u64 %d0, table;
    mad.wide.u32 %d1, %r0, 4, %d0;
    ld.const.u32 %r1, [%d1];
    ld.const.u32 %r2, [table+12];
    ld.global.f32 %f0, [pi];
    ld.global.u64 %d2, [pointer];
    ld.global.f32 %f1, [%d2];
    add.f32 %f0, %f0, %f1;
    cvt.rzi.u32.f32 %r3, %f0;
    add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3;
    {each(4)}
    st.global.u32 [%at], %r1;""",
    [np.zeros(64, U32)],
    lambda a: (np.array([10, 20, 30, 40])[np.arange(64) % 4] + 40 + 6,),
    module=".const .align 4 .u32 table[4] = {10, 20, 0x1E, 40};\n.global .f32 pi = 0f40490FDB;\n"
    ".global .align 8 .u64 pointer = generic(pi);",
)

# -- control flow

case(
    "loop of uneven length",
    f"""mov.u32 %r0, 0; mov.u32 %r1, 0;
    $loop:
    setp.ge.u32 %p0, %r0, %i;
    @%p0 bra $done;
    add.u32 %r1, %r1, %r0;
    add.u32 %r0, %r0, 1;
    bra.uni $loop;
    $done:
    {each(4)}
    st.global.u32 [%at], %r1;""",
    [np.zeros(64, U32)],
    lambda a: ([k * (k - 1) // 2 for k in range(64)],),
)
case(
    "branch table and exits",
    f"""{each(4)}
    rem.u32 %r0, %i, 3;
    ts: .branchtargets $a, $b, $c;
    brx.idx %r0, ts;
    $a: st.global.u32 [%at], 10; exit;
    $b: st.global.u32 [%at], 11; ret;
    $c: st.global.u32 [%at], 12;
    setp.gt.u32 %p0, %i, 30;
    @%p0 exit;
    st.global.u32 [%at], 13;""",
    [np.zeros(64, U32)],
    lambda a: ([(10, 11, 13 if k <= 30 else 12)[k % 3] for k in range(64)],),
)
case(
    "calls",
    f"""setp.lt.u32 %p0, %i, 20;
    mov.u32 %r5, 7;
    @%p0 bra $skip;
    {{ .param .b32 p0; st.param.b32 [p0], %i;
      .param .b32 p1; st.param.b32 [p1], 3;
      .param .b32 retval0;
      call.uni (retval0), twice_sum, (p0, p1);
      ld.param.b32 %r5, [retval0]; }}
    $skip:
    {each(4)}
    st.global.u32 [%at], %r5;""",
    [np.zeros(64, U32)],
    lambda a: ([7 if k < 20 else 2 * (k + 3) + 1 for k in range(64)],),
    module="""
.func (.param .b32 out) plus_one(.param .b32 x)
{ .reg .b32 %r<4>; ld.param.b32 %r1, [x]; add.u32 %r2, %r1, 1; st.param.b32 [out], %r2; ret; }
.func (.param .b32 out) twice_sum(.param .b32 x, .param .b32 y)
{ .reg .b32 %r<8>; .reg .pred %p<2>;
  ld.param.b32 %r1, [x]; ld.param.b32 %r2, [y]; add.u32 %r3, %r1, %r2; shl.b32 %r3, %r3, 1;
  { .param .b32 q; st.param.b32 [q], %r3; .param .b32 r; call (r), plus_one, (q); ld.param.b32 %r4, [r]; }
  st.param.b32 [out], %r4; ret; }
""",
)
case(
    "quiet instructions",
    f"""membar.gl; membar.cta; fence.acq_rel.gpu; fence.sc.sys;
    griddepcontrol.wait; griddepcontrol.launch_dependents; nanosleep.u32 100;
    {each(4)}
    st.global.u32 [%at], %i;""",
    [np.zeros(64, U32)],
    lambda a: (np.arange(64),),
)
case(
    "special registers",
    """mov.u32 %r0, %tid.y; mov.u32 %r1, %ntid.x; mov.u32 %r2, %laneid; mov.u32 %r3, %warpid;
    mov.u32 %r4, %ctaid.y; mov.u32 %r5, %nctaid.y; mov.u32 %r6, %lanemask_lt; mov.u32 %r7, %lanemask_ge;
    mov.u32 %r8, %tid.x; mad.lo.u32 %r9, %r0, %r1, %r8; mad.lo.u32 %r9, %r4, 64, %r9;
    mul.wide.u32 %d0, %r9, 32;
    add.u64 %d0, %d0, %in0;
    st.global.v4.u32 [%d0], {%r0, %r1, %r2, %r3};
    st.global.v4.u32 [%d0+16], {%r4, %r5, %r6, %r7};""",
    [np.zeros((128, 8), U32)],
    lambda a: ([
        [k % 64 // 16, 16, k % 32, k % 64 // 32, k // 64, 2, (1 << k % 32) - 1, wrap(-1 << k % 32, "u32")]
        for k in range(128)],),
    grid=(1, 2), block=(16, 4),
)  # fmt: skip

# -- barriers

for form in ("bar.sync 0", "barrier.sync.aligned 0", "barrier.cta.sync.aligned 0, 64", "bar.cta.sync 3"):
    case(
        form,
        f"""shl.b32 %r1, %i, 2; xor.b32 %r2, %r1, 128;
        st.shared.u32 [%r1], %i;
        {form};
        ld.shared.u32 %r3, [%r2];
        {each(4)}
        st.global.u32 [%at], %r3;""",
        [np.zeros(64, U32)],
        lambda a: (np.arange(64) ^ 32,),
        shared=256,
    )
case(
    "producer and consumer warps",
    f"""setp.lt.u32 %p0, %i, 32; shl.b32 %r1, %i, 2;
    @%p0 bra $produce;
    bar.sync 1, 64;
    ld.shared.u32 %r3, [%r1+-128];
    {each(4)}
    st.global.u32 [%at], %r3;
    ret;
    $produce: st.shared.u32 [%r1], %i;
    bar.arrive 1, 64;""",
    [np.zeros(64, U32)],
    lambda a: ([k - 32 if k >= 32 else 0 for k in range(64)],),
    shared=256,
)
case(
    "barrier with reduction",
    f"""setp.lt.u32 %p0, %i, 20;
    bar.red.popc.u32 %r0, 0, %p0;
    barrier.cta.red.popc.aligned.u32 %r3, 0, 64, !%p0;
    bar.red.and.pred %p1, 0, %p0;
    barrier.red.or.pred %p2, 0, %p0;
    selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 1, 0, %p2;
    {each(16)}
    st.global.v4.u32 [%at], {{%r0, %r1, %r2, %r3}};""",
    [np.zeros((64, 4), U32)],
    lambda a: ([[20, 0, 1, 44]] * 64,),
)
case(
    "warp barrier",
    f"""shl.b32 %r1, %i, 2; xor.b32 %r2, %r1, 4;
    st.shared.u32 [%r1], %i;
    bar.warp.sync 0xffffffff;
    ld.shared.u32 %r3, [%r2];
    {each(4)}
    st.global.u32 [%at], %r3;""",
    [np.zeros(64, U32)],
    lambda a: (np.arange(64) ^ 1,),
    shared=256,
)

# -- atomics

half = lambda v: int(np.float16(v).view(U16))  # noqa: E731
brain = lambda v: int(np.float32(v).view(U32)) >> 16  # noqa: E731
bits32 = lambda v: int(np.float32(v).view(U32))  # noqa: E731
bits64 = lambda v: int(np.float64(v).view(U64))  # noqa: E731
ATOMICS = []  # type and operation, old value, operands, new value
for n in (32, 64):
    top = 2**n - 1
    ATOMICS += [
        (f"add.u{n}", top, [3], 2), (f"min.u{n}", top, [3], 3), (f"max.u{n}", top, [3], top),
        (f"min.s{n}", top, [3], top), (f"max.s{n}", top, [3], 3),
        (f"and.b{n}", 12, [10], 8), (f"or.b{n}", 12, [10], 14), (f"xor.b{n}", 12, [10], 6),
        (f"exch.b{n}", 12, [10], 10),
        (f"cas.b{n}", 12, [12, 99], 99), (f"cas.b{n}", 12, [13, 99], 12),
    ]  # fmt: skip
ATOMICS += [
    ("add.s32", 5, [2**32 - 7], 2**32 - 2), ("add.s64", 5, [2**64 - 7], 2**64 - 2),
    ("inc.u32", 4, [5], 5), ("inc.u32", 5, [5], 0), ("dec.u32", 4, [5], 3), ("dec.u32", 0, [5], 5),
    ("dec.u32", 9, [5], 5),
    ("cas.b16", 12, [12, 99], 99), ("add.f32", bits32(1.5), [bits32(0.25)], bits32(1.75)),
    ("add.f32", 1, [bits32(0.0)], 0), ("add.f64", bits64(1.5), [bits64(0.25)], bits64(1.75)),
    ("add.noftz.f16", half(1.5), [half(2.0**-11)], half(1.5)),
    ("add.noftz.bf16", brain(1.5), [brain(0.25)], brain(1.75)),
    ("add.noftz.f16x2", half(1) | half(2) << 16, [half(3) | half(4) << 16], half(4) | half(6) << 16),
    ("add.noftz.bf16x2", brain(1) | brain(2) << 16, [brain(3) | brain(4) << 16], brain(4) | brain(6) << 16),
    ("min.noftz.f16", half(1.5), [half(-2)], half(-2)), ("max.noftz.bf16x2", brain(1), [brain(2)], brain(2)),
]  # fmt: skip
for op, old, operands, new in ATOMICS:
    t = op.split(".")[-1]
    size = TYPES[t].size
    letter = {2: "h", 4: "r", 8: "d"}[size]
    args = ", ".join(f"%{letter}{k + 1}" for k in range(len(operands)))
    sets = " ".join(f"mov.b{8 * size} %{letter}{k + 1}, {v};" for k, v in enumerate(operands))
    dtype = {2: U16, 4: U32, 8: U64}[size]
    for scope in ("", ".relaxed.gpu", ".acq_rel.sys"):
        case(
            f"atom{scope}.{op} {old}",
            f"{sets} {each(size)} atom{scope}.global.{op} %{letter}0, [%at], {args};\n"
            f"{each(size, 1)} st.global.b{8 * size} [%at], %{letter}0;",
            [np.full(64, old, dtype), np.zeros(64, dtype)],
            lambda a, b, old=old, new=new: (np.full(64, new, a.dtype), np.full(64, old, a.dtype)),
        )
    if "cas" not in op and "exch" not in op:
        case(f"red.{op} {old}", f"{sets} {each(size)} red.global.{op} [%at], {args};", [np.full(64, old, dtype)],
             lambda a, new=new: (np.full(64, new, a.dtype),))  # fmt: skip
case(
    "one counter for all",
    f"atom.global.add.u32 %r0, [%in0], 1; {each(4, 1)} st.global.u32 [%at], %r0; red.add.f32 [%in2], 0f3F000000;",
    [np.zeros(1, U32), np.zeros(256, U32), np.zeros(1, F32)],
    lambda a, b, c: ([256], np.arange(256), [128.0]),
    grid=(4,),
)
case(
    "vector atomics and shared subnormals",
    f"""setp.eq.u32 %p0, %i, 0;
    mov.b32 %r0, 1; mov.b32 %r9, 0;
    @%p0 st.shared.b32 [%r9], %r0;
    bar.sync 0;
    mov.b32 %f0, 0;
    red.shared.add.f32 [%r9], %f0;
    mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f40000000;
    red.global.add.v2.f32 [%in0], {{%f1, %f2}};
    atom.shared.add.f32 %f3, [%r9], %f0;
    {each(4, 1)}
    st.global.f32 [%at], %f3;""",
    [np.zeros(2, F32), np.zeros(64, U32)],
    lambda a, b: ([64.0, 128.0], np.full(64, 1)),
    shared=4,
)
