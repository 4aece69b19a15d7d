"""Executed PTX: the head edit's GPU kernels: each backend's host code and the PTX of its compiler, executed on the CPU, held to
the CPU kernels' bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from conformance import check_against_float64, outputs, sample_named

from ctkernels.functional import head_edit
from ctkernels.testing import SAMPLES

if TYPE_CHECKING:
    pass

NAMES = [s.name for s in SAMPLES["head_edit"]()]
# The layouts that make different cuts: heads side by side, tokens between heads, an edit for every sample.
FEW = ["head edit (B, T, H D)", "head edit (B, H, T, D)", "head edit per sample", "head edit per sample, (B, H, T, D)"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _run(toolchain, name, dtype, sm):
    with toolchain(sm):
        return outputs(sample_named(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_sample(toolchain, name, dtype):
    check_against_float64(sample_named(name, dtype), _run(toolchain, name, dtype, 80))


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEW)
def test_other_targets(toolchain, name, dtype, sm):
    check_against_float64(sample_named(name, dtype), _run(toolchain, name, dtype, sm))


@pytest.mark.parametrize("name", FEW)
def test_same_bits_on_every_run_and_target(toolchain, name):
    first = _run(toolchain, name, torch.float32, 80)
    for sm in (80, 90, 100):
        again = _run(toolchain, name, torch.float32, sm)
        for key in first:
            assert torch.equal(first[key], again[key]), key


H, D = 4, 24


def _parameters(*lead):
    return [torch.randn(*lead, H, D), torch.randn(*lead, H, D), torch.rand(*lead, H), torch.rand(*lead, H)]


@pytest.mark.parametrize("layout", ["(B, T, H D)", "(B, H, T, D)", "per sample"])
def test_long_sequences(toolchain, layout):
    """Many rows: partial sums in slots, and launches that finish them."""
    z = torch.randn(2, 400, H * D, dtype=torch.float64)
    kwargs = {"index": torch.tensor([2, 0])} if layout == "per sample" else {}
    parameters = [p.double() for p in _parameters(*([3] if kwargs else []))]
    if layout == "(B, H, T, D)":
        z, kwargs = z.unflatten(-1, (H, D)).transpose(1, 2).contiguous(), {"head_axis": 1}
    leaves = [t.requires_grad_() for t in (z, *parameters)]
    expected = torch.autograd.grad(head_edit(*leaves, **kwargs).square().sum(), leaves)
    with toolchain() as recorder:
        found = torch.autograd.grad(head_edit(*leaves, **kwargs).square().sum(), leaves)
    assert recorder.roles == ["forward", "backward", "reduce_partials", "reduce_shared"]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_only_wanted_gradients_are_computed(toolchain):
    z, (m, a, g_m, g_a) = torch.randn(2, 5, H * D), _parameters()
    cases = {
        "z": ([z], 0, ["forward", "backward"]),
        "m": ([m], 1, ["forward", "backward"]),
        "a": ([a], 2, ["forward", "backward"]),
        "m, a": ([m, a], 3, ["forward", "backward"]),
        "gates": ([g_m, g_a], 3, ["forward", "backward", "reduce_shared"]),
    }
    for leaves, sums, roles in cases.values():
        for t in leaves:
            t.requires_grad_()
        with toolchain() as recorder:
            torch.autograd.grad(head_edit(z, m, a, g_m, g_a).sum(), leaves)
        for t in leaves:
            t.requires_grad_(False)
        assert recorder.roles == roles
        if toolchain.name == "cuda":  # both sums or none: a second one costs nothing
            sums = 3 if sums else 0
        assert recorder.launches[1].sums == sums


def test_closed_gates_are_the_identity(toolchain):
    (m, a, _, _), closed = _parameters(), torch.zeros(H)
    for dtype in DTYPES:
        z = torch.randn(2, 5, H * D).to(dtype)
        with toolchain():
            assert torch.equal(head_edit(z, m, a, closed, closed), z)


def test_inplace(toolchain):
    parameters = _parameters()
    for z, kwargs in (
        (torch.randn(2, 5, H * D), {}),
        (torch.randn(2, H, 5, D), {"head_axis": 1}),
        (torch.randn(2, 5, H, D).transpose(1, 2), {"head_axis": 1}),
        (torch.randn(2, 5, 2 * H * D)[..., : H * D], {}),
        (torch.randn(2, H, 10, D)[:, :, ::2], {"head_axis": 1}),
    ):
        expected = head_edit(z, *parameters, **kwargs)
        with toolchain():
            assert head_edit(z, *parameters, inplace=True, **kwargs) is z
        torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


def test_unaligned_storage(toolchain):
    """A view that starts at an odd element: vectors would be misaligned, which the executor faults."""
    parameters = _parameters()
    for dtype in DTYPES:
        z = torch.randn(3 * H * D + 1).to(dtype)[1:].view(3, H * D)
        with toolchain():
            found = head_edit(z, *parameters)
        torch.testing.assert_close(found, head_edit(z, *parameters))


def test_non_finite_values_stay_in_their_place(toolchain):
    z, parameters = torch.randn(3, H * D), _parameters()
    z[0, 5], z[1, 6], z[2, 7] = float("nan"), float("inf"), -float("inf")
    z.requires_grad_()
    edits = [p.requires_grad_() for p in parameters]
    with toolchain():
        y = head_edit(z, *edits)
        dz, dm, da, *_ = torch.autograd.grad(y, [z, *edits], torch.ones_like(y))
    assert (~y.isfinite()).sum() == 3
    assert dz.isfinite().all()
    assert da.isfinite().all()
    assert (~dm.isfinite()).sum() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_double_parameters(toolchain, dtype):
    """The parameters of a network are float, whatever its activations are; double ones are read too."""
    first = sample_named("head edit per sample", dtype).args[0]
    sample = sample_named("head edit per sample", dtype).map(lambda _, t: t if t.shape == first.shape else t.double())
    with toolchain():
        found = outputs(sample)
    assert found["d1"].dtype == torch.float64
    check_against_float64(sample, found)


@pytest.mark.parametrize("layout", ["(B, T, H D)", "(B, H, T, D)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_that_fill_vectors(toolchain, dtype, layout):
    """And enough tokens for partial sums."""
    heads, dim = 2, 64
    shape, axis = ((3, 70, heads * dim), None) if layout == "(B, T, H D)" else ((3, heads, 70, dim), 1)
    z = torch.randn(shape).to(dtype)
    leaves = [z, torch.randn(heads, dim), torch.randn(heads, dim), torch.rand(heads), torch.rand(heads)]
    dy = torch.randn(shape).to(dtype)

    def gradients(cast=None):
        given = [(t if cast is None else t.to(cast)).detach().requires_grad_() for t in leaves]
        y = head_edit(*given, head_axis=axis)
        return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]

    with toolchain(90):
        found = gradients()
    expected = gradients(torch.float64)
    eps = torch.finfo(dtype).eps
    magnitude = [1 + e.abs() for e in expected[:2]]
    for value, truth, size in zip(found[:2], expected[:2], magnitude):
        assert ((value.double() - truth).abs() <= eps * size + 1e-6).all()
    # sums of about 420 (one head's channel) or 27,000 (a gate) products of two or three normal numbers
    for value, truth, terms in zip(found[2:], expected[2:], (420, 420, 26880, 26880)):
        assert ((value.double() - truth).abs() <= torch.finfo(torch.float32).eps * 4 * terms).all()
