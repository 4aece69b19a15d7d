"""Rung 7: the conformance suite on a real GPU. Everything else about the GPU kernels is proven without one."""

from __future__ import annotations

import pytest
import torch
from conformance import check_against_float64, outputs, sample_named

import ctkernels
from ctkernels.functional import ctu
from ctkernels.ops import _backend
from ctkernels.testing import ctu_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        _backend.BACKENDS["triton"].missing is not None, reason=str(_backend.BACKENDS["triton"].missing)
    ),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [s.name for s in ctu_samples()])
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    sample = sample_named(name, dtype)
    with ctkernels.use_backend("triton"):
        found = outputs(sample.map(lambda _, t: t.cuda()))
    check_against_float64(sample, found)


def _gradients(x: torch.Tensor, *knobs: torch.Tensor, channel_dim: int) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, *knobs)]
    y = ctu(*leaves, channel_dim=channel_dim)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


@pytest.mark.parametrize(("shape", "channel_dim"), [((32, 64, 56, 56), 1), ((8, 197, 768), 2), ((1, 1, 3072), 2)])
def test_same_bits_on_every_run_stream_and_graph_replay(shape: tuple[int, ...], channel_dim: int) -> None:
    x = torch.randn(shape, device="cuda")
    knobs = [torch.rand(shape[channel_dim], device="cuda") for _ in range(2)]
    first = _gradients(x, *knobs, channel_dim=channel_dim)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = _gradients(x, *knobs, channel_dim=channel_dim)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _gradients(x, *knobs, channel_dim=channel_dim)
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(first, second, captured):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free device memory")
    x = torch.randn(2**31 + 4096, device="cuda", dtype=torch.bfloat16)
    y = ctu(x, 0.9)
    assert torch.equal(y[-8192:], ctu(x[-8192:].clone(), 0.9))


def test_explain_names_the_backend() -> None:
    assert "triton     used" in ctkernels.explain(torch.ones(2, device="cuda"))
