"""Hypothesis over shapes, strides and values: the native kernels agree with the reference, and the unit with its limits."""

from __future__ import annotations

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis", reason="needs the test extra")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import ctkernels  # noqa: E402
from ctkernels.functional import ctu  # noqa: E402
from ctkernels.ops import backends  # noqa: E402
from ctkernels.testing import assert_no_worse  # noqa: E402

needs_native = pytest.mark.skipif(backends.NATIVE is None, reason="no native kernels here")
common = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def strided(draw):
    """A tensor of any rank and layout, dense or not, and one of its dimensions."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    base = scale * torch.randn([shape[d] * step[d] for d in order], generator=generator)
    for position, d in enumerate(order):
        base = base.narrow(position, 0, base.shape[position]) if step[d] == 1 else base.index_select(
            position, torch.arange(base.shape[position])
        ).unfold(position, 1, step[d]).squeeze(-1)  # fmt: skip
    x = base.permute([order.index(d) for d in range(len(shape))])
    return x, draw(st.integers(0, len(shape) - 1))


@needs_native
@common
@given(
    case=strided(),
    activation=st.sampled_from(["relu", "prelu", "relu6", "gelu", "gelu_tanh"]),
    seed=st.integers(0, 1000),
)
def test_native_agrees_with_the_reference(case, activation, seed):
    x, channel_dim = case
    count = x.shape[channel_dim]
    generator = torch.Generator().manual_seed(seed)
    beta, coeff, slope = (0.98 * torch.rand(count, generator=generator) for _ in range(3))
    dy = torch.randn(x.shape, generator=generator)
    results = {}
    for name, dtype in (("cpu", torch.float32), ("reference", torch.float32), ("truth", torch.float64)):
        with ctkernels.use_backend("cpu" if name == "cpu" else "reference"):
            leaves = [t.to(dtype).requires_grad_() for t in (x, beta, coeff, slope)]
            y = ctu(leaves[0], *leaves[1:3], channel_dim=channel_dim, activation=activation, negative_slope=leaves[3])
            wanted = leaves if activation == "prelu" else leaves[:3]
            results[name] = [y.detach(), *torch.autograd.grad(y, wanted, dy.to(dtype))]
    terms = (1 + x.abs().max().item()) ** 2 * max(1.0, x.numel() / count)
    for key, got, truth, baseline in zip(
        ["y", "dx", "dbeta", "dcoeff", "dslope"], results["cpu"], results["truth"], results["reference"]
    ):
        assert_no_worse(key, got, truth, baseline, terms, grade=1e-6)


@common
@given(
    value=st.floats(-(2.0**99), 2.0**99, width=32),
    beta=st.floats(0.0, 1.0),
    coeff=st.floats(0.0, 1.0),
    activation=st.sampled_from(["relu", "relu6", "gelu", "gelu_tanh"]),
)
def test_bounds_of_the_unit(value, beta, coeff, activation):
    """0 <= relu - SiLU branch, softplus branch - relu: the unit stays between the two, and its slope within 0.13 of [0, 1]."""
    x = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    y = ctu(x, beta, coeff, activation=activation)
    (slope,) = torch.autograd.grad(y, x)
    assert torch.isfinite(y).all()
    assert -0.14 <= slope.item() <= 1.14
    s = 1 - beta
    excess = (y - (x.clamp(0, 6) if activation == "relu6" else x.relu())).item()
    # relu - w sigma(beta w / s) is at most 0.2785 s / beta; softplus exceeds the relu by at most s ln 2
    low = -coeff * min(abs(value) + 6, 0.2785 * s / beta if beta > 0 else float("inf"))
    high = (1 - coeff) * s * 0.6932
    if activation == "relu6":  # the difference of two
        low, high = low - high, high - low
    rounding = 1e-9 + 8 * torch.finfo(torch.float64).eps * abs(
        value
    )  # of quotient, products and sum, as large as value
    assert low - rounding <= excess <= high + rounding


@common
@given(beta=st.floats(0.0, 0.999), coeff=st.floats(0.0, 1.0), x=st.floats(-50, 50))
def test_symmetry_of_the_bump(beta, coeff, x):
    """phi(x) - relu(x) is even: phi(x) - phi(-x) = x."""
    pair = torch.tensor([x, -x], dtype=torch.float64)
    y = ctu(pair, beta, coeff)
    assert abs((y[0] - y[1]).item() - x) <= 4e-16 * (abs(x) + y.abs().max().item()) * 4
