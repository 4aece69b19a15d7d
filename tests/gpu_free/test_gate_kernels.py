"""Executed PTX: the gates' GPU kernels: each backend's host code and the PTX of its compiler, executed on the CPU: values,
gradients, noise made from a seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

import ctkernels
from ctkernels.ops.hard_concrete import CLIP, MEAN, OP, OPEN, SAMPLE, reference
from ctkernels.testing import assert_no_worse

if TYPE_CHECKING:
    pass

STATIC = (0.33, -0.1, 1.1)
MODES = {"given": SAMPLE, "seeded": SAMPLE, "clip": CLIP, "mean": MEAN, "open": OPEN}
SEED = torch.tensor([-0x123456789ABCDEF])


def _logits(dtype):
    special = [0.0, -40.0, 40.0, -800.0, 800.0, float("inf"), -float("inf"), float("nan"), 1e-30]
    values = torch.cat([torch.tensor(special, dtype=torch.float64), 2 * torch.randn(135, dtype=torch.float64)])
    return values.view(12, 12).to(dtype)


def _noise(case, dtype):
    if case == "seeded":
        return SEED
    return torch.rand(12, 12, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).to(dtype) if case == "given" else None


def _call(log_alpha, noise, mode):
    """Gates, and the gradients of everything that has one."""
    leaves = [log_alpha.clone().requires_grad_()]
    if noise is not None and noise.is_floating_point():
        noise = noise.clone().requires_grad_()
        leaves.append(noise)
    gates = OP((leaves[0], noise), (-1, mode, *STATIC))
    up = torch.linspace(-1, 2, gates.numel(), dtype=torch.float64).view(gates.shape).to(gates.dtype)
    return [gates.detach(), *torch.autograd.grad(gates, leaves, up)]


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MODES)
def test_values_and_gradients(toolchain, case, dtype, sm):
    log_alpha, noise, mode = _logits(dtype), _noise(case, dtype), MODES[case]
    runs = []
    for approx in (-1, 1, 0, 0):
        with toolchain(sm, approx) as recorder:
            runs.append(_call(log_alpha, noise, mode))
        assert len(recorder.launches) == 2  # however many gates, one launch each way
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*runs[-2:]))
    wide = reference.uniform(SEED, log_alpha.shape, dtype) if case == "seeded" else noise
    with ctkernels.use_backend("reference"):
        truth = _call(log_alpha.double(), None if wide is None else wide.double(), mode)
        baseline = _call(log_alpha, wide, mode)
    for found in runs:
        for name, got, exact, torchs in zip(("gates", "dlog_alpha", "dnoise"), found, truth, baseline):
            # the library's exponentials and logarithms are good to 2 ulp of a double, the quadratures to 2e-11
            grade = 2e-11 if mode == MEAN else 16 * torch.finfo(torch.float64).eps
            assert_no_worse(f"{case} {name}", got, exact, torchs, 1 + exact.double().abs().nan_to_num(0, 0, 0), grade)


def _philox(counter, key):
    """Philox 4x32-10 on Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = q >> 32 ^ b ^ k, q & 0xFFFFFFFF, p >> 32 ^ d ^ m, p & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def test_noise_is_the_published_generator():
    # the known answers that its authors publish
    assert _philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    for seed in (0, 1, -1, SEED.item()):
        words = [_philox([i, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]) for i in range(5)]
        narrow, wide = (
            reference.uniform(torch.tensor([seed]), torch.Size([5]), t) for t in (torch.float32, torch.float64)
        )
        assert narrow.tolist() == [((a >> 9) + 0.5) * 2.0**-23 for a, *_ in words]
        assert wide.tolist() == [((a << 20 | b >> 12) + 0.5) * 2.0**-52 for a, b, *_ in words]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_make_the_same_noise_as_the_reference(toolchain, dtype):
    """A logit of 0 and a temperature of 1 hand the noise through, stretched."""
    n, low, high = 1000, -1e-6, 1 + 1e-6
    with toolchain():
        gates = OP((torch.zeros(n, dtype=dtype), SEED), (-1, SAMPLE, 1.0, low, high))
    expected = reference.uniform(SEED, torch.Size([n]), dtype)
    assert ((gates.double() - (expected.double() * (high - low) + low)).abs() <= 2 * torch.finfo(dtype).eps).all()


def test_seeded_samples_have_the_distribution(toolchain):
    n, logit = 20_000, 0.5
    with toolchain(90, races=False):
        gates = OP((torch.full((n,), logit), SEED), (-1, SAMPLE, *STATIC))
    for found, v in (((gates > 0).double().mean().item(), 0.0), ((gates == 1).double().mean().item(), 1.0)):
        p = 1 / (1 + math.exp(-(logit - STATIC[0] * math.log((v - STATIC[1]) / (STATIC[2] - v)))))
        assert abs(found - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_a_seed_gives_the_same_gates_in_the_public_function(toolchain):
    log_alpha = torch.randn(5, 40)
    with toolchain():
        kernel = OP((log_alpha, SEED), (-1, SAMPLE, *STATIC))
    found = ctkernels.functional.hard_concrete(log_alpha, training=True, noise=SEED)
    torch.testing.assert_close(found, kernel, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"int64 seed must have shape \(1,\), got \(2,\)"):
        ctkernels.functional.hard_concrete(log_alpha, training=True, noise=torch.zeros(2, dtype=torch.long))


def test_second_derivatives_with_a_seed():
    log_alpha = torch.randn(30, dtype=torch.float64, requires_grad=True)
    noise = reference.uniform(SEED, log_alpha.shape, torch.float64)

    def curvature(noise):
        (first,) = torch.autograd.grad(
            OP((log_alpha, noise), (-1, SAMPLE, *STATIC)).square().sum(), log_alpha, create_graph=True
        )
        return torch.autograd.grad(first.sum(), log_alpha)[0]

    with ctkernels.use_backend("reference"):
        torch.testing.assert_close(curvature(SEED), curvature(noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gates_from_a_seed_are_those_of_its_noise(toolchain, dtype):
    """Bit for bit, values and gradients."""
    log_alpha, dy = (torch.randn(1000, dtype=torch.float64).to(dtype) for _ in range(2))
    static = (-1, SAMPLE, *STATIC)
    for value in (0, 12345, -(2**62) - 7):
        seed = torch.tensor([value])
        noise = reference.uniform(seed, log_alpha.shape, dtype)
        with toolchain():
            found = [OP.forward((log_alpha, seed), static), *OP.backward(dy, (log_alpha, seed), static, 1)]
            given = [OP.forward((log_alpha, noise), static), *OP.backward(dy, (log_alpha, noise), static, 1)]
        for ours, theirs in zip(found, given):
            assert torch.equal(ours, theirs)


def test_no_gates_no_launch(toolchain):
    with toolchain() as recorder:
        assert OP((torch.zeros(0, 3), None), (-1, CLIP, *STATIC)).shape == (0, 3)
    assert not recorder.launches
