"""Executed PTX: the Triton backend's launch code and compiled PTX, executed on the CPU, held to the CPU kernels' bounds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from conformance import check_against_float64, outputs, sample_named
from ctu_checks import (
    NANS,
    Run,
    check_digits_of_logits,
    check_extremes,
    check_forty_digits,
    check_nan_at_beta_one,
    check_nan_parameter,
    check_plain_at_beta_one,
    check_products_that_overflow,
    check_sixteen_bits,
)
from triton_recorder import Recorder, triton_on_cpu

from ctkernels.functional import ctu
from ctkernels.testing import ctu_samples

NAMES = [s.name for s in ctu_samples()]
# One sample of each kind of cut: rows of one channel, lanes with channels of their own, several periods side by side.
FEW = ["NCHW, long runs", "NLC, more channels than a block", "NLC, odd channels", "gelu", "logits"]
FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)


def _on_cpu(sm: int = 80) -> Run:
    return lambda approx: triton_on_cpu(Recorder(sm, approx))


def _run(name: str, dtype: torch.dtype, sm: int, approx: int = 0) -> dict[str, torch.Tensor]:
    with triton_on_cpu(Recorder(sm, approx)):
        return outputs(sample_named(name, dtype))


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_sample(name: str, dtype: torch.dtype) -> None:
    found = _run(name, dtype, 80)
    check_against_float64(sample_named(name, dtype), found)


@pytest.mark.parametrize(
    ("name", "dtype", "sm"),
    [
        *[(name, torch.float16, 80) for name in FEW],
        *[(name, torch.float64, 80) for name in ("NCHW, long runs", "logits", "gelu", "relu6")],
        *[(name, dtype, sm) for name in FEW[:3] for dtype in (FLOAT, *HALVES, torch.float64) for sm in (90, 100)],
    ],
    ids=str,
)
def test_other_types_and_targets(name: str, dtype: torch.dtype, sm: int) -> None:
    check_against_float64(sample_named(name, dtype), _run(name, dtype, sm))


@pytest.mark.parametrize("sm", [80, 100])
@pytest.mark.parametrize("dtype", [FLOAT, *HALVES, torch.float64], ids=str)
def test_approximate_units_at_both_ends_of_their_error(dtype: torch.dtype, sm: int) -> None:
    for name in ("NCHW, runs of odd length", "gelu", "relu6"):
        low, high = (_run(name, dtype, sm, approx) for approx in (-1, 1))
        check_against_float64(sample_named(name, dtype), low)
        check_against_float64(sample_named(name, dtype), high)
        if dtype == FLOAT:  # the error was there to be seen
            assert not torch.equal(low["y"], high["y"])


@pytest.mark.parametrize("name", FEW)
def test_same_bits_on_every_run(name: str) -> None:
    for sm in (80, 90, 100):
        first, again = _run(name, FLOAT, sm), _run(name, FLOAT, sm)
        for key in first:
            assert torch.equal(first[key], again[key]), key


def test_small_problems_take_one_launch_each() -> None:
    for shape in ((1,), (2, 5, 3), (5, 7), (1, 1, 3072), (8, 64, 7, 7)):
        channel = 1 if len(shape) != 3 else 2
        count = shape[channel] if len(shape) > 1 else 1
        leaves = [torch.rand(shape), *(0.9 * torch.rand(count) for _ in range(2))]
        leaves = [t.requires_grad_() for t in leaves]
        with triton_on_cpu(Recorder(80)) as recorder:
            ctu(*leaves, channel_dim=channel if len(shape) > 1 else None).sum().backward()
        assert [name for name, *_ in recorder.launches] == [
            "ctu_forward_channelwise_kernel",
            "ctu_backward_channelwise_kernel",
        ], shape


def test_frozen_parameters_cost_nothing() -> None:
    x = torch.randn(300, 128, requires_grad=True)
    with triton_on_cpu(Recorder(80)) as recorder:
        ctu(x, 0.9).sum().backward()
    assert [name for name, *_ in recorder.launches] == [
        "ctu_forward_channelwise_kernel",
        "ctu_backward_channelwise_kernel",
    ]
    assert recorder.launches[1][2]["SUM_MASK"] == 0


@pytest.mark.parametrize("shape", [(3, 8, 5), (4, 6, 300)])
def test_inplace(shape: tuple[int, ...]) -> None:
    for x in (torch.randn(shape), torch.randn(shape).transpose(0, 1), torch.randn(shape)[:, ::2]):
        residual = torch.randn(x.shape)
        with triton_on_cpu(Recorder(80)):
            expected = ctu(x, 0.8, residual=residual)
            y = ctu(x, 0.8, residual=residual, inplace=True)
        assert y.data_ptr() == x.data_ptr()
        assert torch.equal(x, expected)


def test_unaligned_storage() -> None:
    """A view that starts at an odd element: vectors would be misaligned, which the executor faults."""
    for dtype in (FLOAT, torch.bfloat16):
        x = torch.randn(4 * 256 + 1).to(dtype)[1:].view(4, 256)
        with triton_on_cpu(Recorder(80)):
            found = ctu(x, 0.9)
        assert torch.allclose(found.float(), ctu(x, 0.9).float(), atol=1e-6 if dtype == FLOAT else 2e-2)


@pytest.mark.parametrize("grouped", ["beta", "all"])
def test_parameters_per_sample(grouped: str) -> None:
    x, beta = torch.randn(3, 20, 8, dtype=torch.float64), 0.9 * torch.rand(3, 8, dtype=torch.float64)
    coeff = torch.rand(3, 8, dtype=torch.float64) if grouped == "all" else torch.rand(8, dtype=torch.float64)

    def total(x: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return ctu(x, b, c, channel_dim=1).square().sum()

    gradients = torch.func.vmap(torch.func.grad(total, (0, 1, 2)), (0, 0, 0 if grouped == "all" else None))
    expected = gradients(x, beta, coeff)
    with triton_on_cpu(Recorder(80)):
        found = gradients(x, beta, coeff)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_against_forty_digits(activation: str) -> None:
    pytest.importorskip("mpmath", reason="needs the test extra")
    check_forty_digits(activation, _on_cpu())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bits_are_good_to_half_an_ulp(dtype: torch.dtype, activation: str) -> None:
    for sm, approx in ((80, -1), (100, 1)):
        check_sixteen_bits(dtype, activation, _on_cpu(sm), approx)


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_plain_activation_at_beta_one(dtype: torch.dtype) -> None:
    check_plain_at_beta_one(dtype, _on_cpu())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, FLOAT, torch.bfloat16], ids=str)
def test_logits_keep_the_digits_of_one_minus_a_knob(dtype: torch.dtype, activation: str) -> None:
    check_digits_of_logits(dtype, activation, _on_cpu())


@pytest.mark.parametrize(("dtype", "activation"), [(FLOAT, "relu"), (FLOAT, "gelu"), (torch.bfloat16, "relu")], ids=str)
def test_nan_at_beta_one(dtype: torch.dtype, activation: str) -> None:
    check_nan_at_beta_one(dtype, activation, _on_cpu())


@pytest.mark.parametrize(
    ("dtype", "activation", "name", "raw"),
    [
        (FLOAT, "relu", "beta", False),
        (FLOAT, "relu", "coeff", True),
        (FLOAT, "prelu", "negative_slope", False),
        (torch.bfloat16, "relu", "beta", True),
        (torch.bfloat16, "gelu", "coeff", False),
        (torch.bfloat16, "gelu", "beta", False),
        (torch.float64, "relu6", "beta", False),
        (torch.bfloat16, "relu", "scale", False),
    ],
    ids=str,
)
def test_nan_parameters(dtype: torch.dtype, activation: str, name: str, raw: bool) -> None:
    check_nan_parameter(dtype, activation, name, _on_cpu(), raw, NANS[1])


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(FLOAT, "prelu"), (FLOAT, "relu6"), (torch.bfloat16, "relu6"), (torch.bfloat16, "gelu"), (torch.float64, "relu")],
    ids=str,
)
def test_products_that_overflow(dtype: torch.dtype, activation: str) -> None:
    check_products_that_overflow(dtype, activation, _on_cpu())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_infinities_nan_and_extremes(dtype: torch.dtype, activation: str) -> None:
    check_extremes(dtype, activation, _on_cpu())
