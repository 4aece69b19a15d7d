"""Hard-concrete gates: closed forms, statistics of samples, gradients, reproducibility, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from ctkernels.functional import expected_l0, hard_concrete
from ctkernels.testing import Sample, gradcheck

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LOGITS = [-40.0, -4.0, -2.398, -1.5, -0.426, 0.0, 0.426, 1.5, 2.398, 4.0, 40.0]
TEMPERATURE, LOW, HIGH = 0.33, -0.1, 1.1


def _above(log_alpha, v):
    """P(g > v) of the stretched variable."""
    return 1 / (1 + math.exp(-(log_alpha - TEMPERATURE * math.log((v - LOW) / (HIGH - v)))))


def test_expectation_is_exact(backend):
    mpmath = pytest.importorskip("mpmath", reason="needs the test extra")
    log_alpha = torch.tensor(LOGITS, dtype=torch.float64)
    found = hard_concrete(log_alpha, training=False, estimator="mean")
    for logit, value in zip(LOGITS, found.tolist()):
        exact = mpmath.quad(
            lambda v, logit=logit: 1 / (1 + mpmath.exp(-(logit - TEMPERATURE * mpmath.log((v - LOW) / (HIGH - v))))),
            [0, 0.5, 1],
        )
        assert abs(value - float(exact)) < 2e-11


def test_penalty_and_clip_closed_forms(backend):
    log_alpha = torch.tensor(LOGITS, dtype=torch.float64)
    penalty = expected_l0(log_alpha)
    assert torch.allclose(
        penalty, torch.tensor([_above(v, 0.0) for v in LOGITS], dtype=torch.float64), rtol=1e-13, atol=0
    )
    gate = hard_concrete(log_alpha, training=False)
    expected = (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)
    assert torch.allclose(gate, expected, rtol=1e-14, atol=1e-15)
    assert gate[0] == 0
    assert gate[-1] == 1


@pytest.mark.parametrize("logit", [-1.5, 0.0, 1.5])
def test_statistics_of_samples(backend, logit):
    n = 200_000
    gates = hard_concrete(torch.full((n,), logit), training=True, generator=torch.Generator().manual_seed(3))
    mean = hard_concrete(torch.tensor([logit], dtype=torch.float64), training=False, estimator="mean").item()
    for found, expected in (
        ((gates > 0).double().mean().item(), _above(logit, 0.0)),
        ((gates == 1).double().mean().item(), _above(logit, 1.0)),
    ):
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    assert abs(gates.double().mean().item() - mean) < 5 * gates.double().std().item() / math.sqrt(n)


def test_reproducible_from_a_generator(backend):
    log_alpha = torch.zeros(4, 9)
    first, again, other = (
        hard_concrete(log_alpha, training=True, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(11)
    default = hard_concrete(log_alpha, training=True)
    torch.manual_seed(11)
    assert torch.equal(default, hard_concrete(log_alpha, training=True))


@pytest.mark.parametrize("case", ["sample", "clip", "mean", "penalty"])
def test_gradients(backend, case):
    log_alpha = torch.randn(3, 5, dtype=torch.float64)
    noise = 0.05 + 0.9 * torch.rand(3, 5, dtype=torch.float64)
    table = {
        "sample": Sample(case, hard_concrete, (log_alpha,), {"training": True, "noise": noise}),
        "clip": Sample(case, hard_concrete, (log_alpha,), {"training": False}),
        "mean": Sample(case, hard_concrete, (log_alpha,), {"training": False, "estimator": "mean"}),
        "penalty": Sample(case, expected_l0, (log_alpha,)),
    }
    gradcheck(table[case])


def test_gradient_closed_form(backend):
    log_alpha = torch.randn(1000, requires_grad=True)
    noise = torch.rand(1000)
    gates = hard_concrete(log_alpha, training=True, noise=noise)
    (found,) = torch.autograd.grad(gates.sum(), log_alpha)
    s = torch.sigmoid((torch.logit(noise.double()) + log_alpha.double()) / TEMPERATURE)
    inside = (s * (HIGH - LOW) + LOW > 0) & (s * (HIGH - LOW) + LOW < 1)
    expected = torch.where(inside, (HIGH - LOW) / TEMPERATURE * s * (1 - s), 0.0)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert found.max() <= 0.910  # its maximum is (high - low) / (4 temperature)


def test_noise_at_the_ends():
    gates = hard_concrete(torch.zeros(2, requires_grad=True), training=True, noise=torch.tensor([0.0, 1.0]))
    assert gates.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_is_in_the_gate_and_in_its_gradient(backend, dtype):
    log_alpha = torch.tensor([0.3, float("nan"), -0.5], dtype=dtype, requires_grad=True)
    noise = torch.tensor([0.4, 0.5, float("nan")], dtype=dtype, requires_grad=True)
    found = {
        "clip": (hard_concrete(log_alpha, training=False), [log_alpha]),
        "mean": (hard_concrete(log_alpha, training=False, estimator="mean"), [log_alpha]),
        "penalty": (expected_l0(log_alpha), [log_alpha]),
        "sample": (hard_concrete(log_alpha, training=True, noise=noise), [log_alpha, noise]),
    }
    for case, (gates, leaves) in found.items():
        hidden = [False, True, case == "sample"]
        for values in (gates, *torch.autograd.grad(gates, leaves, torch.ones_like(gates))):
            assert values.isnan().tolist() == hidden, (case, values)


STRETCHES = [
    (-0.1, 1.1),
    (-0.3, 1.01),
    (-1e-3, 1.001),
    (-1e-6, 1 + 1e-6),
    (-1e-300, 1 + 1e-15),
    (-2.0, 9.0),
    (-1e9, 1e9),
]


@pytest.mark.parametrize("stretch", STRETCHES, ids=str)
def test_expectation_for_every_stretch_and_temperature(backend, stretch):
    mp = pytest.importorskip("mpmath", reason="needs the test extra").mp
    low, high = (mp.mpf(v) for v in stretch)
    places = [-30.0, -3.0, 0.4, 2.0, 25.0]
    for temperature in (0.33, 1.0, 5.0):

        def expectation(log_alpha, cuts, temperature=temperature):
            def density(y):
                return (high - low) / (2 + mp.exp(y) + mp.exp(-y)) / (1 + mp.exp(temperature * y - log_alpha))

            return float(mp.quad(density, cuts))

        with mp.workdps(40):
            ends = (mp.log(-low / high), mp.log((1 - low) / (high - 1)))
            inside = (cut for cut in map(mp.mpf, (-60, -20, -5, 0, 5, 20, 60)) if ends[0] < cut < ends[1])
            cuts = [ends[0], *inside, ends[1]]
            expected = [expectation(log_alpha, cuts) for log_alpha in places]
        log_alpha = torch.tensor(places, dtype=torch.float64)
        gates = hard_concrete(log_alpha, training=False, estimator="mean", stretch=stretch, temperature=temperature)
        assert (gates - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-12
        assert (gates <= 1).all()
    wide = torch.linspace(20, 700, 2001, dtype=torch.float64)
    gates = hard_concrete(wide, training=False, estimator="mean", stretch=stretch)
    assert (gates <= 1).all()
    assert (1 - gates <= 1e-7).all()


def test_slopes_keep_the_digits_of_one_minus_the_gate(backend):
    log_alpha = torch.tensor([15.0, 20.0, 30.0], requires_grad=True)
    expected = torch.sigmoid(-log_alpha.detach().double() + TEMPERATURE * math.log(-LOW / HIGH))
    (found,) = torch.autograd.grad(expected_l0(log_alpha).sum(), log_alpha)
    torch.testing.assert_close(found.double(), expected, rtol=4e-6, atol=0)


def test_opcheck():
    for mode, noise in ((0, torch.rand(3, 4)), (1, None), (2, None), (3, None)):
        args = (torch.randn(3, 4, requires_grad=True), noise, -1, mode, TEMPERATURE, LOW, HIGH)
        assert set(opcheck(torch.ops.ctkernels.hard_concrete.default, args).values()) == {"SUCCESS"}


def test_any_strides_and_dtypes(backend):
    log_alpha = torch.randn(1, 6).expand(4, 6)
    assert torch.equal(hard_concrete(log_alpha, training=False), hard_concrete(log_alpha.contiguous(), training=False))
    assert hard_concrete(torch.randn(5, 3).T, training=True).shape == (3, 5)
    assert hard_concrete(torch.randn(4).bfloat16(), training=False).dtype == torch.float32
    assert hard_concrete(torch.randn(0), training=True).shape == (0,)


BAD = {
    "a list": (([0.0],), {"training": True}, TypeError, "log_alpha must be a tensor, got list"),
    "integers": (
        (torch.ones(3, dtype=torch.int64),),
        {"training": True},
        TypeError,
        "log_alpha must be float32, .* got int64",
    ),
    "estimator": (
        (torch.zeros(3),),
        {"training": False, "estimator": "mode"},
        ValueError,
        "estimator must be one of 'clip', 'mean'",
    ),
    "temperature": (
        (torch.zeros(3),),
        {"training": True, "temperature": 0.0},
        ValueError,
        "temperature must be positive, got 0.0",
    ),
    "temperature infinite": (
        (torch.zeros(3),),
        {"training": False, "temperature": math.inf},
        ValueError,
        "temperature must be finite, got inf",
    ),
    "temperature of an expectation": (
        (torch.zeros(3),),
        {"training": False, "estimator": "mean", "temperature": 11.0},
        ValueError,
        "temperature must be at most 10 for estimator='mean', .* got 11.0",
    ),
    "three ends": (
        (torch.zeros(3),),
        {"training": False, "stretch": (-0.1, 0.5, 1.1)},
        TypeError,
        r"stretch must be a pair \(low, high\), got \(-0.1, 0.5, 1.1\)",
    ),
    "stretch infinite": (
        (torch.zeros(3),),
        {"training": False, "stretch": (-math.inf, math.inf)},
        ValueError,
        "stretch must be finite, got -inf",
    ),
    "stretch": (
        (torch.zeros(3),),
        {"training": True, "stretch": (0.0, 1.1)},
        ValueError,
        r"stretch must be \(low, high\)",
    ),
    "noise shape": (
        (torch.zeros(3),),
        {"training": True, "noise": torch.rand(4)},
        ValueError,
        r"noise must have log_alpha's shape \(3,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_message(case):
    args, kwargs, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        hard_concrete(*args, **kwargs)
