"""Every class of fault the PTX executor looks for: planted in a small kernel it is caught; a correct twin passes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import pytest

np = pytest.importorskip("numpy", minversion="2.0")
torch = pytest.importorskip("torch")

from ptx import Fault, Memory, load, run, run_both  # noqa: E402
from ptx.bench import kernel  # noqa: E402
from ptx.launch import Launch, execute  # noqa: E402

AT = "mad.wide.u32 %at, %i, 4, %in0;"


@dataclass
class Twin:
    """A faulty kernel body, the kind of fault, and the correct body. Two buffers of 64 floats each."""

    name: str
    kind: str
    bad: str
    good: str
    grid: tuple[int, ...] = (1,)
    block: tuple[int, ...] = (64,)
    shared: int = 0
    match: str = ""
    flags: dict = field(default_factory=dict)  # of the second buffer


TWINS: list[Twin] = []


def twin(name, kind, bad, good, **more):
    TWINS.append(Twin(name, kind, bad, good, **more))


def replaced(name, kind, good, old, new, **more):
    """The faulty body is the correct one with a single edit."""
    assert old in good
    twin(name, kind, good.replace(old, new), good, **more)


# -- memory

LOAD = f"{AT} ld.global.f32 %f0, [%at]; mad.wide.u32 %at, %i, 4, %in1; st.global.f32 [%at], %f0;"
replaced("load one past the end", "out-of-bounds", LOAD, "[%at];", "[%at+4];", match="byte 256")
replaced("store one past the end", "out-of-bounds", LOAD, "[%at],", "[%at+4],")
replaced("load before the start", "out-of-bounds", LOAD, "[%at];", "[%at+-4];")
replaced("missing mask", "out-of-bounds", f"setp.ge.u32 %p0, %i, 64; @%p0 exit; {LOAD}", "@%p0 exit;", "", block=(128,))
replaced("null pointer", "out-of-bounds", LOAD, "[%at];", "[0];")
replaced("swapped stride", "out-of-bounds", LOAD, "%i, 4, %in1", "%i, 8, %in1")
replaced("misaligned load", "misaligned", LOAD, "[%at];", "[%at+2];")
replaced("misaligned vector", "misaligned",
         f"{AT} and.b64 %at, %at, -16; ld.global.v4.f32 {{%f0,%f1,%f2,%f3}}, [%at];",
         "and.b64 %at, %at, -16;", "")  # fmt: skip
replaced("unwritten output read", "unwritten",
         "mad.wide.u32 %at, %i, 4, %in1; st.global.u32 [%at], %i; ld.global.u32 %r1, [%at];",
         "st.global.u32 [%at], %i;", "", flags={"unwritten": True})  # fmt: skip
twin("write to an input", "read-only", LOAD, f"{AT} ld.global.f32 %f0, [%at];", flags={"readonly": True})
PUT = "shl.b32 %r1, %i, 2; st.shared.u32 [%r1], %i;"
replaced("shared past the end", "out-of-bounds", PUT, "[%r1]", "[%r1+4]", shared=256)
twin(
    "shared memory forgotten at launch", "out-of-bounds", "mov.u32 %r1, 256; st.shared.u32 [%r1], %r1;", PUT, shared=256
)
replaced("shared misaligned", "misaligned", PUT, "[%r1]", "[%r1+1]", shared=260)
replaced("shared never written", "unwritten", f"{PUT} bar.sync 0; ld.shared.u32 %r2, [%r1];",
         "st.shared.u32 [%r1], %i;",
         "", shared=256)  # fmt: skip
LOCAL = "mov.u64 %d0, depot; st.local.u32 [%d0+12], %i;"
replaced("local past the end", "out-of-bounds", ".local .align 16 .b8 depot[16];" + LOCAL, "+12", "+16")

# -- races inside a block

OTHER = f"{PUT} bar.sync 0; xor.b32 %r2, %r1, 128; ld.shared.u32 %r3, [%r2];"
replaced("dropped barrier", "race", OTHER, "bar.sync 0;", "", shared=256)
replaced("barrier of a warp between warps", "race", OTHER, "bar.sync 0;", "bar.warp.sync -1;", shared=256)
AFTER = f"{OTHER} bar.sync 0; st.shared.u32 [%r1], %r3;"
replaced("write after read", "race", AFTER, "bar.sync 0; st.shared", "st.shared", shared=256)
ROUND = f"{PUT} bar.sync 0; ld.shared.u32 %r3, [8]; bar.sync 0; setp.eq.u32 %p0, %i, 2; @%p0 st.shared.u32 [8], %r3;"
replaced("write after read by many", "race", ROUND, "[8]; bar.sync 0;", "[8];", shared=256)
INSIDE = f"{PUT} bar.warp.sync -1; xor.b32 %r2, %r1, 4; ld.shared.u32 %r3, [%r2];"
replaced("race inside a warp", "race", INSIDE, "bar.warp.sync -1;", "", shared=256)
HALF = f"""{PUT} and.b32 %r9, %i, 16; mov.u32 %r8, 0xffff; setp.ne.u32 %p0, %r9, 0; @%p0 mov.u32 %r8, 0xffff0000;
bar.warp.sync %r8; xor.b32 %r2, %r1, 4; ld.shared.u32 %r3, [%r2];"""
replaced("half-warp barrier, other half read", "race", HALF, "%r1, 4;", "%r1, 64;", shared=256)
replaced("shuffles do not order memory", "race", INSIDE, "bar.warp.sync -1;", "shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;",
         shared=256)  # fmt: skip
replaced("one place, different values", "race", PUT, "[%r1]", "[0]", shared=256, match="different values")
GLOBAL = f"""{AT} st.global.u32 [%at], %i; bar.sync 0;
xor.b32 %r2, %i, 32; mad.wide.u32 %at, %r2, 4, %in0; ld.global.u32 %r3, [%at];"""
replaced("global race inside a block", "race", GLOBAL, "bar.sync 0;", "")
NAMED = """shl.b32 %r1, %i, 2; st.shared.u32 [%r1], 0; bar.sync 0; setp.lt.u32 %p0, %i, 32; @%p0 bra $produce;
bar.sync 1, 64; ld.shared.u32 %r3, [%r1+-128]; ret;
$produce: st.shared.u32 [%r1], %i; bar.arrive 1, 64;"""
replaced("arrival before the write", "race", NAMED, "st.shared.u32 [%r1], %i; bar.arrive 1, 64;",
         "bar.arrive 1, 64; st.shared.u32 [%r1], %i;", shared=256)  # fmt: skip

# -- races between blocks

two = {"grid": (2,), "block": (32,)}
replaced(
    "blocks write one place", "race", f"{AT} st.global.u32 [%at], %i;", AT, "mov.u64 %at, %in0; mov.u32 %i, 7;", **two
)
replaced("block reads another's result", "race", f"{AT} st.global.u32 [%at], %i; ld.global.u32 %r2, [%at];",
         "ld.global.u32 %r2, [%at];", "ld.global.u32 %r2, [%in0];", **two)  # fmt: skip
replaced("sum without an atomic", "race", "mov.f32 %f1, 0f3F800000; red.global.add.f32 [%in0], %f1;",
         "red.global.add.f32 [%in0], %f1;",
         "setp.eq.u32 %p0, %i, 0; ld.global.f32 %f0, [%in0]; add.f32 %f0, %f0, %f1; @%p0 st.global.f32 [%in0], %f0;",
         **two)  # fmt: skip
replaced(
    "atomics of block scope",
    "race",
    "atom.global.add.u32 %r0, [%in0], 1;",
    "atom.global",
    "atom.cta.relaxed.global",
    **two,
)
replaced("atomic and plain store", "race", "red.global.add.u32 [%in0], 1;", "red.global.add.u32 [%in0], 1;",
         "red.global.add.u32 [%in0], 1; st.global.u32 [%in0], 1;", **two)  # fmt: skip
# The last block to finish reads what all blocks wrote: right with a fence before the counter and one after.
LAST = """mov.u32 %r60, %ctaid.x; mov.u32 %r5, %tid.x; setp.ne.u32 %p0, %r5, 0;
@%p0 bra $join;
mad.wide.u32 %at, %r60, 4, %in0; st.global.u32 [%at], %r60;
membar.gl;
atom.global.add.u32 %r1, [%in1], 1;
st.shared.u32 [0], %r1;
$join: bar.sync 0;
ld.shared.u32 %r1, [0]; setp.ne.u32 %p1, %r1, 1;
@%p1 exit;
fence.sc.gpu;
ld.global.u32 %r2, [%in0]; ld.global.u32 %r3, [%in0+4]; add.u32 %r2, %r2, %r3;"""
replaced("last block without the release fence", "race", LAST, "membar.gl;", "", shared=4, **two)
replaced("last block without the acquire fence", "race", LAST, "fence.sc.gpu;", "", shared=4, **two)
# A barrier does not hand on what thread 0 has read to the fence.acq_rel of another thread.
replaced("last block with a weaker fence", "race", LAST, "fence.sc.gpu;", "fence.acq_rel.gpu;", shared=4, **two)
FLAGS = LAST.replace("membar.gl;", "").replace("fence.sc.gpu;", "").replace("atom.global", "atom.acq_rel.gpu.global")
replaced("last block with relaxed atomics", "race", FLAGS, "atom.acq_rel.gpu", "atom.relaxed.gpu", shared=4, **two)
# The same where every thread writes, and thread 0 takes the ticket for all.
ALL = f"""mov.u32 %r60, %ctaid.x; mov.u32 %r5, %tid.x; setp.ne.u32 %p0, %r5, 0;
{AT} st.global.u32 [%at], %i;
membar.gl;
bar.sync 0;
@%p0 bra $join;
atom.global.add.u32 %r1, [%in1], 1;
st.shared.u32 [0], %r1;
$join: bar.sync 0;
ld.shared.u32 %r1, [0]; setp.ne.u32 %p1, %r1, 1;
@%p1 exit;
membar.gl;
mad.wide.u32 %at, %r5, 4, %in0; ld.global.u32 %r2, [%at]; ld.global.u32 %r3, [%at+128];"""
FIRST = "membar.gl;\nbar.sync 0;\n@%p0"
replaced("a ticket before all have written", "race", ALL, FIRST, "membar.gl;\n@%p0", shared=4, **two)
OTHERS = ALL.replace(  # of two warps, the other one writes
    f"{AT} st.global.u32 [%at], %i;",
    "setp.lt.u32 %p1, %r5, 32; and.b32 %r5, %r5, 31; mad.lo.u32 %r6, %r60, 32, %r5; mad.wide.u32 %at, %r6, 4, %in0;"
    "@!%p1 st.global.u32 [%at], %r6;",
)
replaced("a ticket after a barrier of its warp alone", "race", OTHERS, "bar.sync 0;\n@%p0", "bar.warp.sync -1;\n@%p0",
         shared=4, grid=(2,), block=(64,))  # fmt: skip
replaced(
    "a weaker fence before a barrier", "race", ALL, FIRST, "fence.acq_rel.gpu;\nbar.sync 0;\n@%p0", shared=4, **two
)
twin("a weaker fence in another thread than the ticket", "race",
     ALL.replace(FIRST, "bar.sync 0;\n@!%p0 bra $ticket; fence.acq_rel.gpu; $ticket:\n@%p0"),
     ALL.replace(FIRST, "bar.sync 0;\n@%p0 bra $fenced; fence.acq_rel.gpu; $fenced:\n@%p0"), shared=4, **two)  # fmt: skip

# -- barriers and warps

replaced("barrier in one branch", "barrier",
         "setp.lt.u32 %p0, %i, 32; bar.sync 0;",
         "bar.sync 0;", "@%p0 bra $a; bar.sync 0; bra $b; $a: bar.sync 0; $b:", match="different barriers")  # fmt: skip
replaced("leaving before a barrier", "barrier", "setp.ge.u32 %p0, %i, 50; bar.sync 0; @%p0 exit;",
         "bar.sync 0; @%p0 exit;",
         "@%p0 exit; bar.sync 0;", match="left")  # fmt: skip
replaced(
    "barrier for half a block", "barrier", "setp.ge.u32 %p0, %i, 32; bar.sync 0;", "bar.sync 0;", "@%p0 bar.sync 0;"
)
replaced("wrong barrier count", "barrier", "bar.sync 1, 64;", "64", "96")
replaced("too many arrivals", "barrier", "bar.sync 1, 64;", "64", "32")
replaced("odd barrier count", "barrier", "bar.sync 1, 64;", "64", "48")
SHUFFLE = "setp.lt.u32 %p0, %i, 16; shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;"
replaced("shuffle in a branch", "collective", SHUFFLE, "shfl", "@%p0 shfl")
replaced("shuffle after an exit", "collective", SHUFFLE, "shfl", "@%p0 exit; shfl")
replaced("shuffle with a wrong mask", "collective", SHUFFLE, ", -1;", ", 0xffff;")
replaced("reads a lane outside the mask", "collective", "mov.u32 %r3, 0xffff; setp.lt.u32 %p0, %i, 16;"
         "@%p0 shfl.sync.bfly.b32 %r1, %r2, 1, 31, %r3;", "%r2, 1,", "%r2, 16,", block=(32,))  # fmt: skip
replaced("shuffle in a partial warp", "collective",
         "setp.ge.u32 %p1, %i, 32; mov.u32 %r3, -1; @%p1 mov.u32 %r3, 0xffff;"
         "shfl.sync.bfly.b32 %r1, %r2, 1, 31, %r3;", "0xffff", "-1", block=(48,))  # fmt: skip
replaced("vote misses lanes", "collective", "setp.lt.u32 %p0, %i, 40; vote.sync.any.pred %p1, %p0, -1; bar.sync 0;",
         "vote", "@%p0 vote")  # fmt: skip

# -- asynchronous copies

COPY = f"""shl.b32 %r1, %i, 2; {AT}
cp.async.ca.shared.global [%r1], [%at], 4; cp.async.commit_group;
cp.async.ca.shared.global [%r1+256], [%at], 4; cp.async.commit_group;
cp.async.wait_group 1;
bar.sync 0; xor.b32 %r2, %r1, 128; ld.shared.u32 %r3, [%r2];"""
replaced("copy used before its wait", "async", COPY, "cp.async.wait_group 1;", "", shared=512)
replaced("waits for the wrong group", "async", COPY, "wait_group 1", "wait_group 2", shared=512)
replaced("second copy used too early", "async", COPY, "[%r2];", "[%r2+256];", shared=512)
replaced("copy of another thread without a barrier", "race", COPY, "bar.sync 0;", "", shared=512)
replaced("copy never committed", "async", COPY, "[%at], 4; cp.async.commit_group;\ncp.async.wait",
         "[%at], 4;\ncp.async.wait",
         shared=512)  # fmt: skip

# -- others

replaced("endless loop", "steps", "$l: setp.eq.u32 %p0, %i, 99; @%p0 bra $l;", "@%p0 bra", "@!%p0 bra")


def start(t, body):
    memory = Memory()
    buffers = [torch.zeros(64) for _ in range(2)]
    memory.register(buffers[0])
    memory.register(buffers[1], **t.flags)
    run(load(kernel(body, 2)), buffers, t.grid, t.block, t.shared, memory=memory, max_steps=20_000)


@pytest.mark.parametrize("t", TWINS, ids=lambda t: t.name)
def test_fault_is_caught(t):
    with pytest.raises(Fault, match=t.match or None) as fault:
        start(t, t.bad)
    assert fault.value.kind == t.kind, fault.value
    assert fault.value.instruction


@pytest.mark.parametrize("t", TWINS, ids=lambda t: t.name)
def test_correct_twin_passes(t):
    start(t, t.good)


def test_fault_names_the_place():
    body = f".loc 1 42 7\n{AT}\n.loc 1 43 7\nld.global.f32 %f0, [%at];"
    program = load(kernel(body, 1, module='.file 1 "/somewhere/kernel.cu"'))
    with pytest.raises(Fault) as fault:
        run(program, [torch.zeros(100)], (2, 1), (64, 1))
    f = fault.value
    assert (f.line, f.instruction) == ("kernel.cu:43", "ld.global.f32 %f0, [%at]")
    assert (f.cta, f.thread) == ((1, 0, 0), (36, 0, 0))
    assert "kernel.cu:43" in str(f)
    assert "out-of-bounds" in str(f)


@pytest.mark.parametrize(
    ("args", "grid", "block", "shared"),
    [
        (1, (0,), (32,), 0),
        (1, (1,), (2048,), 0),
        (1, (1, 70000), (32,), 0),
        (1, (1,), (32,), 300_000),
        (2, (1,), (32,), 0),
    ],
)
def test_impossible_launches(args, grid, block, shared):
    with pytest.raises(Fault) as fault:
        run(load(kernel("", 1)), [torch.zeros(4)] * args, grid, block, shared)
    assert fault.value.kind == "launch"


def test_compiled_block_size_is_enforced():
    text = kernel("", 1)
    for directive, wrong in ((".maxntid 64, 1, 1", (128,)), (".reqntid 64", (32,))):
        program = load(text.replace(")\n{", f")\n{directive}\n{{", 1))
        run(program, [torch.zeros(4)], (1,), (64,))
        with pytest.raises(Fault, match="compiled for"):
            run(program, [torch.zeros(4)], (1,), wrong)


def test_only_the_tensor_is_accessible_not_its_storage():
    storage = torch.zeros(256)
    program = load(kernel(LOAD, 2))
    run(program, [storage[64:128], storage[128:192]], (1,), (64,))
    with pytest.raises(Fault, match="out-of-bounds"):
        run(program, [storage[64:128], storage[128:191]], (1,), (64,))
    with pytest.raises(Fault, match="misaligned"):
        run(program, [storage.view(torch.uint8)[2:300], storage[128:192]], (1,), (64,))


class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("n", ctypes.c_int), ("scale", ctypes.c_float), ("y", ctypes.c_void_p)]


STRUCT = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry scale(.param .align 8 .b8 p[24])
{
  .reg .pred %p<2>; .reg .f32 %f<4>; .reg .b32 %r<4>; .reg .b64 %d<8>;
  ld.param.u64 %d0, [p]; ld.param.u32 %r0, [p+8]; ld.param.f32 %f0, [p+12];
  mov.b64 %d5, p;
  ld.param.u64 %d1, [%d5+16];
  mov.u32 %r1, %tid.x;
  setp.ge.u32 %p0, %r1, %r0;
  @%p0 ret;
  mad.wide.u32 %d2, %r1, 4, %d0;
  mad.wide.u32 %d3, %r1, 4, %d1;
  ld.global.f32 %f1, [%d2];
  mul.f32 %f1, %f1, %f0;
  st.global.f32 [%d3], %f1;
  ret;
}
"""


def test_structs_with_real_pointers():
    x, y = torch.arange(10.0), torch.zeros(10)
    packed = Params(x.data_ptr(), 10, 2.0, y.data_ptr())
    launch = Launch(STRUCT, "scale", (1,), (32,), 0, [packed])
    with pytest.raises(Fault, match="in no buffer"):
        execute([launch])
    execute([launch], readonly=[x], unwritten=[y])
    assert torch.equal(y, 2 * x)
    execute([Launch(STRUCT, None, (1,), (32,), 0, bytes(packed))], buffers=[x, y])
    memory = Memory()
    assert memory.register(x) == x.data_ptr() == memory.address_of(x)
    with pytest.raises(KeyError):
        memory.address_of(y)


def test_sequence_shares_memory_and_variables():
    text = kernel(
        f"ld.global.u32 %r0, [counter]; setp.eq.u32 %p0, %i, 0; bar.sync 0; add.u32 %r1, %r0, 1;"
        f"@%p0 st.global.u32 [counter], %r1; {AT} st.global.u32 [%at], %r0;",
        1,
        module=".global .u32 counter = 5;",
    )
    out = torch.zeros(2, 64, dtype=torch.int32)
    for _ in range(2):  # every sequence starts with the initial values
        execute([Launch(text, "k", (1,), (64,), 0, [out[k]]) for k in range(2)])
        assert out.tolist() == [[5] * 64, [6] * 64]
    scratch = torch.zeros(64)
    produce, consume = kernel(f"{AT} st.global.u32 [%at], %i;", 1), kernel(f"{AT} ld.global.u32 %r0, [%at];", 1)
    first, second = (Launch(t, None, (1,), (64,), 0, [scratch]) for t in (produce, consume))
    execute([first, second], unwritten=[scratch])
    with pytest.raises(Fault, match="unwritten"):
        execute([second], unwritten=[scratch])
    memory = Memory()
    execute([first], unwritten=[scratch], memory=memory)
    assert memory.written(scratch).all()


def test_approximate_error_reaches_the_result():
    body = LOAD.replace("mad.wide.u32 %at, %i, 4, %in1;", "tanh.approx.f32 %f0, %f0; mad.wide.u32 %at, %i, 4, %in1;")
    x, y = torch.linspace(-3, 3, 64), torch.zeros(64)
    (low,), (high,) = run_both(kernel(body, 2), [x, y], (1,), (64,), outputs=[1])
    exact = torch.tanh(x.double())
    assert ((high - exact) / exact.abs() - 2**-11).abs().max() < 1e-6
    assert ((low - exact) / exact.abs() + 2**-11).abs().max() < 1e-6


def test_uneven_work_reconverges():
    """A lane that arrives late at a warp instruction is waited for, whatever the order of the code."""
    body = f"""setp.lt.u32 %p0, %i, 7; mov.u32 %r1, %i;
    @%p0 bra $far;
    $near: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    {AT} st.global.u32 [%at], %r2;
    ret;
    $far: add.u32 %r1, %r1, 100;
    bra $near;"""
    out = torch.zeros(64, dtype=torch.int32)
    run(load(kernel(body, 1)), [out], (1,), (64,))
    assert out.tolist() == [(k ^ 1) + (100 if (k ^ 1) < 7 else 0) for k in range(64)]
