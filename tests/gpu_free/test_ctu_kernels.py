"""Executed PTX: the CT unit's GPU kernels: each backend's host code and the PTX of its compiler, executed on the CPU, held to the
CPU kernels' bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from conformance import check_against_float64, outputs, sample_named
from ctu_checks import (
    NANS,
    check_digits_of_logits,
    check_extremes,
    check_forty_digits,
    check_nan_at_beta_one,
    check_nan_parameter,
    check_plain_at_beta_one,
    check_products_that_overflow,
    check_sixteen_bits,
    check_slopes_near_one,
)

from ctkernels.functional import ctu
from ctkernels.testing import SAMPLES

if TYPE_CHECKING:
    pass

FLOAT, DOUBLE, HALVES = torch.float32, torch.float64, (torch.bfloat16, torch.float16)
NAMES = [s.name for s in SAMPLES["ctu"]()]
# One sample of each cut (rows of one channel, columns with channels of their own, several periods side by side) and of each
# width of access.
CUTS = ["NCHW, long runs", "NLC, more channels than a block", "NLC, odd channels", "NCHW, runs of four"]
FEW = [*CUTS, "logits", "gelu", "gelu_tanh", "prologue, inner channels", "shared beta, coeff per channel"]


def _run(toolchain, name, dtype, sm=80, approx=0):
    with toolchain(sm, approx):
        return outputs(sample_named(name, dtype))


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_sample(toolchain, name, dtype):
    check_against_float64(sample_named(name, dtype), _run(toolchain, name, dtype))


@pytest.mark.parametrize(
    ("name", "dtype", "sm"),
    [
        *[(name, torch.float16, 80) for name in FEW],
        *[(name, DOUBLE, 80) for name in [*FEW, "relu6", "learned slopes, some above 1"]],
        *[(name, dtype, sm) for name in FEW for dtype in (FLOAT, torch.bfloat16) for sm in (90, 100)],
        *[(name, dtype, sm) for name in CUTS[:3] for dtype in (torch.float16, DOUBLE) for sm in (90, 100)],
    ],
    ids=str,
)
def test_other_types_and_targets(toolchain, name, dtype, sm):
    check_against_float64(sample_named(name, dtype), _run(toolchain, name, dtype, sm))


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_double_parameters(toolchain, dtype):
    """The parameters of a network are float, whatever its activations are; double ones are read too."""
    name = "NLC, more channels than a block"
    first = sample_named(name, dtype).args[0]
    sample = sample_named(name, dtype).map(lambda _, t: t if t is first or t.shape == first.shape else t.double())
    with toolchain():
        found = outputs(sample)
    assert found["d1"].dtype == DOUBLE
    check_against_float64(sample, found)


@pytest.mark.parametrize("sm", [80, 100])
@pytest.mark.parametrize("dtype", [FLOAT, *HALVES, DOUBLE], ids=str)
def test_approximate_units_at_both_ends_of_their_error(toolchain, dtype, sm):
    for name in ("NCHW, long runs", "NCHW, runs of odd length", "gelu", "gelu_tanh", "relu6"):
        low, high = (_run(toolchain, name, dtype, sm, approx) for approx in (-1, 1))
        check_against_float64(sample_named(name, dtype), low)
        check_against_float64(sample_named(name, dtype), high)
        if dtype == FLOAT:  # the error was there to be seen
            assert any(not torch.equal(low[key], high[key]) for key in low), name


@pytest.mark.parametrize("name", FEW)
def test_same_bits_on_every_run_and_target(toolchain, name):
    """But for Blackwell, where Triton sums in pairs."""
    for targets in ((80, 90, 80), (100, 100)):
        first, *others = (_run(toolchain, name, FLOAT, sm) for sm in targets)
        for again in others:
            for key in first:
                assert torch.equal(first[key], again[key]), (key, targets)


def test_small_problems_take_one_launch_each(toolchain):
    for shape in ((1,), (2, 5, 3), (5, 7), (1, 1, 3072), (8, 64, 7, 7)):
        channel = 1 if len(shape) != 3 else 2
        count = shape[channel] if len(shape) > 1 else 1
        leaves = [torch.rand(shape), *(0.9 * torch.rand(count) for _ in range(2))]
        leaves = [t.requires_grad_() for t in leaves]
        with toolchain() as recorder:
            ctu(*leaves, channel_dim=channel if len(shape) > 1 else None).sum().backward()
        assert recorder.roles == ["forward", "backward"], shape


def test_frozen_parameters_cost_nothing(toolchain):
    x = torch.randn(300, 128, requires_grad=True)
    with toolchain() as recorder:
        ctu(x, 0.9).sum().backward()
    assert recorder.roles == ["forward", "backward"]
    assert recorder.launches[1].sums == 0


@pytest.mark.parametrize("shape", [(3, 8, 5), (4, 6, 300)])
def test_inplace(toolchain, shape):
    for x in (torch.randn(shape), torch.randn(shape).transpose(0, 1), torch.randn(shape)[:, ::2]):
        residual = torch.randn(x.shape)
        with toolchain():
            expected = ctu(x, 0.8, residual=residual)
            y = ctu(x, 0.8, residual=residual, inplace=True)
        assert y.data_ptr() == x.data_ptr()
        assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_unaligned_storage(toolchain, dtype):
    """A view that starts at an odd element: vectors would be misaligned, which the executor faults."""
    x = torch.randn(4 * 256 + 1).to(dtype)[1:].view(4, 256)
    with toolchain():
        found = ctu(x, 0.9)
    assert torch.allclose(found.float(), ctu(x, 0.9).float(), atol=1e-6 if dtype == FLOAT else 2e-2)


@pytest.mark.parametrize("grouped", ["beta", "all"])
def test_parameters_per_sample(toolchain, grouped):
    x, beta = torch.randn(3, 20, 8, dtype=DOUBLE), 0.9 * torch.rand(3, 8, dtype=DOUBLE)
    coeff = torch.rand(3, 8, dtype=DOUBLE) if grouped == "all" else torch.rand(8, dtype=DOUBLE)

    def total(x, b, c):
        return ctu(x, b, c, channel_dim=1).square().sum()

    gradients = torch.func.vmap(torch.func.grad(total, (0, 1, 2)), (0, 0, 0 if grouped == "all" else None))
    expected = gradients(x, beta, coeff)
    with toolchain():
        found = gradients(x, beta, coeff)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_against_forty_digits(toolchain, activation):
    pytest.importorskip("mpmath", reason="needs the test extra")
    check_forty_digits(activation, lambda approx: toolchain(80, approx))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bits_are_good_to_half_an_ulp(toolchain, dtype, activation):
    for sm, approx in ((80, -1), (100, 1)):
        check_sixteen_bits(dtype, activation, lambda approx, sm=sm: toolchain(sm, approx), approx)


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_plain_activation_at_beta_one(toolchain, dtype):
    check_plain_at_beta_one(dtype, lambda approx: toolchain(80, approx))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, torch.bfloat16], ids=str)
def test_logits_keep_the_digits_of_one_minus_a_knob(toolchain, dtype, activation):
    check_digits_of_logits(dtype, activation, lambda approx: toolchain(80, approx))


def test_slopes_near_one(toolchain):
    check_slopes_near_one(lambda approx: toolchain(80, approx))


@pytest.mark.parametrize(
    ("dtype", "activation"), [(FLOAT, "relu"), (FLOAT, "gelu"), (FLOAT, "gelu_tanh"), (torch.bfloat16, "relu")], ids=str
)
def test_nan_at_beta_one(toolchain, dtype, activation):
    check_nan_at_beta_one(dtype, activation, lambda approx: toolchain(80, approx))


@pytest.mark.parametrize(
    ("dtype", "activation", "name", "raw"),
    [
        (FLOAT, "relu", "beta", False),
        (FLOAT, "relu", "coeff", True),
        (FLOAT, "prelu", "negative_slope", False),
        (torch.bfloat16, "relu", "beta", True),
        (torch.bfloat16, "gelu", "coeff", False),
        (torch.bfloat16, "gelu", "beta", False),
        (torch.bfloat16, "gelu_tanh", "beta", False),
        (DOUBLE, "relu6", "beta", False),
        (torch.bfloat16, "relu", "scale", False),
    ],
    ids=str,
)
def test_nan_parameters(toolchain, dtype, activation, name, raw):
    check_nan_parameter(dtype, activation, name, lambda approx: toolchain(80, approx), raw, NANS[1])


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (FLOAT, "prelu"),
        (FLOAT, "relu6"),
        (torch.bfloat16, "relu6"),
        (torch.bfloat16, "gelu"),
        (torch.bfloat16, "gelu_tanh"),
        (DOUBLE, "relu"),
    ],
    ids=str,
)
def test_products_that_overflow(toolchain, dtype, activation):
    check_products_that_overflow(dtype, activation, lambda approx: toolchain(80, approx))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_infinities_nan_and_extremes(toolchain, dtype, activation):
    check_extremes(dtype, activation, lambda approx: toolchain(80, approx))
