"""Triton launches that torch.compile sees through: the graph's results, what Inductor makes of it, and the kernels' code."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from inlined_on_cpu import graph_on_cpu, module_on_cpu
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_recorder import Recorder, triton_on_cpu

from benchmarks import inductor
from ctkernels import use_backend
from ctkernels.functional import ctu, head_edit
from ctkernels.ops.channelwise import launch as _triton
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
    return [
        (0.05 + 0.9 * torch.rand(shape, generator=g)).to(dtype if i == 0 else torch.float32)
        for i, shape in enumerate(CASES[case][1])
    ]


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


def _gradients(op: Any, static: tuple[Any, ...], needs: int) -> Callable[..., list[Tensor]]:
    """Backward kernels between neighbours: without autograd, whose engine wants the device."""
    empty = {"ctu": (None,) * 3, "head_edit": (), "hard_concrete": ()}[op.name]

    def function(dy: Tensor, *inputs: Tensor) -> list[Tensor]:
        full = (*inputs[:3], *empty, *inputs[3:]) if op is CTU else inputs
        first, *others = op._packet("_backward")(dy * 2, *full, *static, needs)
        return [first * 2 + dy, *others]

    return function


def test_in_place() -> None:
    x, beta, coeff, _ = _inputs("ctu")
    with triton_on_cpu(Recorder(90)):
        expected = ctu(x, beta, coeff, channel_dim=1)

    def function(x: Tensor) -> Tensor:
        return ctu(x, beta, coeff, channel_dim=1, inplace=True) * 2

    recorder = Recorder(90)
    with graph_on_cpu(recorder, 90):
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert len(recorder.launches) == 1
    assert torch.equal(x, expected)
    assert torch.equal(found, 2 * expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_graph_for_every_shape(dynamic: bool | None) -> None:
    _, beta, coeff, _ = _inputs("ctu")
    with graph_on_cpu(Recorder(90), 90):
        function = torch.compile(partial(ctu, channel_dim=1), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        found = {size: function(torch.linspace(-3, 3, 4 * size).view(1, 4, size), beta, coeff) for size in (6, 10, 300)}
    for size, y in found.items():
        with triton_on_cpu(Recorder(90)):
            assert torch.equal(y, ctu(torch.linspace(-3, 3, 4 * size).view(1, 4, size), beta, coeff, channel_dim=1))


def test_compilers_caches_know_the_kernels() -> None:
    """Without them in the key, a cached graph would outlive a change of the kernels."""
    from torch._library.triton import get_triton_kernels_for_op

    from ctkernels.ops.channelwise import inlined as _triton_inlined

    for op in (CTU, HEAD_EDIT, GATES):
        for suffix in ("", "_", "_backward"):
            name = _triton_inlined.OVERLOADS[op.name + suffix]._name
            assert get_triton_kernels_for_op(name) == _triton.kernels(op)


def test_what_is_the_default() -> None:
    """Opaque ops, in compiled programs, and in exported ones whatever is forced."""
    x, beta, coeff, _ = _inputs("ctu")

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ctu(x, beta, coeff, channel_dim=1)

    nodes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(Net(), fullgraph=True, backend=backend)(x)
    assert "ctkernels.ctu.default" in nodes
    for strict in (False, True):
        with graph_on_cpu(Recorder(90), 90):
            program = torch.export.export(Net(), (x,), strict=strict)
        assert "ctkernels.ctu.default" in program.graph_module.code


def test_inlining_moves_as_much_memory() -> None:
    """Inductor writes the same neighbours around an inlined kernel and an opaque op."""
    found = []
    for forced in (nullcontext(), use_backend("triton")):
        with inductor.pretended(90), forced:
            text, _ = inductor.generated(inductor.chain, inductor.tensors(torch.float32))
        assert ("torch.ops.ctkernels.ctu.default" in text) == ("def channelwise_kernel" not in text)
        neighbours = re.findall(r"^def triton_poi\w+(.*?)'''", text, re.S | re.M)
        found.append([(code.count("tl.load("), code.count("tl.store(")) for code in neighbours])
    assert found == [[(1, 1), (2, 1)]] * 2


MODULES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "ctu forward": (_ctu, CASES["ctu"][1]),
    "ctu backward": (_gradients(CTU, (1, 0, False, 0.0), 0b1000111), [(3, 4, 300), *CASES["ctu"][1]]),
    "head_edit forward": (_head_edit, CASES["head_edit"][1]),
    "head_edit backward": (_gradients(HEAD_EDIT, (2,), 0b11111), [(2, 40, 96), (2, 40, 96), (96,), (96,), (4,), (4,)]),
    "hard_concrete forward": (_gates, CASES["hard_concrete"][1]),
    "hard_concrete backward": (_gradients(GATES, (-1, SAMPLE, 0.33, -0.1, 1.1), 0b11), [(12, 12)] * 3),
}


def _code(ptx: str, name: str) -> list[str]:
    """Instructions, without positions in the source, and the kernel's name."""
    lines = (line.split("//")[0].strip() for line in ptx.replace(name, "kernel").partition("\t.file")[0].splitlines())
    return [line for line in lines if line and not line.startswith((".loc", "$L__tmp", "$L__func"))]


@pytest.mark.parametrize("name", MODULES)
def test_what_inductor_writes(name: str, tmp_path: Path) -> None:
    """Our launches between fused neighbours and nothing else, in code that compiles to what eager code launches, and whose
    results are the eager ones."""
    function, shapes = MODULES[name]
    g = torch.Generator().manual_seed(0)
    args = [0.05 + 0.9 * torch.rand(shape, generator=g) for shape in shapes]
    eager = Recorder(90)
    with triton_on_cpu(eager):
        expected = function(*args)
    with inductor.pretended(90), use_backend("triton"):
        with FakeTensorMode():
            fakes = [torch.empty(t.shape, device="cuda:0") for t in args]
        text, moved = inductor.generated(function, tuple(fakes))
        every = inductor.kernels(text, moved, tmp_path)
        found = module_on_cpu(text, every, args, 90)
        first, *ours, last = every
        assert re.fullmatch(r"triton_poi_fused_mul(_view)?_0", first.name)  # and no copy
        assert re.fullmatch(r"triton_poi_fused_add_mul(_view)?_1", last.name)
        for kernel, (name, _, _, launched) in zip(ours, eager.launches, strict=True):
            assert name.endswith(kernel.function.fn.__name__)
            made = inductor.made(kernel, kernel.function.configs[0], 90)
            assert made.asm["cubin"]
            assert _code(made.asm["ptx"], made.metadata.name) == _code(launched.asm["ptx"], name)
    expected = expected if isinstance(expected, list) else [expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
