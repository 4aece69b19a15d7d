"""Checks of GPU kernels of the CT unit, independent of their compiler. ``run(approx)`` is a context that executes the kernels
on the CPU, with approximate instructions off by ``approx`` times their documented error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ctkernels.functional import ctu

Run = Callable[[int], AbstractContextManager[object]]

POINTS = [0.0, 1e-40, 1e-5, -3e-4, 0.01, 0.3, -0.7, 1.5, -2.5, 4.0, -6.0, 9.5, -20.0, 50.0, -87.0, 300.0, -1e4, 1e4]
BETAS = [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6]


def magnified(activation: str, name: str, u: float, point: float) -> float:
    """The factor of a flushed tail. The tanh gate's density is 23 times the tail there, and has the factor u^2."""
    return max(1.0, u * u if (activation, name) == ("gelu_tanh", "beta") else u, abs(point))


def check_forty_digits(activation: str, run: Run) -> None:
    """Check float32 values and gradients against mpmath."""
    import truth

    x = torch.tensor(POINTS)
    leaf = x.repeat(len(BETAS) * 3).requires_grad_()
    cases = list(itertools.product(BETAS, (0.0, 0.3, 1.0), POINTS))
    knobs = [torch.tensor([case[i] for case in cases], dtype=torch.float64, requires_grad=True) for i in (0, 1)]
    for approx in (-1, 1):
        with run(approx):
            y = ctu(leaf, *knobs, channel_dim=0, activation=activation)
            found = [y.detach(), *torch.autograd.grad(y, (leaf, *knobs), torch.ones_like(y))]
        for i, (beta, coeff, _) in enumerate(cases):
            point = leaf[i].item()
            expected, u = truth.unit(point, beta, coeff, activation=activation), abs(point) / (1 - beta)
            for name, values in zip(("y", "x", "beta", "coeff"), found):
                bound = (2e-6 if u <= 10 else 1e-5) * float(expected[name].terms)
                bound += 2.0**-118 * magnified(activation, name, u, point)
                error = abs(values[i].item() - float(expected[name].value))
                assert error <= bound, f"d{name} at x={point}, beta={beta}, coeff={coeff}: {error} > {bound}"


def check_sixteen_bits(dtype: torch.dtype, activation: str, run: Run, approx: int) -> None:
    """Check 16-bit results to half an ulp plus 2e-4 of the terms, and parameter gradients (float32) to the second alone."""
    x = torch.linspace(-9, 9, 1400).to(dtype).repeat(4).requires_grad_()
    betas = torch.tensor([0.2, 0.5, 0.8, 0.95]).repeat_interleave(1400).requires_grad_()
    coeffs = torch.tensor([0.0, 0.3, 0.7, 1.0]).repeat(1400).requires_grad_()
    with run(approx):
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


def check_plain_at_beta_one(dtype: torch.dtype, run: Run) -> None:
    """Check that at beta = 1 the unit and its gradient are those of the plain activation, bit for bit."""
    x = torch.cat([torch.randn(200, dtype=torch.float64) * 10.0**k for k in range(-8, 6)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, 6.25]).double()]).to(dtype)
    x = x[x != 6]  # torch's relu6 has slope 0 there, the unit 1
    for activation, plain in (("relu", torch.relu), ("relu6", torch.nn.functional.relu6)):
        leaf = x.clone().requires_grad_()
        beta = torch.ones((), requires_grad=True)
        with run(0):
            y = ctu(leaf, beta, 0.3, activation=activation)
            dx, dbeta = torch.autograd.grad(y, (leaf, beta), torch.ones_like(y))
        assert torch.equal(y, plain(x))
        assert dbeta == 0
        expected = x.clone().requires_grad_()
        assert torch.equal(dx, torch.autograd.grad(plain(expected), expected, torch.ones_like(x))[0])


def check_extremes(dtype: torch.dtype, activation: str, run: Run) -> None:
    """Check results for infinite and NaN inputs, and that other inputs give finite results."""
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1e30, 1e-45])
    betas = torch.tensor([0.0, 1e-20, 0.5, 0.9, 1 - 2.0**-24, 1.0]).repeat_interleave(2)
    x = special.to(dtype).unsqueeze(1).expand(7, 12).contiguous().requires_grad_()
    with run(0):
        y = ctu(x, betas, torch.tensor([0.0, 1.0]).repeat(6), channel_dim=1, activation=activation, negative_slope=0.1)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (y[0] == (6.0 if activation == "relu6" else float("inf"))).all()
    assert (y[1] == (-float("inf") if activation == "leaky_relu" else 0.0)).all()
    assert y[2].isnan().all()
    assert dx[2].isnan().all()
    assert torch.isfinite(y[3:]).all()
    assert torch.isfinite(dx[[0, 1, 3, 4, 5, 6]]).all()


def check_nan_at_beta_one(dtype: torch.dtype, activation: str, run: Run) -> None:
    """Check that parameters without effect have gradients of 0, even for infinite x, and NaN in a channel with NaN."""
    for shape in ((6, 4), (2, 4, 600)):
        x = torch.linspace(-3, 3, shape[0] * 4 * (600 if len(shape) == 3 else 1)).view(shape)
        x[0, 0], x[0, 1], x[1, 1] = float("nan"), float("inf"), -float("inf")
        leaf, beta, coeff = x.to(dtype).requires_grad_(), torch.ones(4), torch.full((4,), 0.3)
        beta[3] = 0.5
        with run(0):
            y = ctu(leaf, beta.requires_grad_(), coeff.requires_grad_(), channel_dim=1, activation=activation)
            for grad in torch.autograd.grad(y, (beta, coeff), torch.ones_like(y)):
                assert grad[0].isnan(), grad
                assert (grad[1:3] == 0).all(), grad
                assert grad[3].isfinite(), grad
                assert grad[3] != 0, grad


def check_digits_of_logits(dtype: torch.dtype, activation: str, run: Run) -> None:
    """Check the precision of 1 - beta and 1 - coeff where the sigmoids of the logits round to 1. At w = 0, values and gradients
    of a unit are products of them: (1 - coeff) s times ln 2 or 1 / sqrt(2 pi)."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    logits = [(rho, -20.0) for rho in (17.0, 25.0, 40.0)] + [(0.5, rho) for rho in (17.0, 25.0, 40.0, 60.0)]
    knobs = [torch.tensor(values, dtype=precision, requires_grad=True) for values in zip(*logits)]
    with run(0):
        y = ctu(torch.zeros(1, len(logits), dtype=dtype), *knobs, channel_dim=1, raw=True, activation=activation)
        found = [y.detach()[0], *torch.autograd.grad(y, knobs, torch.ones_like(y))]
    b, c = (torch.sigmoid(k.detach().double()) for k in knobs)
    s, c1 = (torch.sigmoid(-k.detach().double()) for k in knobs)
    height = math.log(2) if activation not in ("gelu", "gelu_tanh") else 1 / math.sqrt(2 * math.pi)
    expected = [c1 * s * height, -c1 * height * b * s, -s * height * c * c1]
    share = {torch.float64: 4e-13, torch.float32: 2e-6}.get(dtype, 2e-4)
    for name, got, exact in zip(("y", "dbeta", "dcoeff"), found, expected):
        info = torch.finfo(got.dtype)
        bound = (share + info.eps / 2) * exact.abs() + info.tiny
        assert ((got.double() - exact).abs() <= bound).all(), f"{name}: {got} instead of {exact}"


def check_slopes_near_one(run: Run) -> None:
    """Check that 1 - slope keeps the precision and sign of a float64 slope for every type of x; in float32 it would be 0."""
    slopes = [1 + 5e-9, 1 - 5e-9, 1.0058296590617, 0.9941703409383]
    x, beta = torch.tensor([[-3087.25] * 4, [-0.5] * 4]), torch.full((4,), 0.59375)
    slope = torch.tensor(slopes, dtype=torch.float64)

    def measured(dtype: torch.dtype) -> list[torch.Tensor]:
        knobs = [beta.to(dtype).requires_grad_(), torch.full((4,), 0.75, dtype=dtype, requires_grad=True)]
        y = ctu(x.to(dtype), *knobs, channel_dim=1, activation="prelu", negative_slope=slope)
        return [y.detach(), *torch.autograd.grad(y.sum(), knobs)]

    exact = measured(torch.float64)
    with run(0):
        found = measured(torch.float32)
    for name, got, want in zip(("y", "dbeta", "dcoeff"), found, exact):
        # |t| is at most 26, and rounding t is a relative error of eps |t| of the tail
        assert ((got.double() - want).abs() <= 32 * torch.finfo(torch.float32).eps * want.abs()).all(), (
            name,
            got,
            want,
        )


NANS = (0x7FC00000, 0x7FFFFFFF)  # of CPUs, of GPUs


def _nan(bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def check_nan_parameter(
    dtype: torch.dtype, activation: str, name: str, run: Run, raw: bool, bits: int, channels: int = 4
) -> None:
    """Check that a NaN parameter affects every value and gradient of its channel, and no other channel."""
    x = torch.linspace(-4, 4, 9 * channels).view(9, channels)
    x[0], x[1] = float("inf"), -float("inf")

    def measured(value: torch.Tensor) -> dict[str, torch.Tensor]:
        leaf = x.to(dtype).requires_grad_()
        given = dict.fromkeys(["beta", "coeff"], torch.full((channels,), 0.75))
        given["beta"] = torch.tensor([1.0, 0.5] * (channels // 2))
        if activation == "prelu":
            given["negative_slope"] = torch.full((channels,), 0.25)
        if name in ("scale", "shift"):
            given[name] = torch.full((channels,), 1.5)
        given[name] = given[name].clone()
        given[name][:2] = value
        given = {key: t.detach().clone().requires_grad_() for key, t in given.items()}
        with run(0):
            y = ctu(leaf, raw=raw, activation=activation, channel_dim=1, **given)
            grads = torch.autograd.grad(y, [leaf, *given.values()], torch.ones_like(y))
        return {"y": y.detach(), "x": grads[0], **dict(zip(given, grads[1:]))}

    found, without = measured(_nan(bits)), measured(torch.tensor(0.5))
    for key, values in found.items():
        case = f"{activation}, {dtype}, NaN in {name} (raw={raw}), d{key}: {values}"
        if (name, key, raw) != ("coeff", "coeff", False):  # y is linear in coeff
            assert values[..., :2].isnan().all(), case
        assert torch.equal(values[..., 2:].nan_to_num(7.0), without[key][..., 2:].nan_to_num(7.0)), case


def check_products_that_overflow(dtype: torch.dtype, activation: str, run: Run) -> None:
    """Check sums with infinite terms: an upstream gradient of 0 makes them 0, and +inf adds 0 to the gradient of a slope."""

    def gradients(values: list[float], dy: list[float], beta: float = 0.0) -> torch.Tensor:
        knobs = [
            torch.full((1,), v, requires_grad=True) for v in (beta, 0.5, 0.25)[: 3 if activation == "prelu" else 2]
        ]
        slope = {"negative_slope": knobs[2]} if activation == "prelu" else {}
        with run(0):
            y = ctu(torch.tensor(values, dtype=dtype), *knobs[:2], activation=activation, **slope)
            return torch.cat(torch.autograd.grad(y, knobs, torch.tensor(dy, dtype=dtype)))

    expected = gradients([1.0], [1.0])
    for large in (1e20, 1e38, float("inf")):
        large = min(large, torch.finfo(dtype).max)
        torch.testing.assert_close(gradients([large, 1.0, -large], [0.0, 1.0, 0.0]), expected, rtol=1e-6, atol=0)
    if activation == "relu6" and torch.finfo(dtype).max > 1e20:
        assert gradients([1e20], [1.0]).isfinite().all()  # the difference of two infinite products
    if activation == "prelu":
        assert gradients([float("inf")], [1.0], beta=0.9)[2] == 0
        with run(0):
            y = ctu(torch.tensor([float("inf")], dtype=dtype), 0.9, 0.5, activation="prelu", negative_slope=1.0)
        assert y.item() == float("inf")
