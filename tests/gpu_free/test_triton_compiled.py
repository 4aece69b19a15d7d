"""torch.compile where Triton is forced beside other CUDA kernels: opaque ops of the Triton kernels, in graphs of any shape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from triton_recorder import Recorder, triton_on_cpu

from ctkernels.functional import ctu, head_edit
from ctkernels.ops import backends, launcher
from ctkernels.ops.channelwise.launch import implementation
from ctkernels.ops.hard_concrete import OP as GATES
from ctkernels.ops.hard_concrete import SAMPLE
from ctkernels.ops.registration import OPS, define_kernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _ctu(x, beta, coeff, residual):
    return ctu(x * 2, beta, coeff, channel_dim=1, residual=residual) * 2 + residual


def _head_edit(z, m, a, g_m, g_a):
    return head_edit(z * 2, m, a, g_m, g_a) * 2 + z


def _gates(log_alpha, noise):
    return GATES((log_alpha * 2, noise), (-1, SAMPLE, 0.33, -0.1, 1.1)) * 2 + log_alpha


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "ctu": (_ctu, [(3, 4, 300), (4,), (4,), (3, 4, 300)]),
    "head_edit": (_head_edit, [(2, 40, 96), (4, 24), (4, 24), (4,), (4,)]),
    "hard_concrete": (_gates, [(12, 12), (12, 12)]),
}


@lru_cache(maxsize=1)
def _overloads():
    """Of every op, the dispatcher ops that a forced Triton has beside compiled CUDA kernels; for CPU tensors."""
    return {name: define_kernels(op, implementation(op), suffix="_triton_on_cpu") for name, op in OPS.items()}


@contextmanager
def _forced(recorder):
    """The Triton backend is forced, for CPU tensors too; its launches go to ``recorder``."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        for name, overloads in _overloads().items():
            patch.setattr(OPS[name], "triton_overloads", overloads)
        patch.setattr(backends, "FORCED", ["triton"])
        patch.setattr(backends, "check_forced_backend", lambda x: None)
        patch.setattr(launcher, "launch", recorder)
        yield


def _inputs(case):
    g = torch.Generator().manual_seed(0)
    return [0.05 + 0.9 * torch.rand(shape, generator=g) for shape in CASES[case][1]]


@pytest.mark.parametrize("case", CASES)
def test_the_graph_gives_the_bits_of_the_eager_kernels(case):
    """Forward and backward, without a break."""
    function, _ = CASES[case]
    leaves = [t.requires_grad_() for t in _inputs(case)]

    def step(f):
        y = f(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    with triton_on_cpu(Recorder(90)) as eager:
        expected = step(function)
    recorder = Recorder(90)
    with _forced(recorder):
        found = step(torch.compile(function, fullgraph=True, backend="aot_eager"))
    assert [name for name, *_ in recorder.launches] == [name for name, *_ in eager.launches]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_in_place():
    x, beta, coeff, _ = _inputs("ctu")
    with triton_on_cpu(Recorder(90)):
        expected = ctu(x, beta, coeff, channel_dim=1)

    def function(x):
        return ctu(x, beta, coeff, channel_dim=1, inplace=True) * 2

    recorder = Recorder(90)
    with _forced(recorder):
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert len(recorder.launches) == 1
    assert torch.equal(x, expected)
    assert torch.equal(found, 2 * expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_shapes(dynamic):
    _, beta, coeff, _ = _inputs("ctu")
    with _forced(Recorder(90)):
        function = torch.compile(partial(ctu, channel_dim=1), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        found = {size: function(torch.linspace(-3, 3, 4 * size).view(1, 4, size), beta, coeff) for size in (6, 10, 300)}
    for size, y in found.items():
        with triton_on_cpu(Recorder(90)):
            assert torch.equal(y, ctu(torch.linspace(-3, 3, 4 * size).view(1, 4, size), beta, coeff, channel_dim=1))


def test_which_op_a_program_holds():
    """That of the forced kernels if compiled under ``use_backend``; exported programs can run on any backend."""
    x, beta, coeff, _ = _inputs("ctu")

    class Net(torch.nn.Module):
        def forward(self, x):
            return ctu(x, beta, coeff, channel_dim=1)

    def compiled():
        nodes: list[str] = []

        def backend(graph, inputs):
            nodes.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        torch.compile(Net(), fullgraph=True, backend=backend)(x)
        return nodes

    assert "ctkernels.ctu.default" in compiled()
    with _forced(Recorder(90)):
        assert "ctkernels.ctu_triton_on_cpu.default" in compiled()
        for strict in (False, True):
            program = torch.export.export(Net(), (x,), strict=strict)
            assert "ctkernels.ctu.default" in program.graph_module.code
