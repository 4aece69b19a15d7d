"""Kernels on warps, asynchronous copies and tensor cores. Importing this adds them to the cases."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

np = pytest.importorskip("numpy", minversion="2.0")

from ptx_kernel_cases import F32, U16, U32, U64, bits32, case, each, numbers  # noqa: E402

# -- warps

LANES = np.arange(64) % 32


def shuffle(source: Callable[[int], int], ok: Callable[[int, int], bool]) -> list[list[int]]:
    rows = []
    for k in range(64):
        j = source(k % 32)
        inside = 0 <= j < 32 and ok(k % 32, j)
        rows.append([100 + (k // 32 * 32 + j if inside else k), int(inside)])
    return rows


for form, want in {
    "shfl.sync.up.b32 {}, 3, 0": shuffle(lambda lane: lane - 3, lambda lane, j: j >= 0),
    "shfl.sync.down.b32 {}, 3, 31": shuffle(lambda lane: lane + 3, lambda lane, j: True),
    "shfl.sync.bfly.b32 {}, 5, 31": shuffle(lambda lane: lane ^ 5, lambda lane, j: True),
    "shfl.sync.idx.b32 {}, 9, 31": shuffle(lambda lane: 9, lambda lane, j: True),
    "shfl.sync.down.b32 {}, 2, 0x1807": shuffle(lambda lane: lane + 2, lambda lane, j: j // 8 == lane // 8),
    "shfl.sync.idx.b32 {}, 3, 0x1807": shuffle(lambda lane: lane // 8 * 8 + 3, lambda lane, j: True),
}.items():
    case(
        form,
        f"add.u32 %r0, %i, 100;\n{form.format('%r1|%p0, %r0')}, 0xffffffff;\nselp.u32 %r2, 1, 0, %p0;\n{each(8)}\n"
        "st.global.v2.u32 [%at], {%r1, %r2};",
        [np.zeros((64, 2), U32)],
        lambda a, want=want: (want,),
    )
case(
    "shuffle in two halves, apart",
    f"""and.b32 %r9, %i, 31; setp.lt.u32 %p0, %r9, 16; mov.u32 %r3, 0xffff; @!%p0 mov.u32 %r3, 0xffff0000;
    @%p0 bra $low;
    add.u32 %r9, %r9, 1000;
    $low: shfl.sync.bfly.b32 %r1, %r9, 1, 31, %r3;
    {each(4)}
    st.global.u32 [%at], %r1;""",
    [np.zeros(64, U32)],
    lambda a: ([(k % 32 ^ 1) + (1000 if k % 32 >= 16 else 0) for k in range(64)],),
)
case(
    "votes",
    f"""and.b32 %r9, %i, 31; setp.lt.u32 %p0, %r9, 5; setp.lt.u32 %p1, %r9, 40;
    vote.sync.ballot.b32 %r0, %p0, 0xffffffff;
    vote.sync.all.pred %p2, %p1, -1; vote.sync.any.pred %p3, %p0, -1; vote.sync.uni.pred %p4, !%p0, -1;
    selp.u32 %r1, 1, 0, %p2; selp.u32 %r2, 1, 0, %p3; selp.u32 %r3, 1, 0, %p4;
    {each(16)} st.global.v4.u32 [%at], {{%r0, %r1, %r2, %r3}};""",
    [np.zeros((64, 4), U32)],
    lambda a: ([[31, 1, 1, 0]] * 64,),
)
case(
    "match, elect, active",
    f"""and.b32 %r9, %i, 31; shr.u32 %r8, %r9, 4; cvt.u64.u32 %d0, %r8;
    match.any.sync.b32 %r0, %r8, 0xffffffff;
    match.any.sync.b64 %r1, %d0, 0xffffffff;
    match.all.sync.b32 %r2|%p0, 5, 0xffffffff;
    match.all.sync.b64 %r3|%p1, %d0, 0xffffffff;
    elect.sync %r4|%p2, 0xffffffff;
    activemask.b32 %r5;
    selp.u32 %r6, 1, 0, %p0; @%p1 add.u32 %r6, %r6, 2; @%p2 add.u32 %r6, %r6, 4;
    {each(32)} st.global.v4.u32 [%at], {{%r0, %r1, %r2, %r3}}; st.global.v2.u32 [%at+16], {{%r4, %r5}};
    st.global.u32 [%at+24], %r6;""",
    [np.zeros((64, 8), U32)],
    lambda a: ([
        [0xFFFF << (k % 32 // 16 * 16)] * 2 + [0xFFFFFFFF, 0, 0, 0xFFFFFFFF, 1 + 4 * (k % 32 == 0), 0]
        for k in range(64)
    ],),
)  # fmt: skip
case(
    "redux",
    f"""and.b32 %r9, %i, 31; sub.u32 %r8, %r9, 4; cvt.rn.f32.s32 %f0, %r8;
    redux.sync.add.u32 %r0, %r9, -1; redux.sync.min.s32 %r1, %r8, -1; redux.sync.max.u32 %r2, %r8, -1;
    redux.sync.xor.b32 %r3, %r9, -1; redux.sync.or.b32 %r4, %r9, -1; redux.sync.and.b32 %r5, %r9, -1;
    redux.sync.max.f32 %f1, %f0, -1; redux.sync.min.abs.NaN.f32 %f2, %f0, -1;
    {each(32)} st.global.v4.u32 [%at], {{%r0, %r1, %r2, %r3}}; st.global.v2.u32 [%at+16], {{%r4, %r5}};
    st.global.v2.f32 [%at+24], {{%f1, %f2}};""",
    [np.zeros((64, 8), U32)],
    lambda a: ([[496, 2**32 - 4, 2**32 - 1, 0, 31, 0, bits32(27.0), 0]] * 64,),
)

# -- asynchronous copies

for size, level in ((4, "ca"), (8, "ca"), (16, "cg"), (16, "ca")):
    case(
        f"cp.async {level} {size}",
        f"""mul.lo.u32 %r0, %i, {size};
        {each(size)}
        setp.lt.u32 %p0, %i, 40; selp.u32 %r1, {size}, {size // 2}, %p0; setp.ge.u32 %p1, %i, 60; @%p1 mov.u32 %r1, 0;
        cp.async.{level}.shared.global.L2::128B [%r0], [%at], {size}, %r1;
        cp.async.commit_group;
        add.u32 %r2, %r0, {64 * size};
        setp.ne.u32 %p2, %i, 0;
        cp.async.{level}.shared::cta.global [%r2], [%at], {size}, %p2;
        cp.async.wait_group 0;
        cp.async.wait_all;
        {each(size, 1)}
        {{ .reg .b32 %w<4>; ld.shared.b32 %w0, [%r0]; ld.shared.b32 %w1, [%r0+{size - 4}];
        ld.shared.b32 %w2, [%r2]; add.u32 %w1, %w1, %w2;
        st.global.b32 [%at], %w0; st.global.b32 [%at+{size - 4}], %w1; }}""",
        [numbers(U32, 64 * size // 4), np.zeros(64 * size // 4, U32)],
        lambda a, b, n=size // 4, s=size: (a, copied(a.reshape(64, n), s)),
        shared=128 * size,
    )


def copied(a: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros_like(a)
    for k, row in enumerate(a):
        keep = size if k < 40 else size // 2
        data = np.frombuffer(row.tobytes()[: 0 if k >= 60 else keep].ljust(size, b"\0"), U32)
        out[k, 0], out[k, -1] = data[0], (int(data[-1]) + int(row[0] if k == 0 else 0)) % 2**32
    return out.reshape(-1)


# -- tensor cores: fragments by the tables of the instruction set, element by element

SHAPES = [
    ("m16n8k16", "f16", "f32"), ("m16n8k16", "bf16", "f32"), ("m16n8k8", "f16", "f32"), ("m16n8k8", "bf16", "f32"),
    ("m16n8k8", "tf32", "f32"), ("m16n8k4", "tf32", "f32"), ("m16n8k16", "f16", "f16"), ("m8n8k4", "f64", "f64"),
]  # fmt: skip


def a_element(lane: int, i: int, fmt: str) -> tuple[int, int]:
    group, member = divmod(lane, 4)
    if fmt == "f64":
        return group, member
    if fmt == "tf32":
        return group + (8 if i in (1, 3) else 0), member + (4 if i >= 2 else 0)
    return group + (8 if i in (2, 3, 6, 7) else 0), member * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_element(lane: int, i: int, fmt: str) -> tuple[int, int]:
    group, member = divmod(lane, 4)
    if fmt in ("tf32", "f64"):
        return member + 4 * i, group
    return member * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_element(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def matrix_case(shape: str, fmt: str, acc: str) -> None:
    m, n, k = (int(v) for v in re.findall(r"\d+", shape))
    rng = np.random.default_rng(k)
    a, b, c = (rng.integers(-8, 9, s).astype(np.float64) / 4 for s in ((m, k), (k, n), (m, n)))

    def fragments(x: np.ndarray, place: Callable, count: int, t: str) -> np.ndarray:
        values = np.array([[x[place(lane, i)] for i in range(count)] for lane in range(32)])
        if t == "bf16":
            return (values.astype(F32).view(U32) >> 16).astype(U16).view(U32)
        kind = {"f16": np.float16, "f32": F32, "tf32": F32, "f64": np.float64}[t]
        return np.ascontiguousarray(values.astype(kind)).view(U64 if t == "f64" else U32)

    fa = fragments(a, lambda lane, i: a_element(lane, i, fmt), m * k // 32, fmt)
    fb = fragments(b, lambda lane, i: b_element(lane, i, fmt), k * n // 32, fmt)
    fc = fragments(c, c_element, m * n // 32, acc)
    want = fragments(a @ b + c, c_element, m * n // 32, acc)
    width, letter = (64, "d") if fmt == "f64" else (32, "f" if acc == "f32" else "r")
    step = width // 8
    lines, names, base = [], [], 0
    for n_, (f, r) in enumerate(((fa, "d" if fmt == "f64" else "r"), (fb, "d" if fmt == "f64" else "r"), (fc, letter))):
        regs = [f"%{r}{base + i}" for i in range(f.shape[1])]
        base += f.shape[1]
        lines.append(each(step * f.shape[1], n_))
        lines += [f"ld.global.b{width} {r_}, [%at+{step * i}];" for i, r_ in enumerate(regs)]
        names.append("{" + ", ".join(regs) + "}")
    out = [f"%{letter}{30 + i}" for i in range(want.shape[1])]
    lines.append(f"mma.sync.aligned.{shape}.row.col.{acc}.{fmt}.{fmt}.{acc} {{{', '.join(out)}}}, {', '.join(names)};")
    lines.append(each(step * len(out), 3))
    lines += [f"st.global.b{width} [%at+{step * i}], {r};" for i, r in enumerate(out)]
    case(f"mma {shape} {fmt} {acc}", "\n".join(lines), [fa, fb, fc, np.zeros_like(want)],
         lambda a, b, c, d: (None, None, None, want), block=(32,))  # fmt: skip


for shape_ in SHAPES:
    matrix_case(*shape_)

TILE = np.arange(4 * 64, dtype=U16).reshape(4, 8, 8)
for count in (1, 2, 4):
    for trans in ("", ".trans"):
        regs = ", ".join(f"%r{10 + k}" for k in range(count))
        stores = "\n".join(f"st.global.b32 [%at+{4 * k}], %r{10 + k};" for k in range(count))
        source = TILE.transpose(0, 2, 1) if trans else TILE
        rows = [[int(source[k, lane // 4, 2 * (lane % 4)]) | int(source[k, lane // 4, 2 * (lane % 4) + 1]) << 16
                 for k in range(count)] for lane in range(32)]  # fmt: skip
        case(
            f"ldmatrix x{count}{trans}",
            f"""{each(16)} mul.lo.u32 %r0, %i, 16;
            ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%at]; st.shared.v4.b32 [%r0], {{%r1, %r2, %r3, %r4}};
            bar.sync 0;
            ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{regs}}}, [%r0];
            {each(4 * count, 1)}
            {stores}""",
            [TILE.copy(), np.zeros((32, count), U32)],
            lambda a, b, rows=rows: (a, rows),
            block=(32,),
            shared=512,
        )
        case(
            f"stmatrix x{count}{trans}",
            f"""{each(4 * count)} mul.lo.u32 %r0, %i, 16; and.b32 %r8, %r0, {128 * count - 1};
            {" ".join(f"ld.global.b32 %r{10 + k}, [%at+{4 * k}];" for k in range(count))}
            stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r8], {{{regs}}};
            bar.sync 0;
            setp.ge.u32 %p0, %i, {8 * count};
            @%p0 exit;
            ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r0];
            {each(16, 1)}
            st.global.v4.b32 [%at], {{%r1, %r2, %r3, %r4}};""",
            [np.array(rows, U32), np.zeros((count, 8, 8), U16)],
            lambda a, b, count=count: (a, TILE[:count]),
            block=(32,),
            shared=512,
        )
case(
    "movmatrix",
    f"{each(4)} ld.global.b32 %r0, [%at]; movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;\n"
    f"{each(4, 1)} st.global.b32 [%at], %r1;",
    [TILE[0].copy(), np.zeros((8, 8), U16)],
    lambda a, b: (a, a.T),
    block=(32,),
)
