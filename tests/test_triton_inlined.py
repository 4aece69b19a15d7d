"""Triton launches that torch.compile sees through: the graph's results, what Inductor makes of it, and the kernels' code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")
inductor = pytest.importorskip("benchmarks.inductor")

from inlined_on_cpu import graph_on_cpu, module_on_cpu
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_recorder import Recorder, triton_on_cpu

from benchmarks.ahead_of_time import compiled
from ctkernels import use_backend
from ctkernels.functional import ctu, head_edit
from ctkernels.ops import _triton
from ctkernels.ops.ctu import OP as CTU
from ctkernels.ops.hard_concrete import OP as GATES
from ctkernels.ops.hard_concrete import SAMPLE
from ctkernels.ops.head_edit import OP as HEAD_EDIT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _ctu(x: Tensor, beta: Tensor, coeff: Tensor, residual: Tensor) -> Tensor:
    return ctu(x * 2, beta, coeff, channel_dim=1, residual=residual) * 2 + residual


def _head_edit(z: Tensor, m: Tensor, a: Tensor, g_m: Tensor, g_a: Tensor) -> Tensor:
    return head_edit(z * 2, m, a, g_m, g_a) * 2 + z


def _gates(log_alpha: Tensor, noise: Tensor) -> Tensor:
    return GATES((log_alpha * 2, noise), (-1, SAMPLE, 0.33, -0.1, 1.1)) * 2 + log_alpha


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "ctu": (_ctu, [(3, 4, 300), (4,), (4,), (3, 4, 300)]),
    "head_edit": (_head_edit, [(2, 40, 96), (4, 24), (4, 24), (4,), (4,)]),
    "hard_concrete": (_gates, [(12, 12), (12, 12)]),
}


def _inputs(case: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(0.05 + 0.9 * torch.rand(shape, generator=g)).to(dtype if i == 0 else torch.float32) for i, shape in
            enumerate(CASES[case][1])]


@pytest.mark.parametrize("case", CASES)
def test_the_graph_gives_the_bits_of_the_eager_kernels(case: str) -> None:
    """Forward and backward, without a break, with the launches as nodes of the graph."""
    function, _ = CASES[case]
    leaves = [t.requires_grad_() for t in _inputs(case)]

    def step(f: Callable[..., Tensor]) -> list[Tensor]:
        y = f(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    with triton_on_cpu(Recorder(90)) as eager:
        expected = step(function)
    recorder = Recorder(90)
    with graph_on_cpu(recorder, 90):
        found = step(torch.compile(function, fullgraph=True, backend="aot_eager"))
    assert [name for name, *_ in recorder.launches] == [name for name, *_ in eager.launches]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
