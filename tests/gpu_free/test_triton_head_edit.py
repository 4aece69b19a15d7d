"""Executed PTX: the head edit's Triton launches and compiled PTX, executed on the CPU, held to the CPU kernels' bounds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from conformance import check_against_float64, outputs, sample_named
from triton_recorder import Recorder, triton_on_cpu

from ctkernels.functional import head_edit
from ctkernels.testing import head_edit_samples

NAMES = [s.name for s in head_edit_samples()]
# The layouts that make different cuts: heads side by side, tokens between heads, an edit for every sample.
FEW = ["head edit (B, T, H D)", "head edit (B, H, T, D)", "head edit per sample", "head edit per sample, (B, H, T, D)"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _run(name: str, dtype: torch.dtype, sm: int) -> dict[str, torch.Tensor]:
    with triton_on_cpu(Recorder(sm)):
        return outputs(sample_named(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_sample(name: str, dtype: torch.dtype) -> None:
    check_against_float64(sample_named(name, dtype), _run(name, dtype, 80))


@pytest.mark.parametrize("sm", [90, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEW)
def test_other_targets(name: str, dtype: torch.dtype, sm: int) -> None:
    check_against_float64(sample_named(name, dtype), _run(name, dtype, sm))


@pytest.mark.parametrize("name", FEW)
def test_same_bits_on_every_run_and_target(name: str) -> None:
    first = _run(name, torch.float32, 80)
    for sm in (80, 90, 100):
        again = _run(name, torch.float32, sm)
        for key in first:
            assert torch.equal(first[key], again[key]), key


H, D = 4, 24
FORWARD, BACKWARD = "head_edit_forward_channelwise_kernel", "head_edit_backward_channelwise_kernel"


def _parameters(*lead: int) -> list[torch.Tensor]:
    return [torch.randn(*lead, H, D), torch.randn(*lead, H, D), torch.rand(*lead, H), torch.rand(*lead, H)]


@pytest.mark.parametrize("layout", ["(B, T, H D)", "(B, H, T, D)", "per sample"])
def test_long_sequences(layout: str) -> None:
    """Many rows: partial sums in slots, and launches that finish them."""
    z = torch.randn(2, 400, H * D, dtype=torch.float64)
    kwargs = {"index": torch.tensor([2, 0])} if layout == "per sample" else {}
    parameters = [p.double() for p in _parameters(*([3] if kwargs else []))]
    if layout == "(B, H, T, D)":
        z, kwargs = z.unflatten(-1, (H, D)).transpose(1, 2).contiguous(), {"head_axis": 1}
    leaves = [t.requires_grad_() for t in (z, *parameters)]
    expected = torch.autograd.grad(head_edit(*leaves, **kwargs).square().sum(), leaves)
    with triton_on_cpu(Recorder(80)) as recorder:
        found = torch.autograd.grad(head_edit(*leaves, **kwargs).square().sum(), leaves)
    names = [name for name, *_ in recorder.launches]
    assert names == [
        FORWARD,
        BACKWARD,
        "head_edit_backward_reduce_partials_kernel",
        "reduce_shared_kernel",
    ]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_only_wanted_gradients_are_computed() -> None:
    z, (m, a, g_m, g_a) = torch.randn(2, 5, H * D), _parameters()
    cases = {
        "z": ([z], 0, [FORWARD, BACKWARD]),
        "m": ([m], 1, [FORWARD, BACKWARD]),
        "a": ([a], 2, [FORWARD, BACKWARD]),
        "m, a": ([m, a], 3, [FORWARD, BACKWARD]),
        "gates": (
            [g_m, g_a],
            3,
            [FORWARD, BACKWARD, "reduce_shared_kernel"],
        ),
    }
    for leaves, sums, names in cases.values():
        for t in leaves:
            t.requires_grad_()
        with triton_on_cpu(Recorder(80)) as recorder:
            torch.autograd.grad(head_edit(z, m, a, g_m, g_a).sum(), leaves)
        for t in leaves:
            t.requires_grad_(False)
        assert [name for name, *_ in recorder.launches] == names
        assert recorder.launches[1][2]["SUM_MASK"] == sums


def test_closed_gates_are_the_identity() -> None:
    (m, a, _, _), closed = _parameters(), torch.zeros(H)
    for dtype in DTYPES:
        z = torch.randn(2, 5, H * D).to(dtype)
        with triton_on_cpu(Recorder(80)):
            assert torch.equal(head_edit(z, m, a, closed, closed), z)


def test_inplace() -> None:
    parameters = _parameters()
    for z, kwargs in (
        (torch.randn(2, 5, H * D), {}),
        (torch.randn(2, H, 5, D), {"head_axis": 1}),
        (torch.randn(2, 5, H, D).transpose(1, 2), {"head_axis": 1}),
        (torch.randn(2, 5, 2 * H * D)[..., : H * D], {}),
        (torch.randn(2, H, 10, D)[:, :, ::2], {"head_axis": 1}),
    ):
        expected = head_edit(z, *parameters, **kwargs)
        with triton_on_cpu(Recorder(80)):
            assert head_edit(z, *parameters, inplace=True, **kwargs) is z
        torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


def test_unaligned_storage() -> None:
    """A view that starts at an odd element: vectors would be misaligned, which the executor faults."""
    parameters = _parameters()
    for dtype in DTYPES:
        z = torch.randn(3 * H * D + 1).to(dtype)[1:].view(3, H * D)
        with triton_on_cpu(Recorder(80)):
            found = head_edit(z, *parameters)
        torch.testing.assert_close(found, head_edit(z, *parameters))


def test_non_finite_values_stay_in_their_place() -> None:
    z, parameters = torch.randn(3, H * D), _parameters()
    z[0, 5], z[1, 6], z[2, 7] = float("nan"), float("inf"), -float("inf")
    z.requires_grad_()
    edits = [p.requires_grad_() for p in parameters]
    with triton_on_cpu(Recorder(80)):
        y = head_edit(z, *edits)
        dz, dm, da, *_ = torch.autograd.grad(y, [z, *edits], torch.ones_like(y))
    assert (~y.isfinite()).sum() == 3
    assert dz.isfinite().all()
    assert da.isfinite().all()
    assert (~dm.isfinite()).sum() == 3
