"""What any GPU kernel of the CT unit has to get right, whichever compiler made it. ``run(approx)`` is the context in which
its code is executed on the CPU, with the approximate units ``approx`` times their documented error off."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import truth

from ctkernels.functional import ctu

Run = Callable[[int], AbstractContextManager[object]]

POINTS = [0.0, 1e-40, 1e-5, -3e-4, 0.01, 0.3, -0.7, 1.5, -2.5, 4.0, -6.0, 9.5, -20.0, 50.0, -87.0, 300.0, -1e4, 1e4]
BETAS = [0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6]


def check_forty_digits(activation: str, run: Run) -> None:
    """float32 against mpmath, values and gradients."""
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
            expected, u = truth.unit(point, beta, coeff, gaussian=activation == "gelu"), abs(point) / (1 - beta)
            for name, values in zip(("y", "x", "beta", "coeff"), found):
                bound = (2e-6 if u <= 10 else 1e-5) * float(expected[name].terms) + 2.0**-118 * max(1.0, u, abs(point))
                error = abs(values[i].item() - float(expected[name].value))
                assert error <= bound, f"d{name} at x={point}, beta={beta}, coeff={coeff}: {error} > {bound}"


def check_sixteen_bits(dtype: torch.dtype, activation: str, run: Run, approx: int) -> None:
    """16-bit results: half an ulp and 2e-4 of the terms; gradients of the knobs are float32 and have the second alone."""
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
    """At beta = 1 the unit is the plain activation, bit for bit, and so is its gradient."""
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
    """Infinities go where they should, a NaN stays one, and nothing else becomes either."""
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
    """Where the knobs have no effect their gradients are 0, of infinities too; a NaN is passed on to those of its channel."""
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
