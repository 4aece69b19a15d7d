"""Accuracy: the unit against 40-digit arithmetic, at its limits, and against the official expression."""

import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mpmath", reason="needs the test extra")

import truth
from ctu_checks import (
    NANS,
    check_digits_of_logits,
    check_nan_at_beta_one,
    check_nan_parameter,
    check_products_that_overflow,
    check_slopes_near_one,
    magnified,
)

import ctkernels
from ctkernels.functional import ctu

BETAS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 1e-6]
COEFFS = [0.0, 0.3, 0.5, 1.0]
POINTS = [
    0.0,
    1e-40,
    -1e-40,
    1e-5,
    -3e-4,
    0.01,
    0.3,
    -0.7,
    1.5,
    -2.5,
    4.0,
    -6.0,
    9.5,
    -20.0,
    50.0,
    -87.0,
    300.0,
    -1e4,
    1e4,
]
NAMES = ["y", "x", "beta", "coeff"]
# The error of a result in float64, relative to its terms. Three roundings of t and those of its square and its cube move the
# exponents of tails, which are up to 700.
SHARES = {"gelu": 4e-13, "gelu_tanh": 1e-12}


def _measured(x, beta, coeff, activation):
    """phi and its partials at every point: per-channel knobs make every point its own parameter gradient."""
    knobs = [torch.full((x.numel(),), v, dtype=torch.float64, requires_grad=True) for v in (beta, coeff)]
    leaf = x.clone().requires_grad_()
    y = ctu(leaf, *knobs, channel_dim=0, activation=activation)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, (leaf, *knobs), torch.ones_like(y)))))


def _exponent(activation, u):
    """How steep the tail is: u times the derivative of the exponent. A fourth more for the cubic's own roundings."""
    if activation == "gelu_tanh":
        return 1.25 * u * (1.6 + 0.2141 * u * u)
    return u * u if activation == "gelu" else u


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_forty_digits(backend, dtype, activation):
    x = torch.tensor(POINTS, dtype=torch.float64).to(dtype)
    smallest = 2.0**-118 if dtype == torch.float32 else 2.0**-960  # below: flushed to zero
    for beta, coeff in itertools.product(BETAS, COEFFS):
        found = _measured(x, beta, coeff, activation)
        for i, point in enumerate(x.double().tolist()):
            expected = truth.unit(point, beta, coeff, activation=activation)
            u = abs(point) / (1 - beta)
            for name in NAMES:
                if dtype == torch.float64:
                    bound = SHARES.get(activation, 1e-13)
                else:
                    bound = 2e-6 if u <= 10 else 1e-5
                    if backend == "reference" and activation in SHARES:  # exponents of a rounded u
                        bound += min(_exponent(activation, u), 90.0) * 2 * torch.finfo(dtype).eps
                terms = expected[name].terms
                error = abs(found[name][i].item() - float(expected[name].value))
                assert error <= bound * float(terms) + smallest * magnified(activation, name, u, point), (
                    f"d{name} at x={point}, beta={beta}, coeff={coeff}: {found[name][i].item()} instead of "
                    f"{float(expected[name].value)}"
                )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_relu_family_is_plain_at_beta_one(backend, dtype):
    x = torch.cat([torch.randn(5000, dtype=torch.float64) * 10.0**k for k in range(-8, 6)])
    extremes = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 6.0, 1e-45, -1e-45, 5.9999995, 6.000001])
    x = torch.cat([x, extremes.double()]).to(dtype)
    slope = torch.full((1,), 0.25, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for coeff in (0.0, 0.3, 1.0):
        assert torch.equal(ctu(x, 1.0, coeff), F.relu(x))
        assert torch.equal(ctu(x, 1.0, coeff, activation="relu6"), F.relu6(x))
        assert torch.equal(ctu(x, 1.0, coeff, activation="leaky_relu", negative_slope=0.25), F.leaky_relu(x, 0.25))
        assert torch.equal(ctu(x, 1.0, coeff, activation="prelu", negative_slope=slope), F.prelu(x, slope.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_silu_and_gelu_at_their_neutral_point(backend, dtype):
    x = torch.linspace(-30, 30, 4001, dtype=dtype)
    eps = torch.finfo(dtype).eps
    plain = {
        "silu": F.silu(x.double()),
        "gelu": x.double() * 0.5 * torch.special.erfc(-x.double() * 0.5**0.5),  # F.gelu has no tail below -8
        "gelu_tanh": x.double() * torch.sigmoid((8 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)),
    }
    for activation, expected in plain.items():
        error = (ctu(x, 0.5, 1.0, activation=activation).double() - expected).abs()
        rounded = backend == "reference" or (activation, dtype) == ("gelu_tanh", torch.float64)  # what is expected, too
        conditioning = 1 + 2 * _exponent(activation, x.double().abs()) if rounded else 8
        assert (error <= conditioning * 2 * eps * expected.abs() + 1e-30).all(), activation


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_infinities_and_nan(backend, dtype, activation):
    x = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=dtype, requires_grad=True)
    for beta, coeff in itertools.product((0.0, 0.5, 0.9, 1.0), (0.0, 0.5, 1.0)):
        y = ctu(x, beta, coeff, activation=activation, negative_slope=0.1)
        negative = -float("inf") if activation == "leaky_relu" else 0.0
        assert y[0] == (6.0 if activation == "relu6" else float("inf"))
        assert y[1] == negative
        assert y[2].isnan()
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx[2].isnan()
        assert torch.isfinite(dx[:2]).all()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nan_at_beta_one(backend, dtype, activation):
    check_nan_at_beta_one(dtype, activation, lambda approx: nullcontext())


@pytest.mark.parametrize("activation", ["relu", "prelu", "relu6", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nan_parameters(backend, dtype, activation):
    names = ["beta", "coeff", "scale", "shift"] + ["negative_slope"] * (activation == "prelu")
    for name, raw, bits in itertools.product(names, (False, True), NANS):
        check_nan_parameter(dtype, activation, name, lambda approx: nullcontext(), raw, bits, channels=40)


@pytest.mark.parametrize("activation", ["relu", "prelu", "relu6", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_that_overflow(backend, dtype, activation):
    check_products_that_overflow(dtype, activation, lambda approx: nullcontext())


LARGE = [1e-30, -1e-20, 1e-15, -1e-12, 1e-8, -1.0, 10.0, 1e4, 1e16, 1e17, -1e18, 1e19, 1e30, -1e37, 1e38]


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "leaky_relu", "relu6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sharp_units_and_huge_values(backend, dtype, activation):
    """Logits up to where 1 - beta is no number any more, and x up to the largest: values, slopes, tangents, d/dlogit."""
    huge = [] if dtype == torch.float32 else [1e100, -1e200, 1e300]
    x = torch.tensor(LARGE + huge, dtype=torch.float64).to(dtype)
    slope, smallest = 0.25, 2.0**-118 if dtype == torch.float32 else 2.0**-960

    def bounds(u, plain):
        """As in test_against_forty_digits; and what four roundings of u, s among them, do to e^-u or e^(-u^2/2)."""
        if dtype == torch.float32:
            bound, settled = 2e-6 if u <= 10 else 1e-5, 104.0
        else:
            bound, settled = SHARES.get(activation, 1e-13), 745.0
        if plain or dtype == torch.float64:
            settled *= {"gelu": 2, "gelu_tanh": 3}.get(activation, 1)  # from the exponent to its steepness
            bound += 4 * torch.finfo(dtype).eps * min(_exponent(activation, u), settled)
        return bound

    for logit, coeff in itertools.product(
        (-40.0, 2.2, 17.0, 36.7, 38.0, 45.0, 60.0, 88.0, 100.0, 400.0, 740.0), (0.0, 0.5, 1.0)
    ):
        knobs = [torch.full((x.numel(),), v, dtype=dtype, requires_grad=True) for v in (logit, _logit(coeff))]
        leaf = x.clone().requires_grad_()
        given = {"activation": activation, "negative_slope": slope, "raw": True, "channel_dim": 0}
        y = ctu(leaf, *knobs, **given)
        d_x, d_logit, d_coeff = torch.autograd.grad(y, (leaf, *knobs), torch.ones_like(y))
        fixed = partial(ctu, beta=knobs[0].detach(), coeff=knobs[1].detach(), **given)
        tangent = torch.func.jvp(fixed, (x,), (torch.ones_like(x),))[1]
        assert torch.isfinite(d_coeff).all()
        for i, point in enumerate(x.double().tolist()):
            exact = knobs[0][i].item()
            terms = _family(activation, point, exact, coeff, slope)
            s = truth.logistic(-truth.mp.mpf(exact))
            for found, name in ((y, "y"), (d_x, "x"), (tangent, "x"), (d_logit, "beta")):
                value = truth.mp.fsum(sign * e[name].value for sign, e in terms)
                size = truth.mp.fsum(e[name].terms for _, e in terms)
                if size > torch.finfo(dtype).max / 1e3:  # kernels add up w^2 before they divide by s^2
                    continue
                reach = max(abs(point), abs(point - 6)) if activation == "relu6" else abs(point)
                u = float(min(reach / s, 1e3))
                bound = bounds(u, backend == "reference" or found is tangent) * float(size) + smallest * max(
                    1.0, u, reach
                )
                if name == "beta":  # the last bit of that w^2
                    bound += float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / s)
                assert abs(found[i].item() - float(value)) <= bound, (
                    name,
                    point,
                    logit,
                    coeff,
                    found[i].item(),
                    value,
                    bound,
                )


def _logit(coeff):
    return {0.0: -1e3, 0.5: 0.0, 1.0: 1e3}[coeff]


def _family(activation, x, logit, coeff, slope):
    """The unit as a sum of units and of plain terms."""
    if activation == "leaky_relu":
        unit = truth.unit_of_logit((1 - slope) * x, logit, coeff)
        zero = truth.Value(truth.mp.mpf(0), truth.mp.mpf(0))
        unit["x"] = truth.Value(unit["x"].value * (1 - slope), unit["x"].terms * (1 - slope))
        line = {"y": truth.mp.mpf(slope * x), "x": truth.mp.mpf(slope)}
        return [(1, unit), (1, {n: truth.Value(v, abs(v)) for n, v in line.items()} | {"beta": zero, "coeff": zero})]
    if activation == "relu6":
        return [(1, truth.unit_of_logit(x, logit, coeff)), (-1, truth.unit_of_logit(x - 6, logit, coeff))]
    return [(1, truth.unit_of_logit(x, logit, coeff, activation=activation))]


def test_finite_in_finite_out(backend):
    x = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e-45, 0.0]).requires_grad_()
    for beta, coeff in itertools.product((0.0, 1e-20, 0.5, 1 - 2.0**-24, 1.0), (0.0, 0.5, 1.0)):
        for activation in ("relu", "relu6", "gelu", "gelu_tanh"):
            y = ctu(x, beta, coeff, activation=activation)
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert torch.isfinite(y).all(), (beta, coeff, activation)
            assert torch.isfinite(dx).all(), (beta, coeff, activation)


def test_the_tanh_member_stays_as_near_to_the_gaussian_as_their_gates_are(backend):
    x = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    for beta, coeff in itertools.product((0.1, 0.5, 0.9, 1.0), (0.0, 0.5, 1.0)):
        distance = (ctu(x, beta, coeff, activation="gelu_tanh") - ctu(x, beta, coeff, activation="gelu")).abs().max()
        assert coeff * 4.6e-4 * (1 - beta) / beta <= distance <= coeff * 4.8e-4 * (1 - beta) / beta


@pytest.mark.parametrize("beta", [0.8, 0.99, 0.9999])
def test_beta_gradient_where_autograd_of_the_official_expression_fails(backend, beta):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 20, generator=generator)
    dy = torch.randn(1 << 20, generator=generator)

    def gradient(f, dtype):
        knob = torch.tensor(beta, dtype=dtype, requires_grad=True)
        (g,) = torch.autograd.grad(f(x.to(dtype), knob, 0.5), knob, dy.to(dtype))
        return g.item()

    with ctkernels.use_backend("reference"):
        # the fp32 rounding of beta is part of the question, so the truth starts from it too
        exact = torch.tensor(beta, dtype=torch.float32).double().requires_grad_()
        expected = torch.autograd.grad(ctu(x.double(), exact, 0.5), exact, dy.double())[0].item()
    ours = abs(gradient(ctu, torch.float32) / expected - 1)
    theirs = abs(gradient(lambda *a: truth.official(*a, eps=0.0), torch.float32) / expected - 1)
    print(f"beta={beta}: relative error of dbeta: ours {ours:.1e}, official expression {theirs:.1e}")
    assert ours <= 1e-5
    if beta == 0.9999:
        assert theirs > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_checkpoints_agree_with_eps(backend, dtype):
    x = torch.randn(4, 8, 33, dtype=dtype) * 3
    raw_beta, raw_coeff = torch.randn(8, dtype=dtype) * 3, torch.randn(8, dtype=dtype)
    view = (8, 1)

    def formula(t):
        beta, coeff = torch.sigmoid(raw_beta.to(t)).view(view), torch.sigmoid(raw_coeff.to(t)).view(view)
        return truth.official(x.to(t), beta, coeff)

    expected = formula(torch.float64)
    own_error = (formula(dtype).double() - expected).abs().max()
    y = ctu(x, raw_beta, raw_coeff, channel_dim=1, raw=True, eps=1e-6)
    error = (y.double() - expected).abs().max()
    threshold = 2.1e-9 * (1 - torch.sigmoid(raw_beta.double())).max()  # F.softplus is the identity from 20 on: e^-20
    assert error <= 2 * own_error + torch.finfo(dtype).eps * expected.abs().max() + threshold


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_keep_the_digits_of_one_minus_a_knob(backend, dtype, activation):
    check_digits_of_logits(dtype, activation, lambda approx: nullcontext())


def test_slopes_near_one(backend):
    check_slopes_near_one(lambda approx: nullcontext())
