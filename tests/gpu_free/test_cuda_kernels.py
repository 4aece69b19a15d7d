"""Executed PTX: the CUDA backend's host code and the PTX that nvcc makes of its kernels, executed on the CPU, held to the CPU
kernels' bounds."""

from __future__ import annotations

import pytest
import torch

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
from ptx.toolchain import nvcc

import ctkernels
from ctkernels.functional import ctu, expected_l0, hard_concrete, head_edit
from ctkernels.ops import backends
from ctkernels.ops.hard_concrete import OP as GATES
from ctkernels.ops.hard_concrete import SAMPLE
from ctkernels.ops.hard_concrete.reference import uniform
from ctkernels.testing import samples

if nvcc() is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)
if not backends.CUDA_BINDING.exists():
    pytest.skip("the host code of the CUDA kernels is not built (CTKERNELS_BUILD=none)", allow_module_level=True)

from cuda_recorder import Recorder, cuda_on_cpu

NAMES = [s.name for s in samples()]
FLOAT, DOUBLE, HALVES = torch.float32, torch.float64, (torch.bfloat16, torch.float16)
# One sample of each cut (rows of one channel, columns with channels of their own, several periods side by side), of each
# width of access, of each op.
FEW = [
    "NCHW, long runs",
    "NLC, more channels than a block",
    "NLC, odd channels",
    "NCHW, runs of four",
    "logits",
    "gelu",
    "prologue, inner channels",
    "shared beta, coeff per channel",
    "head edit (B, H, T, D)",
    "head edit (T, H D)",
    "head edit per sample",
]


def _on_cpu(sm: int = 80) -> Run:
    return lambda approx: cuda_on_cpu(Recorder(sm, approx))


def _run(name: str, dtype: torch.dtype, sm: int, approx: int = 0) -> dict[str, torch.Tensor]:
    with cuda_on_cpu(Recorder(sm, approx)):
        return outputs(sample_named(name, dtype))


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_sample(name: str, dtype: torch.dtype) -> None:
    check_against_float64(sample_named(name, dtype), _run(name, dtype, 80))


@pytest.mark.parametrize(
    ("name", "dtype", "sm"),
    [
        *[(name, torch.float16, 80) for name in FEW],
        *[(name, DOUBLE, 80) for name in [*FEW, "relu6", "learned slopes, some above 1"]],
        *[(name, dtype, sm) for name in FEW for dtype in (FLOAT, torch.bfloat16) for sm in (90, 100)],
        *[(FEW[0], dtype, sm) for dtype in (torch.float16, DOUBLE) for sm in (90, 100)],
    ],
    ids=str,
)
def test_other_types_and_targets(name: str, dtype: torch.dtype, sm: int) -> None:
    check_against_float64(sample_named(name, dtype), _run(name, dtype, sm))


# The parameters of a network are float, whatever the activations are; double ones are read too.
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["NLC, more channels than a block", "head edit per sample"])
def test_double_parameters(name: str, dtype: torch.dtype) -> None:
    first = sample_named(name, dtype).args[0]
    sample = sample_named(name, dtype).map(lambda _, t: t if t is first or t.shape == first.shape else t.double())
    with cuda_on_cpu(Recorder(80)):
        found = outputs(sample)
    assert found["d1"].dtype == DOUBLE
    expected = outputs(sample)
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected[key].double(), rtol=2e-2 if key in ("y", "d0") and dtype != FLOAT
                                   else 2e-4, atol=2e-3)  # fmt: skip


@pytest.mark.parametrize("approx", [-1, 1])
@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_approximate_units_at_both_ends_of_their_error(dtype: torch.dtype, approx: int) -> None:
    for name in ("NCHW, long runs", "gelu", "relu6"):
        check_against_float64(sample_named(name, dtype), _run(name, dtype, 80, approx))


@pytest.mark.parametrize("name", FEW)
def test_same_bits_on_every_run_and_target(name: str) -> None:
    first = _run(name, FLOAT, 80)
    for sm in (80, 90):
        again = _run(name, FLOAT, sm)
        for key in first:
            assert torch.equal(first[key], again[key]), key


def test_small_problems_take_one_launch_each() -> None:
    for shape in ((1,), (2, 5, 3), (5, 7), (1, 1, 3072), (8, 64, 7, 7)):
        channel = 1 if len(shape) != 3 else 2
        count = shape[channel] if len(shape) > 1 else 1
        leaves = [torch.rand(shape), *(0.9 * torch.rand(count) for _ in range(2))]
        leaves = [t.requires_grad_() for t in leaves]
        with cuda_on_cpu(Recorder(80)) as recorder:
            ctu(*leaves, channel_dim=channel if len(shape) > 1 else None).sum().backward()
        assert len(recorder.launches) == 2, shape


def test_frozen_parameters_cost_nothing() -> None:
    x = torch.randn(300, 128, requires_grad=True)
    with cuda_on_cpu(Recorder(80)) as recorder:
        ctu(x, 0.9).sum().backward()
    assert [name for name, *_ in recorder.launches] == [
        "ctk_ctu_logistic_forward_f32_plane_plain",
        "ctk_ctu_logistic_backward_f32_plane_plain",
    ]
    assert recorder.launches[1][-1].wanted == 0


def test_sixteen_bytes_at_a_time_where_the_layout_allows() -> None:
    cases = {
        (4, 8, 16, 16): (1, "plane_plain"),  # NCHW
        (4, 8, 7, 7): (1, "lanes_plain"),  # 49 values a channel, 392 a sample
        (4, 33, 64): (2, "lanes_plain"),
        (4, 8, 17, 17): (1, "plane_scalar"),  # 289 values a channel: rows start anywhere
        (5, 19): (1, "lanes_scalar"),
    }
    for shape, (channel_dim, expected) in cases.items():
        with cuda_on_cpu(Recorder(80)) as recorder:
            ctu(torch.randn(shape), torch.rand(shape[channel_dim]), channel_dim=channel_dim)
        assert recorder.launches[0][0].endswith(expected), shape


@pytest.mark.parametrize("shape", [(3, 8, 5), (4, 6, 300)])
def test_inplace(shape: tuple[int, ...]) -> None:
    for x in (torch.randn(shape), torch.randn(shape).transpose(0, 1), torch.randn(shape)[:, ::2]):
        residual = torch.randn(x.shape)
        with cuda_on_cpu(Recorder(80)):
            expected = ctu(x, 0.8, residual=residual)
            y = ctu(x, 0.8, residual=residual, inplace=True)
        assert y.data_ptr() == x.data_ptr()
        assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_unaligned_storage(dtype: torch.dtype) -> None:
    """A view that starts at an odd element: vectors would be misaligned, which the executor faults."""
    x = torch.randn(4 * 256 + 1).to(dtype)[1:].view(4, 256)
    with cuda_on_cpu(Recorder(80)):
        found = ctu(x, 0.9)
    assert torch.allclose(found.float(), ctu(x, 0.9).float(), atol=1e-6 if dtype == FLOAT else 2e-2)


@pytest.mark.parametrize("grouped", ["beta", "all"])
def test_parameters_per_sample(grouped: str) -> None:
    x, beta = torch.randn(3, 20, 8, dtype=DOUBLE), 0.9 * torch.rand(3, 8, dtype=DOUBLE)
    coeff = torch.rand(3, 8, dtype=DOUBLE) if grouped == "all" else torch.rand(8, dtype=DOUBLE)

    def total(x: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return ctu(x, b, c, channel_dim=1).square().sum()

    gradients = torch.func.vmap(torch.func.grad(total, (0, 1, 2)), (0, 0, 0 if grouped == "all" else None))
    expected = gradients(x, beta, coeff)
    with cuda_on_cpu(Recorder(80)):
        found = gradients(x, beta, coeff)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["(B, T, H D)", "(B, H, T, D)"])
@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_attention_heads(dtype: torch.dtype, layout: str) -> None:
    """Enough tokens for partial sums, heads that fill vectors."""
    heads, dim = 2, 64
    shape, axis = ((3, 70, heads * dim), None) if layout == "(B, T, H D)" else ((3, heads, 70, dim), 1)
    z = torch.randn(shape).to(dtype)
    leaves = [z, torch.randn(heads, dim), torch.randn(heads, dim), torch.rand(heads), torch.rand(heads)]
    dy = torch.randn(shape).to(dtype)

    def gradients(cast: type | torch.dtype | None = None) -> list[torch.Tensor]:
        given = [(t if cast is None else t.to(cast)).detach().requires_grad_() for t in leaves]
        y = head_edit(*given, head_axis=axis)
        return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]

    with cuda_on_cpu(Recorder(90)) as recorder:
        found = gradients()
    assert recorder.launches[0][0].endswith("_lanes_vector")
    expected = gradients(DOUBLE)
    eps = torch.finfo(dtype).eps
    magnitude = [1 + e.abs() for e in expected[:2]]
    for value, truth_, size in zip(found[:2], expected[:2], magnitude):
        assert ((value.double() - truth_).abs() <= eps * size + 1e-6).all()
    # sums of about 420 (one head's channel) or 27,000 (a gate) products of two or three normal numbers
    for value, truth_, terms in zip(found[2:], expected[2:], (420, 420, 26880, 26880)):
        assert ((value.double() - truth_).abs() <= torch.finfo(FLOAT).eps * 4 * terms).all()


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


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_gates(sm: int, dtype: torch.dtype) -> None:
    """All layers in one launch: as close to the double-precision reference as one rounding allows."""
    log_alpha = (4 * torch.randn(24, 37, dtype=DOUBLE)).to(dtype)
    noise = torch.rand(24, 37, dtype=DOUBLE).clamp(1e-6, 1 - 1e-6).to(dtype)
    dy = torch.randn(24, 37, dtype=DOUBLE).to(dtype)
    calls = {
        "sampled": lambda a, u: hard_concrete(a, training=True, noise=u),
        "clip": lambda a, u: hard_concrete(a, training=False),
        "mean": lambda a, u: hard_concrete(a, training=False, estimator="mean"),
        "open": lambda a, u: expected_l0(a),
    }
    eps = torch.finfo(dtype).eps
    for name, call in calls.items():
        given = [t.clone().requires_grad_() for t in (log_alpha, noise)]
        with cuda_on_cpu(Recorder(sm)) as recorder:
            value = call(*given)
            found = [value.detach(), *torch.autograd.grad(value, given[: 1 + (name == "sampled")], dy)]
        assert len(recorder.launches) == 2
        precise = [t.double().requires_grad_() for t in (log_alpha, noise)]
        with _reference():
            value = call(*precise)
            expected = [value.detach(), *torch.autograd.grad(value, precise[: len(found) - 1], dy.double())]
        for ours, theirs in zip(found, expected):
            assert ((ours.double() - theirs).abs() <= eps * theirs.abs() + 1e-10 * (1 + dy.abs())).all(), name


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_gates_from_a_seed(dtype: torch.dtype) -> None:
    """The kernel makes the numbers of the reference's generator, bit for bit, and gates and gradients from them."""
    log_alpha, dy = (torch.randn(1000, dtype=DOUBLE).to(dtype) for _ in range(2))
    static = (-1, SAMPLE, 0.33, -0.1, 1.1)
    for value in (0, 12345, -(2**62) - 7):
        seed = torch.tensor([value])
        noise = uniform(seed, log_alpha.shape, dtype)
        with cuda_on_cpu(Recorder(80)):
            found = [GATES.forward((log_alpha, seed), static), *GATES.backward(dy, (log_alpha, seed), static, 1)]
            given = [GATES.forward((log_alpha, noise), static), *GATES.backward(dy, (log_alpha, noise), static, 1)]
        for ours, theirs in zip(found, given):
            assert torch.equal(ours, theirs)


def _reference():
    return ctkernels.use_backend("reference")
