"""The kernels under pytest-benchmark, for its statistics and comparisons: pytest benchmarks --benchmark-enable."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ctkernels.functional import ctu, head_edit

CONTESTANTS = {
    "relu": lambda x, beta: torch.relu(x),
    "silu": lambda x, beta: torch.nn.functional.silu(x),
    "ctu, one knob": lambda x, beta: ctu(x, 0.9),
    "ctu, a knob per channel": lambda x, beta: ctu(x, beta, channel_dim=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONTESTANTS)
def test_activation(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype) -> None:
    x, beta = torch.randn(4, 256, 56, 56).to(dtype), torch.full((256,), 0.9)
    with torch.no_grad():
        y = benchmark(CONTESTANTS[name], x, beta)
    assert y.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_head_edit(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    z = torch.randn(4, 512, 32 * 64).to(dtype)
    with torch.no_grad():
        y = benchmark(head_edit, z, torch.randn(32, 64), torch.randn(32, 64))
    assert y.shape == z.shape
