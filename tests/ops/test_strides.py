"""Shapes, dtypes and strides of results and gradients: those of the fakes, which compiled programs rely on, everywhere.

Strides of dimensions of one value are not compared: nobody steps along them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("hypothesis", reason="needs the test extra")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ctkernels
import ctkernels.fusion
from ctkernels.functional import ctu, head_edit
from ctkernels.ops import backends, layout
from ctkernels.ops.registration import OPS

# An implementation is in force for all examples.
quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
common = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=quiet)
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


# ---- implementations, kernels apart ------------------------------------------------------------------------------------
# Results are allocated and copied by host code, which runs here without a GPU. What kernels would write is another test's.


@contextlib.contextmanager
def _cuda():
    pytest.importorskip("numpy", minversion="2.0", reason="the recorder needs numpy 2")
    if not backends.CUDA_BINDING.exists():
        pytest.skip("the host code of the CUDA kernels is not built (CTKERNELS_BUILD=none)")
    from cuda_recorder import cuda_on_cpu

    class Silent:
        error = None

        def begin(self, x): ...

        def __call__(self, request): ...

    with cuda_on_cpu(Silent()):  # type: ignore[type-var]
        yield


@contextlib.contextmanager
def _triton():
    pytest.importorskip("triton", reason="triton is not installed")
    from recorder import through_kernels

    from ctkernels.ops import launcher
    from ctkernels.ops.channelwise.launch import implementation

    with mock.patch.object(launcher, "launch", return_value=None), through_kernels(implementation):
        yield


IMPLEMENTATIONS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "cpu": lambda: ctkernels.use_backend("cpu"),
    "reference": lambda: ctkernels.use_backend("reference"),
    "cuda": _cuda,
    "triton": _triton,
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    if request.param == "cpu" and backends.NATIVE is None:
        pytest.skip(backends.BACKENDS["cpu"].missing)
    with IMPLEMENTATIONS[request.param]():
        yield request.param


def _metadata(t):
    steps = tuple(step for size, step in zip(t.shape, t.stride()) if size != 1)
    return tuple(t.shape), t.dtype, steps if t.numel() else None


def _agree(op, inputs, attrs, dy):
    grad_mask = op.grad_mask([t is not None and t.is_floating_point() for t in inputs])
    found = [op.forward(inputs, attrs), *op.backward(dy, inputs, attrs, grad_mask)]
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in inputs]
        ops = torch.ops.ctkernels
        expected = [getattr(ops, op.name)(*fakes, *attrs)]
        expected += getattr(ops, op.name + "_backward")(mode.from_tensor(dy), *fakes, *attrs, grad_mask)
    for name, a, b in zip(["y", *(op.inputs._fields[i] for i in op.indices(grad_mask))], found, expected):
        assert _metadata(a) == _metadata(b), name
    assert len(found) == len(expected)


# ---- random views ------------------------------------------------------------------------------------------------------


@st.composite
def views(draw, least=1, sizes=(0, 1, 1, 2, 3, 4, 6)):
    """Permuted, sliced, flipped in order, expanded, channels last; sizes of 0 and 1 among others."""
    shape = draw(st.lists(st.sampled_from(sizes), min_size=least, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=len(shape), max_size=len(shape)))
    base = torch.randn([shape[d] * step for d, step in zip(order, steps)])
    base = base[tuple(slice(None, None, step) for step in steps)]
    x = base.permute([order.index(d) for d in range(len(shape))])
    kind = draw(st.sampled_from(["as it is"] * 4 + ["flipped", "expanded", "channels last", "offset"]))
    if kind == "flipped":
        x = x.flip(0)
    elif kind == "expanded":
        d = draw(st.integers(0, len(shape) - 1))
        x = x.narrow(d, 0, min(1, shape[d])).expand(shape) if shape[d] else x
    elif kind == "channels last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "offset":
        x = torch.randn(x.numel() + 3)[3:].view(x.shape)
    return x


@common
@given(data=st.data())
def test_results_of_the_unit(implementation, data):
    dtype = data.draw(FLOATS)
    x = data.draw(views()).to(dtype)
    dim = data.draw(st.integers(0, x.dim() - 1))
    count, rows = x.shape[dim], x.shape[0]

    def knob():
        forms = [(), (1,), (count,)]
        if dim > 0 and rows > 0:
            forms += [(rows, count), (rows, 1)]
        t = torch.rand(data.draw(st.sampled_from(forms)))
        return t.T.contiguous().T if t.dim() == 2 and data.draw(st.booleans()) else t

    optional = [knob() if data.draw(st.booleans()) else None for _ in range(3)]
    residual = data.draw(st.sampled_from([None, torch.randn_like(x), torch.randn(x.shape).to(dtype)]))
    inputs, kind = (x, knob(), knob(), *optional, residual), int(optional[0] is not None)
    _agree(OPS["ctu"], inputs, (dim, kind, False, 0.0), torch.randn(x.shape).to(dtype))


@common
@given(data=st.data())
def test_results_of_the_head_edit(implementation, data):
    dtype, heads = data.draw(FLOATS), data.draw(st.sampled_from([1, 2, 3]))
    x = data.draw(views(least=2, sizes=(0, 1, 2, 3, 6)))
    if x.shape[-1] % heads:
        heads = 1
    rows = x.shape[0]
    lead = (rows,) if rows and data.draw(st.booleans()) else ()
    edits = [torch.randn(*lead, x.shape[-1]) if data.draw(st.booleans()) else None for _ in range(2)]
    gates = [None if e is None or data.draw(st.booleans()) else torch.rand(*lead, heads) for e in edits]
    x = x.to(dtype)
    op = OPS["head_edit"]
    _agree(op, (x, *edits, *gates), (x.dim() - 1,), torch.randn(x.shape).to(dtype))


@common
@given(data=st.data())
def test_results_of_gates(implementation, data):
    log_alpha = data.draw(views()).to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    noise, mode = data.draw(
        st.sampled_from([(None, 1), (None, 2), (torch.rand(log_alpha.shape).to(log_alpha.dtype), 0)])
    )
    op = OPS["hard_concrete"]
    _agree(op, (log_alpha, noise), (-1, mode, 0.33, -0.1, 1.1), torch.randn(log_alpha.shape).to(log_alpha.dtype))


def test_sizes_of_one_have_no_say():
    """Views of fake tensors have other strides there than those of real ones."""
    for strides in ((1, 0, 5, 60), (1, 120, 120, 60), (1, 7, 7, 60)):
        x = torch.empty(120).as_strided((60, 1, 1, 2), strides)
        assert layout.result_like(x).stride()[::3] == (1, 60)
    z = torch.zeros(130).as_strided((2, 60, 1, 1, 1), (60, 1, 0, 5, 5))
    with FakeTensorMode() as mode:
        fake = head_edit(mode.from_tensor(z), a=torch.ones(2, 1), head_axis=0).stride()
    assert fake[:2] == head_edit(z, a=torch.ones(2, 1), head_axis=0).stride()[:2] == (60, 1)


@common
@given(x=views())
def test_one_rule(x):
    """x's own strides where it is dense, contiguous where it is not or is empty."""
    dense = x.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(x)
    assert layout.result_like(x).stride() == (x.stride() if dense else torch.empty(x.shape).stride())


# ---- ops of more than one shape ------------------------------------------------------------------------------------------


@common
@given(data=st.data())
def test_results_of_attention(data):
    batch, heads, tokens, keys, size, value = (data.draw(st.sampled_from([1, 2, 3])) for _ in range(6))

    def laid_out(*shape):
        t = torch.randn(shape)
        return data.draw(st.sampled_from([t, t.transpose(1, 2).contiguous().transpose(1, 2), t.mT.contiguous().mT]))

    q, k, v = (laid_out(batch, heads, t, d) for t, d in ((tokens, size), (keys, size), (keys, value)))
    m = torch.randn(value, heads).T if data.draw(st.booleans()) else None
    a = torch.randn(heads, value)
    gates = [None if e is None else torch.rand(2 * heads)[::2] for e in (m, a)]
    mask = torch.ones(tokens, keys, dtype=torch.bool).expand(batch, heads, tokens, keys)
    tensors = (q, k, v, m, a, *gates, mask, None, None)
    numbers = (0, 0, 0.5, 1 << 30, 1 << 30)
    keep, needs = 3, sum(1 << i for i, t in enumerate(tensors[:7]) if t is not None)
    ops = torch.ops.ctkernels
    found = ops.attention_head_edit(*tensors, *numbers, keep)
    dy = torch.randn(found[0].shape)
    found = [*found, *ops.attention_head_edit_backward(dy, *found[1:], *tensors, *numbers, needs)]
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in tensors]
        expected = ops.attention_head_edit(*fakes, *numbers, keep)
        grads = ops.attention_head_edit_backward(mode.from_tensor(dy), *expected[1:], *fakes, *numbers, needs)
        expected = [*expected, *grads]
    assert [_metadata(t) for t in found] == [_metadata(t) for t in expected]


def _images(data):
    batch, channels = data.draw(st.sampled_from([0, 1, 2])), data.draw(st.sampled_from([1, 2, 4]))
    size = [data.draw(st.sampled_from([1, 3, 6])) for _ in range(2)]
    x = torch.randn(batch, channels, *size)
    layouts = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        torch.randn(batch, *size, 2 * channels)[..., ::2].movedim(-1, 1),
    ]
    return data.draw(st.sampled_from([*layouts, x.transpose(2, 3)]))


@common
@given(data=st.data())
def test_results_of_a_frozen_convolution(data):
    x = _images(data)
    kernel = data.draw(st.sampled_from([1, 3]))
    weight = torch.randn(3, x.shape[1], kernel, kernel)
    bias, scale = (data.draw(st.sampled_from([None, torch.randn(3)])) for _ in range(2))
    geometry = ([data.draw(st.sampled_from([1, 2]))] * 2, [1, 1], [1, 1], 1)
    ops = torch.ops.ctkernels
    with torch.no_grad():
        y = ops.frozen_conv(x, weight, bias, scale, *geometry)
        last = data.draw(st.booleans())
        dy = torch.randn(y.shape)
        found = [y, ops.frozen_conv_backward(dy, weight, scale, x.shape, last, *geometry)]
        with FakeTensorMode() as mode:
            fake, *fakes = [t if t is None else mode.from_tensor(t) for t in (x, weight, bias, scale)]
            expected = [ops.frozen_conv(fake, *fakes, *geometry)]
            expected.append(
                ops.frozen_conv_backward(mode.from_tensor(dy), fakes[0], fakes[2], x.shape, last, *geometry)
            )
    assert [_metadata(t) for t in found] == [_metadata(t) for t in expected]


@common
@given(data=st.data())
def test_results_of_a_pooling(data):
    x = _images(data)
    sizes = ([2, 2], [2, 2], [1, 1], [1, 1], data.draw(st.booleans()))
    ops = torch.ops.ctkernels
    last = x.is_contiguous(memory_format=torch.channels_last)
    y, indices = ops.max_pool2d(x, *sizes)
    dy = torch.randn(y.shape)
    found = [y, indices, ops.max_pool2d_backward(dy, indices, x.shape, last, *sizes)]
    with FakeTensorMode() as mode:
        expected = [*ops.max_pool2d(mode.from_tensor(x), *sizes)]
        expected.append(ops.max_pool2d_backward(mode.from_tensor(dy), expected[1], x.shape, last, *sizes))
    assert [_metadata(t) for t in found] == [_metadata(t) for t in expected]


# ---- compiled ----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "sequence first": lambda: torch.randn(7, 2, 12).transpose(0, 1),
    "turned": lambda: torch.randn(12, 7, 2).permute(2, 1, 0),
    "sliced": lambda: torch.randn(2, 7, 24)[:, :, ::2],
    "expanded": lambda: torch.randn(2, 1, 12).expand(2, 7, 12),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_programs(layout):
    """The compiler's own check of strides, of results and gradients, and the values after it."""
    torch._dynamo.reset()
    z, m, index = LAYOUTS[layout](), torch.randn(3, 3, 4), torch.tensor([2, 0])
    beta = torch.rand(12)

    def f(z, m, beta):
        return head_edit(z, m, index=index) + ctu(z, beta, channel_dim=-1)

    leaves = [t.detach().requires_grad_() for t in (z, m, beta)]
    expected = f(*leaves)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    found = torch.compile(f, fullgraph=True)(*leaves)
    grads = torch.autograd.grad(found.square().sum(), leaves)
    assert found.stride() == expected.stride()
    for a, b in zip((found, *grads), (expected, *wanted)):
        torch.testing.assert_close(a, b)
