"""Calls that go to the compiled kernels without the dispatcher: the same bits, and nothing unusual meets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ctkernels
from ctkernels.functional import attention_head_edit, ctu, head_edit
from ctkernels.ops import eager
from ctkernels.ops.attention import function as attention_function
from ctkernels.ops.ctu import function as ctu_function
from ctkernels.ops.head_edit import function as edit_function
from ctkernels.ops.registration import OPS
from ctkernels.testing.samples import samples

pytestmark = pytest.mark.skipif(eager.MISSING is not None, reason=str(eager.MISSING))
ENTRIES = (
    (ctu_function, "_EAGER"),
    (ctu_function, "_EAGER_IN_PLACE"),
    (edit_function, "_EAGER"),
    (attention_function, "_EAGER"),
)


def declines(*_):
    return NotImplemented


@pytest.fixture
def answers(monkeypatch):
    """What the entries of public functions answer from now on."""
    seen: list[Any] = []

    def noting(entry):
        def call(*args):
            seen.append(entry(*args))
            return seen[-1]

        return call

    for module, name in ENTRIES:
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    return seen


def general(monkeypatch):
    """From now on every entry declines."""
    for module, name in ENTRIES:
        monkeypatch.setattr(module, name, declines)
    for op in OPS.values():
        monkeypatch.setattr(op, "eager", eager.NONE)


def leaves(sample):
    return [t for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]


def result(sample):
    tensors = leaves(sample)
    for t in tensors:
        t.requires_grad_(t.is_leaf)
    y = sample.function(*sample.args, **sample.kwargs)
    with torch.no_grad():
        plain = sample.function(*sample.args, **sample.kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    inputs = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    return (y.detach(), plain, *(g for g in grads if g is not None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_bits_as_through_the_dispatcher(dtype, answers, monkeypatch):
    direct = [result(sample) for sample in samples(dtype)]
    assert sum(isinstance(y, Tensor) for y in answers) > 10
    assert sum(y is None for y in answers) > 10
    general(monkeypatch)
    for sample, got in zip(samples(dtype), direct):
        for a, b in zip(got, result(sample), strict=True):
            assert a.stride() == b.stride(), sample.name
            assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()), sample.name


# (B, H, G, T, S, D, E), layout, options
ATTENTION: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "full": ((2, 3, 3, 5, 5, 8, 8), {}),
    "causal": ((2, 3, 3, 40, 40, 16, 16), {"is_causal": True}),
    "one query": ((3, 6, 2, 1, 13, 16, 16), {"is_causal": True, "enable_gqa": True}),
    "grouped": ((2, 4, 2, 3, 7, 8, 8), {"enable_gqa": True, "scale": 0.3}),
    "one head": ((2, 1, 1, 5, 5, 8, 8), {}),
    "wider values": ((2, 3, 3, 5, 5, 8, 12), {"is_causal": True}),
    "narrow values": ((2, 3, 3, 5, 5, 8, 1), {}),
    "a mask": ((2, 3, 3, 5, 7, 8, 8), {"attn_mask": torch.rand(2, 1, 5, 7) < 0.6}),
    "padding": ((2, 3, 3, 5, 7, 8, 8), {"attn_mask": (torch.arange(7) < 4).expand(2, 1, 1, 7)}),
}


def attention(name, dtype, layout):
    (batch, heads, groups, tokens, keys, dim, size), options = ATTENTION[name]
    generator = torch.Generator().manual_seed(0)

    def data(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = (heads, tokens, dim), (groups, keys, dim), (groups, keys, size)
    if layout == "heads first":
        q, k, v = (data(batch, *s) for s in shapes)
    else:  # keys and values are the first tokens of a longer cache
        q, k, v = (data(batch, s[1] + 4 * (i > 0), s[0], s[2])[:, : s[1]].transpose(1, 2) for i, s in enumerate(shapes))
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    edits = [t.to(wide) for t in (data(heads, size), data(heads, size), data(heads), data(heads))]
    return [t.to(dtype) for t in (q, k, v)] + edits, options


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_has_the_same_bits_as_through_the_dispatcher(name, dtype, layout, answers, monkeypatch):
    def call():
        tensors, options = attention(name, dtype, layout)
        with torch.no_grad():
            plain = attention_head_edit(*tensors, **options)
            moved = attention_head_edit(*tensors[:4], None, tensors[5], **options)
        y = attention_head_edit(*(t.requires_grad_() for t in tensors), **options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
        return plain, moved, y.detach(), *torch.autograd.grad(y, tensors, dy)

    direct = call()
    assert [type(answer) for answer in answers[:3]] == [Tensor, Tensor, type(None)]
    general(monkeypatch)
    for a, b in zip(direct, call(), strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan())


def test_attention_under_autocast_is_as_through_the_dispatcher(answers, monkeypatch):
    tensors, options = attention("causal", torch.float32, "heads first")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        direct = attention_head_edit(*tensors, **options)
        assert isinstance(answers[0], Tensor)
        general(monkeypatch)
        assert torch.equal(direct, attention_head_edit(*tensors, **options))
    assert direct.dtype == torch.bfloat16


class Subclass(Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def under(context):
    with context:
        return ctu(torch.ones(4), 0.5)


def in_forward_mode():
    with torch.autograd.forward_ad.dual_level():
        return ctu(torch.ones(4), 0.5)


def negated():
    return torch.complex(torch.ones(4), -torch.ones(4)).conj().imag


def attend(**changed):
    tensors = {name: torch.ones(1, 2, 3, 4) for name in ("q", "k", "v")} | {"m": torch.ones(2, 4)}
    return attention_head_edit(**tensors | changed)


UNUSUAL: dict[str, Callable[[], Any]] = {
    "a subclass": lambda: ctu(torch.ones(4).as_subclass(Subclass), 0.5),
    "a subclass as a knob": lambda: ctu(torch.ones(4), torch.tensor(0.5).as_subclass(Subclass)),
    "a mode of functions": lambda: under(FunctionMode()),
    "a mode of the dispatcher": lambda: under(DispatchMode()),
    "a forced backend": lambda: under(ctkernels.use_backend("reference")),
    "the profiler": lambda: under(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])),
    "a default device": lambda: under(torch.device("cpu")),
    "vmap": lambda: torch.vmap(lambda x: ctu(x, 0.5))(torch.ones(1, 4))[0],
    "a gradient of torch.func": lambda: torch.func.grad(lambda x: ctu(x, 0.5).sum())(torch.ones(4)),
    "forward mode": in_forward_mode,
    "a trace": lambda: torch.jit.trace(lambda x: ctu(x, 0.5), torch.ones(4), check_trace=False)(torch.ones(4)),
    "lazy negation": lambda: ctu(negated(), 0.5),
    "strides that have to be copied": lambda: ctu(torch.ones(8)[::2], 0.5),
    "no elements": lambda: ctu(torch.ones(0), 0.5),
    "the meta device": lambda: ctu(torch.ones(4, device="meta"), 0.5),
    "attention with a query of a subclass": lambda: attend(q=torch.ones(1, 2, 3, 4).as_subclass(Subclass)),
    "attention with an edit that is widened": lambda: attend(m=torch.ones(2, 4, dtype=torch.bfloat16)),
    "attention with queries that overlap": lambda: attend(q=torch.ones(1, 2, 1, 4).expand(1, 2, 3, 4)),
    "causal attention with a cache": lambda: attend(q=torch.ones(1, 2, 2, 4), is_causal=True),
    "causal attention with a mask": lambda: attend(attn_mask=torch.ones(1, 1, 1, 3).bool(), is_causal=True),
    "attention with a mask of fewer dimensions": lambda: attend(attn_mask=torch.ones(3, 3).bool()),
    "an edit of a subclass": lambda: head_edit(torch.ones(4), torch.ones(2, 2).as_subclass(Subclass)),
    "an edit under vmap": lambda: torch.vmap(lambda z: head_edit(z, torch.ones(2, 2)))(torch.ones(1, 4)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_goes_the_general_way(name, answers):
    UNUSUAL[name]()
    assert answers
    assert all(y is NotImplemented for y in answers)


WRONG: dict[str, Callable[[], Any]] = {
    "beta": lambda: ctu(torch.ones(4), 1.5),
    "beta is NaN": lambda: ctu(torch.ones(4), float("nan")),
    "coeff": lambda: ctu(torch.ones(4), 0.5, -0.1),
    "eps": lambda: ctu(torch.ones(4), 0.5, eps=2.0),
    "activation": lambda: ctu(torch.ones(4), 0.5, activation="tanh"),
    "channel_dim": lambda: ctu(torch.ones(4), torch.full((4,), 0.5), channel_dim=1),
    "count": lambda: ctu(torch.ones(2, 4), torch.full((2,), 0.5), channel_dim=1),
    "no channel_dim": lambda: ctu(torch.ones(4), torch.full((4,), 0.5)),
    "residual": lambda: ctu(torch.ones(4), 0.5, residual=torch.ones(2, 2)),
    "heads": lambda: head_edit(torch.ones(6), torch.ones(2, 2)),
    "shapes": lambda: head_edit(torch.ones(4), torch.ones(2, 2), torch.ones(4, 1)),
    "gate": lambda: head_edit(torch.ones(4), torch.ones(2, 2), g_m=torch.ones(4)),
    "gate of nothing": lambda: head_edit(torch.ones(4), torch.ones(2, 2), g_a=torch.ones(2)),
    "attention, dtypes": lambda: attend(k=torch.ones(1, 2, 3, 4).double()),
    "attention, sizes": lambda: attend(k=torch.ones(1, 2, 3, 5)),
    "attention, keys and values": lambda: attend(v=torch.ones(1, 2, 4, 4)),
    "attention, heads": lambda: attend(q=torch.ones(1, 4, 3, 4), m=torch.ones(4, 4)),
    "attention, edit": lambda: attend(m=torch.ones(4, 2)),
    "attention, no edit": lambda: attend(m=None),
    "attention, gate": lambda: attend(g_m=torch.ones(4)),
    "attention, gate of nothing": lambda: attend(g_a=torch.ones(2)),
    "attention, mask": lambda: attend(attn_mask=torch.ones(1, 1, 3, 2).bool()),
    "attention, mask of integers": lambda: attend(attn_mask=torch.ones(1, 1, 3, 3).int()),
}


@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "recording"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_goes_the_general_way(name, recording, answers):
    with torch.set_grad_enabled(recording), pytest.raises((ValueError, TypeError)):
        WRONG[name]()
    assert answers == [NotImplemented]


def test_compiled_code_does_not_meet_them(monkeypatch):
    def met(*_):
        raise AssertionError("compiled code has met an entry")

    q = torch.ones(1, 2, 3, 2)
    expected = (
        ctu(torch.ones(4), 0.5),
        head_edit(torch.ones(4), torch.ones(2, 2)),
        attend(q=q, k=q, v=q, m=torch.ones(2, 2)),
    )
    for module, name in ENTRIES:
        monkeypatch.setattr(module, name, met)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x, m):
        return ctu(x, 0.5), head_edit(x, m), attention_head_edit(q, q, q, m)

    for a, b in zip(call(torch.ones(4), torch.ones(2, 2)), expected):
        assert torch.equal(a, b)


def test_saved_tensors_are_seen_by_hooks_and_checked():
    x, beta = torch.randn(4, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        ctu(x, beta)
    assert any(t is x for t in packed)
    assert any(t is beta for t in packed)
    w = x.clone()
    y = ctu(w, beta)
    w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_derivatives_of_derivatives_and_batched_ones():
    x, beta = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda t: ctu(t, beta), x)
    rows = torch.eye(4, dtype=torch.float64)
    (batched,) = torch.autograd.grad(ctu(x, beta), x, rows, is_grads_batched=True)
    one_by_one = torch.stack([torch.autograd.grad(ctu(x, beta), x, row)[0] for row in rows])
    torch.testing.assert_close(batched, one_by_one)


def test_a_residual_and_x_have_one_gradient():
    x, residual = (torch.randn(4, requires_grad=True) for _ in range(2))
    first, second = torch.autograd.grad(ctu(x, 0.5, residual=residual), (x, residual), torch.ones(4))
    assert torch.equal(first, second)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_after_a_norm(dtype, memory_format):
    entry = eager.entry("ctu_after_norm")
    norm = torch.nn.BatchNorm2d(5).requires_grad_(False).eval()
    for t in (norm.running_mean, norm.weight, norm.bias):
        t.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    norm = norm.to(dtype)
    z, residual = (torch.randn(2, 5, 4, 6).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    beta, coeff = torch.rand(5), torch.rand(5)
    vectors = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    wide = [t.double() for t in vectors[:4]]
    truth = torch.nn.functional.batch_norm(z.double(), *wide, False, 0.0, norm.eps) + residual.double()
    truth = ctu(truth, beta.double(), coeff.double(), channel_dim=1)
    theirs = ctu(norm(z) + residual, beta, coeff, channel_dim=1)
    given = z.clone(memory_format=torch.preserve_format)
    y = entry(given, beta, coeff, None, None, None, residual, 1, 0, False, 0.0, *vectors)
    assert y is given
    ulp = torch.finfo(dtype).eps * truth.abs().max()
    assert (y.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + ulp
    wrong = torch.randn(2, 4, 4, 6).to(dtype)
    assert entry(wrong, 0.5, 0.5, None, None, None, None, None, 0, False, 0.0, *vectors) is NotImplemented


def test_explain_names_the_way():
    assert "without the dispatcher" in ctkernels.explain(torch.ones(4))


def test_a_torch_without_the_conversions_is_named(monkeypatch):
    monkeypatch.setattr(eager, "MISSING", "torch 2.11 lacks torch_tensor_from_pyobject, which 2.14 added")
    assert eager.entry("ctu")(torch.ones(4)) is NotImplemented
    assert "through the dispatcher: torch 2.11" in ctkernels.explain(torch.ones(4))
