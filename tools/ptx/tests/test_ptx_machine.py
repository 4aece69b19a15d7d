"""Instructions of the PTX executor that need a whole kernel: memory, control flow, barriers, warps, tensor cores.

Each case is a kernel body, its buffers and the contents they must have afterwards, computed with plain Python.
"""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy", minversion="2.0")

import ptx_warp_cases  # noqa: E402, F401
from ptx import HANDLERS, Fault, Unsupported, load, parse, run  # noqa: E402
from ptx.bench import kernel  # noqa: E402
from ptx.values import TYPES  # noqa: E402
from ptx_kernel_cases import CASES, U8, U32  # noqa: E402


def aligned(a):
    """A copy at a multiple of 64, as device allocations are."""
    raw = np.zeros(a.nbytes + 64, U8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def _execute(c):
    arrays = [aligned(b) for b in c.before]
    run(load(c.text), arrays, c.grid, c.block, c.shared, **c.launch)
    return arrays


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_kernel(c):
    arrays = _execute(c)
    for got, want in zip(arrays, c.after(*c.before)):
        if want is not None:
            np.testing.assert_array_equal(got, np.asarray(want).astype(got.dtype).reshape(got.shape))


def test_trap_and_assertion():
    with pytest.raises(Fault, match="gave up") as fault:
        run(load(kernel("setp.eq.u32 %p0, %i, 7; @%p0 trap;", 1)), [np.zeros(1, U32)], (1,), (64,))
    assert (fault.value.kind, fault.value.thread) == ("trap", (7, 0, 0))
    module = ".extern .func __assertfail(.param .b64 a);"
    body = "{ .param .b64 p0; st.param.b64 [p0], %in0; call.uni __assertfail, (p0); }"
    with pytest.raises(Fault, match="assertion"):
        run(load(kernel(body, 1, module=module)), [np.zeros(1, U32)], (1,), (64,))


def test_recursion_is_refused():
    module = ".func f() { call.uni f; ret; }"
    with pytest.raises(Unsupported, match="recursion"):
        load(kernel("call.uni f;", 1, module=module))


def test_discard_is_refused():
    with pytest.raises(Unsupported, match="discard"):
        load(kernel("discard [%in0];", 1))


def test_every_structural_instruction_is_tested():
    seen = {("trap", ""), ("discard", "")}  # tested just above
    for c in CASES:
        module = parse(c.text)
        for function in module.functions.values():
            for s in function.code:
                typed = [m for m in s.modifiers if m in TYPES]
                seen.add((s.opcode, typed[-1] if typed else ""))
    from test_ptx_instructions import STRUCTURAL

    missing = {k for k in HANDLERS if k[0] in STRUCTURAL} - seen
    assert not missing, f"handlers without a test: {sorted(missing)}"
