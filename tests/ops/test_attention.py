"""attention_head_edit on the CPU: against float64 written out, its gradients, its promises about memory, its errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import NAMES, Case, check, results
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import ctkernels
from ctkernels.functional import attention_head_edit, head_edit
from ctkernels.ops import eager
from ctkernels.ops.attention import cost_model
from ctkernels.ops.attention.problem import KEEP_LSE, KEEP_Z, Problem
from ctkernels.ops.attention.reference import UNBOUNDED

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FLOAT = torch.float32
CASES = [
    Case("full", (2, 3, 3, 5, 5, 8, 8)),
    Case("causal", (2, 3, 3, 9, 9, 8, 8), {"is_causal": True}),
    Case("causal, fewer queries than keys", (2, 4, 2, 4, 11, 8, 8), {"is_causal": True}),
    Case("causal, more queries than keys", (2, 2, 2, 7, 4, 8, 8), {"is_causal": True}),
    Case("decoding, grouped", (3, 6, 2, 1, 13, 16, 16), {"is_causal": True}, layout="tokens first"),
    Case("one key head", (2, 4, 1, 5, 6, 8, 8)),
    Case("window", (1, 2, 2, 12, 12, 8, 8), {"is_causal": True, "window": 3}),
    Case("window both ways, fewer queries", (1, 2, 2, 6, 12, 8, 8), {"window": 4}),
    Case("padding", (3, 2, 2, 9, 9, 8, 8), mask="padding"),
    Case("padding, causal", (3, 4, 2, 9, 9, 8, 8), {"is_causal": True}, mask="padding"),
    Case("mask with blind queries", (2, 3, 3, 5, 7, 8, 8), mask="random"),
    Case("bias", (2, 3, 3, 5, 7, 8, 8), mask="bias"),
    Case("bias, causal, scaled", (2, 3, 3, 6, 6, 8, 8), {"is_causal": True, "scale": 0.3}, mask="bias"),
    Case("wider values", (2, 2, 2, 5, 5, 8, 12), {"is_causal": True}, layout="tokens first"),
    Case("packed", (3, 4, 2, 0, 0, 8, 8), lengths=([3, 1, 6], [3, 1, 6])),
    Case("packed, causal", (4, 2, 2, 0, 0, 8, 6), {"is_causal": True}, lengths=([3, 0, 1, 6], [3, 2, 4, 6])),
    Case("packed, window", (2, 2, 2, 0, 0, 8, 8), {"is_causal": True, "window": 2}, lengths=([5, 7], [5, 9])),
    Case("scale alone", (2, 3, 3, 5, 5, 8, 8), absent=("a", "g_a", "g_m")),
    Case("offset alone", (2, 3, 3, 5, 5, 8, 8), absent=("m", "g_m")),
]
BY_NAME = {c.name: c for c in CASES}
FEW = [BY_NAME[n] for n in ("causal, fewer queries than keys", "packed, causal", "mask with blind queries")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_float64(backend, case, dtype):
    check(case, dtype, results(attention_head_edit, case.tensors(dtype), upstream=dtype, **case.arguments()))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_dispatcher_op_in_plain_torch(case):
    """What the fused kernels' op computes where there are no such kernels."""
    with _fused_anywhere():
        check(case, FLOAT, results(attention_head_edit, case.tensors(FLOAT), upstream=FLOAT, **case.arguments()))


def _fused_anywhere():
    return _Patched()


class _Patched:
    """The op is chosen whatever the device."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(cost_model, "fused_refusal", lambda *args: None)
        self.patch.setattr("ctkernels.ops.attention.function._EAGER", lambda *args: NotImplemented)
        self.patch.setattr("ctkernels.ops.attention.function.choose", lambda *args: cost_model.FUSED)

    def __exit__(self, *exception):
        self.patch.undo()


def test_equals_torch_then_edit_where_torch_aligns_alike():
    t = BY_NAME["causal"].tensors(torch.float32)
    y = attention_head_edit(**t, is_causal=True)
    z = F.scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=True)
    assert torch.equal(y, head_edit(z, t["m"], t["a"], t["g_m"], t["g_a"], head_axis=1))


def test_decoding_one_by_one_equals_all_at_once():
    case = Case("", (2, 4, 2, 7, 7, 8, 8), {"is_causal": True}, layout="tokens first")
    t = case.tensors(torch.float64)
    q, k, v, *edits = t.values()
    whole = attention_head_edit(*t.values(), **case.arguments())
    for i in range(7):
        one = attention_head_edit(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], *edits, **case.arguments())
        torch.testing.assert_close(one, whole[:, :, i : i + 1], rtol=1e-12, atol=1e-12)


TINY = [
    Case("causal, grouped, fewer queries than keys", (1, 2, 1, 2, 3, 3, 2), {"is_causal": True}),
    Case("packed", (2, 1, 1, 0, 0, 2, 2), {"is_causal": True}, lengths=([2, 1], [2, 2])),
    Case("blind queries", (1, 1, 1, 2, 3, 2, 2), mask="random"),
]


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_gradcheck(case):
    tensors = {n: t.requires_grad_() for n, t in case.tensors(torch.float64).items() if t is not None}

    def call(*values):
        return attention_head_edit(**dict(zip(tensors, values)), **case.arguments())

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), check_forward_ad=True)
    with ctkernels.use_backend("reference"):
        assert torch.autograd.gradcheck(call, tuple(tensors.values()))
        assert torch.autograd.gradgradcheck(call, tuple(tensors.values()), check_fwd_over_rev=True)
    with _fused_anywhere():
        assert torch.autograd.gradcheck(call, tuple(tensors.values()))
        assert torch.autograd.gradgradcheck(call, tuple(tensors.values()))


def _problem(case, dtype=torch.float32):
    t = case.tensors(dtype)
    t = {n: x.requires_grad_() for n, x in t.items() if x is not None}
    starts = (None, None, 0, 0)
    if case.lengths:
        found = case.arguments()
        starts = (*found["cu_seqlens"], *found["max_seqlen"])
    mask = case.attn_mask()
    return Problem(*(t.get(n) for n in NAMES), mask, *starts, 0.35, -1, 0 if case.options.get("is_causal") else -1)


@pytest.mark.parametrize("keep", [0, KEEP_Z, KEEP_Z | KEEP_LSE])
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
def test_opcheck(case, keep):
    problem = _problem(case)
    op = torch.ops.ctkernels.attention_head_edit
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    # a gradient needs what it asks to be kept
    utils = (*utils, "test_aot_dispatch_dynamic") if keep == KEEP_Z | KEEP_LSE and not case.lengths else utils
    assert set(opcheck(op.default, (*problem, keep), test_utils=utils).values()) == {"SUCCESS"}
    if keep == KEEP_Z | KEEP_LSE:
        y, z, lse = op(*problem, keep)
        needs = 0b1111111
        detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in problem]
        backward = torch.ops.ctkernels.attention_head_edit_backward.default
        found = opcheck(backward, (torch.randn(y.shape), z.detach(), lse.detach(), *detached, needs), test_utils=utils)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", [CASES[2], BY_NAME["padding, causal"], BY_NAME["window"]], ids=lambda c: c.name)
def test_compile_fullgraph(case, fused):
    torch._dynamo.reset()
    compiled = torch.compile(attention_head_edit, fullgraph=True, backend="aot_eager")
    expected = results(attention_head_edit, case.tensors(FLOAT), upstream=FLOAT, **case.arguments())
    if fused:
        with _fused_anywhere():
            found = results(compiled, case.tensors(FLOAT), upstream=FLOAT, **case.arguments())
    else:
        found = results(compiled, case.tensors(FLOAT), upstream=FLOAT, **case.arguments())
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)


def test_compiled_packed():
    torch._dynamo.reset()
    case = BY_NAME["packed, causal"]
    compiled = torch.compile(attention_head_edit, fullgraph=True)
    found, expected = (
        results(f, case.tensors(FLOAT), upstream=FLOAT, **case.arguments()) for f in (compiled, attention_head_edit)
    )
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)


class _Ops(TorchDispatchMode):
    """Names of the ops that run, and the largest thing each writes, in bytes."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(ctkernels.ops.backends.NATIVE is None, reason="the passes of the compiled edit are counted")
def test_passes_over_memory_that_the_edit_makes():
    """Without gradients one pass, in place; with them one forward, beside the z that attention keeps anyway, one backward."""
    t = BY_NAME["causal"].tensors(torch.float32)
    with _Ops() as ops, torch.no_grad():
        attention_head_edit(**t, is_causal=True)
    edits = [n for n in ops.names if n.startswith("ctkernels")]
    assert edits == ["ctkernels::head_edit_"]
    assert sum("attention" in n for n in ops.names) == 1
    assert not {"aten::clone", "aten::copy_", "aten::mul", "aten::add"} & {n.split(".")[0] for n in ops.names}

    own = {n: x.requires_grad_() for n, x in t.items()}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda s: saved.update({s.untyped_storage().data_ptr(): s.untyped_storage().nbytes()}) or s, lambda s: s
    ):
        y = attention_head_edit(**own, is_causal=True)
    inputs = {x.untyped_storage().data_ptr() for x in own.values()}
    kept = [size for pointer, size in saved.items() if pointer not in inputs]
    assert sorted(kept)[-1] == y.numel() * y.element_size()  # z, once
    assert sorted(kept)[-2] < y.numel() * y.element_size()  # and the sums of exponentials
    with _Ops() as ops:
        y.sum().backward()
    assert [n for n in ops.names if n.startswith("ctkernels")] == ["ctkernels::head_edit_backward"]


def test_what_is_kept_for_the_backward_pass_of_the_op():
    t = BY_NAME["full"].tensors(torch.float32)
    kept = {}
    for needed in ((), ("a",), ("g_a",), ("m",), ("g_m",), ("q",), ("v",)):
        own = {n: x.clone().requires_grad_(n in needed) for n, x in t.items()}
        with _fused_anywhere():
            y = attention_head_edit(**own)
        if needed:
            z, lse = y.grad_fn.saved_tensors[:2] if hasattr(y.grad_fn, "saved_tensors") else (None, None)
            kept[needed[0]] = (z.numel() > 0, lse.numel() > 0)
            y.sum().backward()
            assert {n for n, x in own.items() if x.grad is not None} == set(needed)
        else:
            assert y.grad_fn is None
    both, only_z, nothing = (True, True), (True, False), (False, False)
    assert kept == {"a": nothing, "g_a": nothing, "m": only_z, "g_m": only_z, "q": both, "v": both}


def test_autocast():
    t = {n: x.requires_grad_() for n, x in BY_NAME["causal"].tensors(torch.float32).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention_head_edit(**t, is_causal=True)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in t.values())


def test_function_transforms():
    case = Case("", (2, 2, 2, 4, 4, 8, 8))
    q, k, v, *edits = case.tensors(torch.float64).values()

    def total(q, m):
        return attention_head_edit(q, k, v, m, *edits[1:]).square().sum()

    grads = torch.func.grad(total, (0, 1))(q, edits[0])
    own = [q.clone().requires_grad_(), edits[0].clone().requires_grad_()]
    for a, b in zip(grads, torch.autograd.grad(total(*own), own)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_no_key_has_the_edit_alone_and_no_gradient(kind):
    """Its output is a, whatever q, k and v are, also in the reference, whose softmax has no value there."""
    q, k, v = (torch.randn(1, 1, size, 4, requires_grad=True) for size in (2, 3, 3))
    a = torch.randn(1, 4)
    sees = torch.tensor([[False] * 3, [True] * 3])
    mask = sees if kind == "bool" else torch.zeros(2, 3).masked_fill(~sees, -math.inf)
    with ctkernels.use_backend("reference"):
        y = attention_head_edit(q, k, v, a=a, attn_mask=mask)
        blind = torch.autograd.grad(y[:, :, 0].sum(), (q, k, v), retain_graph=True)
        assert torch.equal(y[:, :, 0], a[None])
        assert all(torch.equal(g, torch.zeros_like(g)) for g in blind)
        want = torch.autograd.grad((torch.softmax(q[:, :, 1:] @ k.mT / 2, -1) @ v).sum(), (q, k, v))
        for got, expected in zip(torch.autograd.grad(y.sum(), (q, k, v)), want):
            torch.testing.assert_close(got, expected)


def test_weights_of_large_scores_add_up_to_one():
    """In the reference: to the last bits, whatever the scores are; their exponentials are not off by a rounded logarithm."""
    q, k = 30 * torch.randn(1, 2, 50, 8), 30 * torch.randn(1, 2, 60, 8)
    ones = torch.ones(1, 2, 60, 1, requires_grad=True)
    with ctkernels.use_backend("reference"):
        y = attention_head_edit(q, k, ones, torch.zeros(2, 1))
        (grad,) = torch.autograd.grad(y.sum(), ones)
    eps = torch.finfo(torch.float32).eps
    assert ((y - 1).abs() <= 4 * eps).all()
    assert ((grad.sum(2) - 50).abs() <= 50 * 4 * eps).all()


@pytest.mark.parametrize("strides", [(1, 1, 1, 1), (1, 16, 0, 1), (1, 0, 0, 1), (0, 0, 0, 1)])
def test_queries_that_share_memory(strides):
    """Torch's own kernel leaves part of the result unwritten for some of these."""
    q = torch.randn(40).as_strided((1, 2, 4, 8), strides).requires_grad_()
    k, v, m = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(2, 8)
    y = attention_head_edit(q, k, v, m)
    (grad,) = torch.autograd.grad(y.square().sum(), q)
    apart = q.detach().contiguous().requires_grad_()
    expected = attention_head_edit(apart, k, v, m)
    assert torch.equal(y, expected)
    assert torch.equal(grad, torch.autograd.grad(expected.square().sum(), apart)[0])


def test_empty():
    m = torch.randn(2, 8)
    for sizes in ((0, 2, 2, 3, 3, 8, 8), (2, 2, 2, 0, 3, 8, 8), (2, 2, 2, 3, 0, 8, 8)):
        q, k, v, *_ = Case("", sizes).tensors(torch.float32).values()
        y = attention_head_edit(q, k, v, m, m)
        assert y.shape == q.shape
        assert torch.equal(y, m[:, None, :].expand(y.shape) if y.numel() else y)


def test_meta():
    q = torch.empty(2, 4, 7, 16, device="meta")
    assert attention_head_edit(q, q, q, torch.empty(4, 16, device="meta"), is_causal=True).shape == q.shape


ERRORS = {
    "q must be (batch, heads, tokens, head_dim), got shape (5, 8)": {"q": torch.zeros(5, 8)},
    "k must have q's dtype": {"k": torch.zeros(2, 3, 5, 8, dtype=torch.float64)},
    "k must have q's 3 heads, got 1; enable_gqa=True": {"k": torch.zeros(2, 1, 5, 8), "v": torch.zeros(2, 1, 5, 8)},
    "k must have q's head_dim 8, got 4": {"k": torch.zeros(2, 3, 5, 4)},
    "k must have q's batch size 2, got 1": {"k": torch.zeros(1, 3, 5, 8), "v": torch.zeros(1, 3, 5, 8)},
    "v must have k's shape but for head_dim": {"v": torch.zeros(2, 3, 6, 8)},
    "m must have shape (3, 8), got (2, 8)": {"m": torch.zeros(2, 8)},
    "g_m must have shape (3,), got (4,)": {"g_m": torch.zeros(4)},
    "g_m gates m, which is None": {"m": None},
    "at least one of m and a": {"m": None, "a": None, "g_m": None, "g_a": None},
    "window must be a positive int or None, got 0": {"window": 0},
    "scale must be a number": {"scale": "big"},
    "attn_mask must broadcast to (B, H, T, S) = (2, 3, 5, 5), got shape (2, 5)": {
        "attn_mask": torch.ones(2, 5, dtype=torch.bool)
    },
    "attn_mask gets no gradient": {"attn_mask": torch.zeros(5, 5, requires_grad=True)},
    "attn_mask must be float32": {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)},
    "max_seqlen belongs to cu_seqlens": {"max_seqlen": 5},
    "q must be (tokens, heads, head_dim)": {"cu_seqlens": torch.tensor([0, 5])},
    "implementation must be one of 'fused', 'separate'": {"implementation": "best"},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    arguments = CASES[0].tensors(torch.float32) | ERRORS[message]
    with pytest.raises((ValueError, TypeError)) as caught:
        attention_head_edit(**arguments)
    assert str(caught.value).startswith("attention_head_edit: ")
    assert message in str(caught.value)


def test_packed_errors():
    q = torch.zeros(5, 2, 8)
    m = torch.zeros(2, 8)
    for starts, message in (
        (torch.tensor([0.0, 5.0]), "int32 or int64"),
        (torch.tensor([0]), "shape (B + 1,)"),
        ((torch.tensor([0, 5]), torch.tensor([0, 2, 5])), "as many sequences, got 1 and 2"),
    ):
        with pytest.raises(ValueError, match="cu_seqlens") as caught:
            attention_head_edit(q, q, q, m, cu_seqlens=starts)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="attn_mask is for unpacked"):
        attention_head_edit(q, q, q, m, cu_seqlens=torch.tensor([0, 5]), attn_mask=torch.ones(5, 5))


def test_forcing():
    t = CASES[0].tensors(torch.float32)
    with pytest.raises(RuntimeError, match=r"fused kernels were forced .* (cpu|triton is not installed)"):
        attention_head_edit(**t, implementation="fused")
    with ctkernels.use_backend("triton"), pytest.raises(RuntimeError, match="forced"):
        attention_head_edit(**t)
    assert torch.equal(attention_head_edit(**t, implementation="separate"), attention_head_edit(**t))


def test_explain():
    text = ctkernels.explain(CASES[0].tensors(torch.float32)["q"], "attention_head_edit")
    assert "serves cuda tensors" in text or "triton is not installed" in text
    assert "separate   used" in text
    assert ("eager calls: compiled code" in text) == (eager.MISSING is None)


def test_a_compiled_program_is_fused_where_torch_has_no_fast_kernel(monkeypatch):
    monkeypatch.setattr(cost_model, "fused_refusal", lambda *args: None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def chosen(tokens=9, groups=4, dtype=torch.bfloat16, mask=False, left=UNBOUNDED):
        q, k = torch.empty(2, 4, tokens, 8, dtype=dtype), torch.empty(2, groups, 9, 8, dtype=dtype)
        seen = torch.ones(2, 4, tokens, 9, dtype=torch.bool) if mask else None
        return cost_model.choose(q, k, k, seen, 1.0, left, 0, True, None, None)

    assert chosen() == chosen(groups=2) == chosen(dtype=FLOAT) == cost_model.SEPARATE
    assert chosen(mask=True) == chosen(left=3) == chosen(tokens=1) == chosen(tokens=5) == cost_model.FUSED
    assert chosen(groups=2, dtype=FLOAT) == cost_model.FUSED


def test_cost_model():
    """Our kernel where its fused edit pays, a faster attention where its lead is larger than the edit's passes."""
    long = cost_model.Shape(8, 32, 32, 8192, 8192, 128, 128, 2, True, True)
    short = long._replace(tokens=128, keys=128)
    decode = cost_model.Shape(1, 32, 8, 1, 8192, 128, 128, 2, False, False)
    hopper, ampere = cost_model.PEAKS[9], cost_model.PEAKS[8]
    assert cost_model.seconds(hopper, long, "cudnn") < cost_model.seconds(hopper, long, "fused")
    assert cost_model.seconds(hopper, short._replace(training=False), "fused") < cost_model.seconds(
        hopper, short._replace(training=False), "cudnn"
    )
    for peak in (hopper, ampere):
        assert cost_model.seconds(peak, decode, "fused") < cost_model.seconds(peak, decode, "flash")
        assert cost_model.seconds(peak, long, "fused") < cost_model.seconds(peak, long, "math")
        windowed = long._replace(window=1024, causal=False)
        assert cost_model.seconds(peak, windowed, "fused") < cost_model.seconds(peak, windowed, "efficient") / 4
    # the edit's passes: in place two, with gradients five of the size of the output, at the bandwidth
    passes = cost_model.seconds(ampere, long._replace(training=False), "flash") - 2 * cost_model.LAUNCH
    work = 2.0 * 8 * 32 * 8192 * 8192 * 256 * 0.5 / (312e12 * 0.70)
    assert passes - work == pytest.approx(2 * 8 * 8192 * 32 * 128 * 2 / 2.039e12)
