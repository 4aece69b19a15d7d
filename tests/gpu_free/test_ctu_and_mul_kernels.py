"""Executed PTX: the gated product's GPU kernels: each backend's host code and the PTX of its compiler, executed on the CPU, held
to the CPU kernels' bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from conformance import check_against_float64, outputs, sample_named

from ctkernels.functional import ctu_and_mul
from ctkernels.testing import SAMPLES

if TYPE_CHECKING:
    pass

NAMES = [s.name for s in SAMPLES["ctu_and_mul"]()]
# One sample of each cut and of each way to the factor, and those with constants of another kind.
FEW = [
    "gated NLC, odd channels",
    "gated NLC, more channels than a block",
    "gated packed, odd channels",
    "gated packed, more channels than a block",
    "gated packed, shared knobs",
    "gated packed, runs",
    "gated packed gelu",
    "gated packed, logits",
]
FLOAT, DOUBLE, HALVES = torch.float32, torch.float64, (torch.bfloat16, torch.float16)


def _run(toolchain, name, dtype, sm=80):
    with toolchain(sm):
        return outputs(sample_named(name, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_every_sample(toolchain, name):
    check_against_float64(sample_named(name, FLOAT), _run(toolchain, name, FLOAT))


@pytest.mark.parametrize(
    ("name", "dtype", "sm"),
    [
        *[(name, dtype, 80) for name in FEW for dtype in (*HALVES, DOUBLE)],
        *[(name, dtype, sm) for name in FEW[2:5] for dtype in (FLOAT, torch.bfloat16) for sm in (90, 100)],
    ],
    ids=str,
)
def test_other_types_and_targets(toolchain, name, dtype, sm):
    check_against_float64(sample_named(name, dtype), _run(toolchain, name, dtype, sm))


@pytest.mark.parametrize("name", FEW)
def test_same_bits_on_every_target(toolchain, name):
    first, again = (_run(toolchain, name, FLOAT, sm) for sm in (80, 100))
    for key in first:
        assert torch.equal(first[key], again[key]), key


def test_one_pass_each_way(toolchain):
    """Forward and backward of a packed projection are a launch each, and no other op of torch's moves its values."""
    packed, beta = torch.randn(64, 64, requires_grad=True), torch.full((32,), 0.6, requires_grad=True)
    with toolchain() as recorder:
        ctu_and_mul(packed, None, beta, 0.7, activation="gelu").sum().backward()
    assert recorder.roles[:2] == ["forward", "backward"]
    assert set(recorder.roles[2:]) <= {"reduce_partials", "reduce_shared"}
    assert packed.grad is not None
    assert packed.grad.is_contiguous()


def test_inplace(toolchain):
    for up in (torch.randn(5, 70), None):
        gate = torch.randn(5, 70)
        factor = gate if up is None else up  # the very same tensor
        expected = ctu_and_mul(gate, factor, 0.8)
        with toolchain():
            y = ctu_and_mul(gate, factor, 0.8, inplace=True)
        assert y is gate
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_only_wanted_gradients_are_computed(toolchain, packed):
    gate, up, beta = torch.randn(5, 32), torch.randn(5, 32), torch.full((32,), 0.6)
    leaves = {"gate": torch.cat([gate, up], 1)} if packed else {"gate": gate, "up": up}
    leaves["beta"] = beta
    for name, leaf in leaves.items():
        leaf.requires_grad_()
        with toolchain() as recorder:
            y = ctu_and_mul(leaves["gate"], leaves.get("up"), beta, 0.5, channel_dim=1)
            (grad,) = torch.autograd.grad(y.sum(), leaf)
        y = ctu_and_mul(leaves["gate"], leaves.get("up"), beta, 0.5, channel_dim=1)
        torch.testing.assert_close(grad, torch.autograd.grad(y.sum(), leaf)[0])
        assert bool(recorder.launches[1].sums) == (name == "beta")
        leaf.requires_grad_(False)
