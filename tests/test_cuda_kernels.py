"""Rung 5: the CUDA backend's host code and the PTX that nvcc makes of its kernels, executed on the CPU, held to the CPU
kernels' bounds."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

import truth
from conformance import check_against_float64, outputs, sample_named
from ptx.toolchain import nvcc

import ctkernels
from ctkernels.functional import ctu, expected_l0, hard_concrete, head_edit
from ctkernels.ops import _backend
from ctkernels.ops.hard_concrete import OP as GATES
from ctkernels.ops.hard_concrete import SAMPLE
from ctkernels.ops.hard_concrete.reference import uniform
from ctkernels.testing import samples

if nvcc() is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)
if not _backend.CUDA_BINDING.exists():
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
        "ctk_logistic_forward_f32_plane_lean",
        "ctk_logistic_backward_f32_plane_lean",
    ]
    assert recorder.launches[1][-1].wanted == 0


def test_sixteen_bytes_at_a_time_where_the_layout_allows() -> None:
    cases = {
        (4, 8, 16, 16): (1, "plane_lean"),  # NCHW
        (4, 8, 7, 7): (1, "lanes_lean"),  # 49 values a channel, 392 a sample
        (4, 33, 64): (2, "lanes_lean"),
        (4, 8, 17, 17): (1, "plane_one"),  # 289 values a channel: rows start anywhere
        (5, 19): (1, "lanes_one"),
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
    assert recorder.launches[0][0].endswith("_lanes_wide")
    expected = gradients(DOUBLE)
    eps = torch.finfo(dtype).eps
    magnitude = [1 + e.abs() for e in expected[:2]]
    for value, truth_, size in zip(found[:2], expected[:2], magnitude):
        assert ((value.double() - truth_).abs() <= eps * size + 1e-6).all()
    # sums of about 420 (one head's channel) or 27,000 (a gate) products of two or three normal numbers
    for value, truth_, terms in zip(found[2:], expected[2:], (420, 420, 26880, 26880)):
        assert ((value.double() - truth_).abs() <= torch.finfo(FLOAT).eps * 4 * terms).all()


POINTS = [0.0, 1e-40, 1e-5, -3e-4, 0.01, 0.3, -0.7, 1.5, -2.5, 4.0, -6.0, 9.5, -20.0, 50.0, -87.0, 300.0, -1e4, 1e4]
BETAS = [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_against_forty_digits(activation: str) -> None:
    pytest.importorskip("mpmath", reason="needs the test extra")
    x = torch.tensor(POINTS)
    leaf = x.repeat(len(BETAS) * 3).requires_grad_()
    cases = list(itertools.product(BETAS, (0.0, 0.3, 1.0), POINTS))
    knobs = [torch.tensor([case[i] for case in cases], dtype=DOUBLE, requires_grad=True) for i in (0, 1)]
    for approx in (-1, 1):
        with cuda_on_cpu(Recorder(80, approx)):
            y = ctu(leaf, *knobs, channel_dim=0, activation=activation)
            found = [y.detach(), *torch.autograd.grad(y, (leaf, *knobs), torch.ones_like(y))]
        for i, (beta, coeff, _) in enumerate(cases):
            point = leaf[i].item()
            expected, u = truth.unit(point, beta, coeff, gaussian=activation == "gelu"), abs(point) / (1 - beta)
            for name, values in zip(("y", "x", "beta", "coeff"), found):
                bound = (2e-6 if u <= 10 else 1e-5) * float(expected[name].terms) + 2.0**-118 * max(1.0, u, abs(point))
                error = abs(values[i].item() - float(expected[name].value))
                assert error <= bound, f"d{name} at x={point}, beta={beta}, coeff={coeff}: {error} > {bound}"


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_plain_activation_at_beta_one(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(200, dtype=DOUBLE) * 10.0**k for k in range(-8, 6)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, 6.25]).double()]).to(dtype)
    x = x[x != 6]  # torch's relu6 has slope 0 there, the unit 1
    for activation, plain in (("relu", torch.relu), ("relu6", torch.nn.functional.relu6)):
        leaf = x.clone().requires_grad_()
        beta = torch.ones((), requires_grad=True)
        with cuda_on_cpu(Recorder(80)):
            y = ctu(leaf, beta, 0.3, activation=activation)
            dx, dbeta = torch.autograd.grad(y, (leaf, beta), torch.ones_like(y))
        assert torch.equal(y, plain(x))
        assert dbeta == 0
        expected = x.clone().requires_grad_()
        assert torch.equal(dx, torch.autograd.grad(plain(expected), expected, torch.ones_like(x))[0])


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_infinities_nan_and_extremes(dtype: torch.dtype, activation: str) -> None:
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1e30, 1e-45])
    betas = torch.tensor([0.0, 1e-20, 0.5, 0.9, 1 - 2.0**-24, 1.0]).repeat_interleave(2)
    x = special.to(dtype).unsqueeze(1).expand(7, 12).contiguous().requires_grad_()
    with cuda_on_cpu(Recorder(80)):
        y = ctu(x, betas, torch.tensor([0.0, 1.0]).repeat(6), channel_dim=1, activation=activation, negative_slope=0.1)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (y[0] == (6.0 if activation == "relu6" else float("inf"))).all()
    assert (y[1] == (-float("inf") if activation == "leaky_relu" else 0.0)).all()
    assert y[2].isnan().all()
    assert dx[2].isnan().all()
    assert torch.isfinite(y[3:]).all()
    assert torch.isfinite(dx[[0, 1, 3, 4, 5, 6]]).all()


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
