"""Rung 5: the Triton backend's launch code and compiled PTX, executed on the CPU, held to the CPU kernels' bounds."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

import truth
from conformance import check_against_float64, outputs, sample_named
from triton_recorder import Recorder, triton_on_cpu

from ctkernels.functional import ctu
from ctkernels.testing import ctu_samples

NAMES = [s.name for s in ctu_samples()]
# One sample of each kind of cut: rows of one channel, lanes with channels of their own, several periods side by side.
FEW = ["NCHW, long runs", "NLC, more channels than a block", "NLC, odd channels", "gelu", "logits"]
FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)


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
        assert [name for name, *_ in recorder.launches] == ["ctu_forward", "ctu_backward"], shape


def test_frozen_parameters_cost_nothing() -> None:
    x = torch.randn(300, 128, requires_grad=True)
    with triton_on_cpu(Recorder(80)) as recorder:
        ctu(x, 0.9).sum().backward()
    assert [name for name, *_ in recorder.launches] == ["ctu_forward", "ctu_backward"]
    assert recorder.launches[1][2]["WANTED"] == 0


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


POINTS = [0.0, 1e-40, 1e-5, -3e-4, 0.01, 0.3, -0.7, 1.5, -2.5, 4.0, -6.0, 9.5, -20.0, 50.0, -87.0, 300.0, -1e4, 1e4]
BETAS = [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_against_forty_digits(activation: str) -> None:
    pytest.importorskip("mpmath", reason="needs the test extra")
    x = torch.tensor(POINTS)
    leaf = x.repeat(len(BETAS) * 3).requires_grad_()
    cases = list(itertools.product(BETAS, (0.0, 0.3, 1.0), POINTS))
    knobs = [torch.tensor([case[i] for case in cases], dtype=torch.float64, requires_grad=True) for i in (0, 1)]
    for approx in (-1, 1):
        with triton_on_cpu(Recorder(80, approx)):
            y = ctu(leaf, *knobs, channel_dim=0, activation=activation)
            found = [y.detach(), *torch.autograd.grad(y, (leaf, *knobs), torch.ones_like(y))]
        for i, (beta, coeff, _) in enumerate(cases):
            point = leaf[i].item()
            expected, u = truth.unit(point, beta, coeff, gaussian=activation == "gelu"), abs(point) / (1 - beta)
            for name, values in zip(("y", "x", "beta", "coeff"), found):
                bound = (2e-6 if u <= 10 else 1e-5) * float(expected[name].terms) + 2.0**-118 * max(1.0, u, abs(point))
                error = abs(values[i].item() - float(expected[name].value))
                assert error <= bound, f"d{name} at x={point}, beta={beta}, coeff={coeff}: {error} > {bound}"


def check_sixteen_bits(dtype: torch.dtype, activation: str, recorder: Recorder) -> None:
    """Half an ulp of the result and 2e-4 of its terms; gradients of the knobs are float32 and have the second alone."""
    x = torch.linspace(-9, 9, 1400).to(dtype).repeat(4).requires_grad_()
    betas = torch.tensor([0.2, 0.5, 0.8, 0.95]).repeat_interleave(1400).requires_grad_()
    coeffs = torch.tensor([0.0, 0.3, 0.7, 1.0]).repeat(1400).requires_grad_()
    with triton_on_cpu(recorder):
        y = ctu(x, betas, coeffs, channel_dim=0, activation=activation)
        found = [y.detach(), *torch.autograd.grad(y, (x, betas, coeffs), torch.ones_like(y))]
    wide = [t.detach().double().requires_grad_() for t in (x, betas, coeffs)]
    exact = ctu(*wide, channel_dim=0, activation=activation)
    expected = [exact.detach(), *torch.autograd.grad(exact, wide, torch.ones_like(exact))]
    w, beta, _ = (t.detach() for t in wide)
    s, u = 1 - beta, w.abs() / (1 - beta)
    terms = [w.abs() + s, 1 + beta * u * torch.exp(-beta * u), 1 + u * u * torch.exp(-beta * u), w.abs() + s]
    for name, got, want, size in zip(("y", "dx", "dbeta", "dcoeff"), found, expected, terms):
        half_ulp = torch.finfo(dtype).eps / 2 * want.abs() + torch.finfo(dtype).tiny if got.dtype == dtype else 0.0
        excess = ((got.double() - want).abs() - half_ulp - 2e-4 * size).max().item()
        assert excess <= 0, f"{name}: {excess} too much"


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sixteen_bits_are_good_to_half_an_ulp(dtype: torch.dtype, activation: str) -> None:
    for sm, approx in ((80, -1), (100, 1)):
        check_sixteen_bits(dtype, activation, Recorder(sm, approx))


@pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
def test_plain_activation_at_beta_one(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(200, dtype=torch.float64) * 10.0**k for k in range(-8, 6)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, 6.25]).double()]).to(dtype)
    x = x[x != 6]  # torch's relu6 has slope 0 there, the unit 1
    for activation, plain in (("relu", torch.relu), ("relu6", torch.nn.functional.relu6)):
        leaf = x.clone().requires_grad_()
        beta = torch.ones((), requires_grad=True)
        with triton_on_cpu(Recorder(80)):
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
    with triton_on_cpu(Recorder(80)):
        y = ctu(x, betas, torch.tensor([0.0, 1.0]).repeat(6), channel_dim=1, activation=activation, negative_slope=0.1)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (y[0] == (6.0 if activation == "relu6" else float("inf"))).all()
    assert (y[1] == (-float("inf") if activation == "leaky_relu" else 0.0)).all()
    assert y[2].isnan().all()
    assert dx[2].isnan().all()
    assert torch.isfinite(y[3:]).all()
    assert torch.isfinite(dx[[0, 1, 3, 4, 5, 6]]).all()
