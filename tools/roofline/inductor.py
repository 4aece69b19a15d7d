"""The kernels that ``torch.compile`` generates from the inlined reference, for ``python -m roofline``, without a GPU.

Inductor needs little more of the CUDA runtime than a device's properties. With these, it lowers a graph traced on fake CUDA
tensors to the Triton kernels it would launch, with the block sizes it would try. They are compiled ahead of time, like ours, and
their predicted times are summed; intermediate tensors between kernels go through memory.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.driver import driver

from ctkernels import use_backend
from ctkernels.functional import ctu
from ctkernels.ops.ctu import OP

from . import sass
from .gpus import GPUS, Cost

SHAPE = (32, 64, 56, 56)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTRS = (1, 0, False, 0.0)


@contextmanager
def pretended(sm: int) -> Iterator[None]:
    """Pretend that there is a device of this architecture, for Inductor."""
    numbers = {
        "major": sm // 10, "multi_processor_count": GPUS[sm].sms, "regs_per_multiprocessor": 65536, "warp_size": 32,
        "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024,
    }  # fmt: skip
    properties = SimpleNamespace(**numbers, minor=sm % 10, name=GPUS[sm].name, gcnArchName="")
    hints = DeviceProperties(type="cuda", index=0, cc=sm, **numbers)
    active = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", sm, 32), get_current_device=lambda: 0)
    with ExitStack() as stack:
        for name, value in {
            "torch.cuda.get_device_properties": lambda *_: properties,
            "torch.cuda.get_device_capability": lambda *_: (sm // 10, sm % 10),
            "torch.cuda.current_device": lambda: 0,
            "torch._inductor.scheduler.has_triton": lambda *_: True,
            "torch._dynamo.device_interface.CudaInterface.raise_if_triton_unavailable": lambda *_: None,
        }.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", classmethod(lambda cls, device: hints)))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        stack.enter_context(mock.patch.object(driver, "_active", active))
        yield


@dataclass(frozen=True)
class Kernel:
    """A kernel. ``function``: with its heuristics, including the configurations to try. bytes: memory traffic."""

    name: str
    function: Any
    bytes: int


def generated(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, list[int]]:
    """The module that Inductor generates for a function of fake tensors, and the memory traffic of each of its launches. Call it
    inside :func:`pretended`; the module is not run."""
    found: list[tuple[str, list[int]]] = []

    def lower(graph_module: torch.fx.GraphModule, inputs: list[Tensor], **_: Any) -> Any:
        mode = detect_fake_mode(inputs)
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            _recursive_post_grad_passes(graph_module, is_inference=True)
            graph = GraphLowering(graph_module, example_inputs=inputs)
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                code = graph.codegen()[0]
                moved = [
                    n.get_read_write_buffers_sizes()
                    for n in graph.scheduler.nodes
                    if not isinstance(n, NopKernelSchedulerNode)
                ]
        found.append((getattr(code, "value", code), moved))
        (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
        results = [None if node is None else node.meta["val"] for node in output.args[0]]
        return lambda *_: results

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return compile_fx(graph_module, inputs, inner_compile=lower)

    torch._dynamo.reset()
    with torch.no_grad(), config.patch(joint_graph_constant_folding=False):  # folding computes on the device
        torch.compile(function, fullgraph=True, backend=backend)(*args)
    (only,) = found
    return only


def kernels(text: str, moved: list[int], folder: Path) -> list[Kernel]:
    """The launches of a module of :func:`generated`, in order; the sources of its kernels go to ``folder``."""
    sources = {
        name: (source, defined)
        for name, source, defined in re.findall(
            r"^(\w+) = async_compile\.triton\('(\w+)', '''\n(.*?)''',", text, re.S | re.M
        )
    }
    launched = re.findall(r"^\s+(\w+)\.run\(", text, re.M)
    found = []
    for name, size in zip(launched, moved, strict=True):
        function_name, source = sources[name]
        path = folder / f"{name}.py"
        path.write_text(ast.literal_eval(f"'''{source}'''"))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(Kernel(name, getattr(module, function_name), size))
    return found


def made(kernel: Kernel, tried: Any, sm: int) -> Any:
    """The kernel compiled in one of its configurations."""
    jit, meta = kernel.function.fn, kernel.function.triton_meta
    constants = {(jit.arg_names.index(k),): v for k, v in {**meta["constants"], **tried.kwargs}.items()}
    source = ASTSource(jit, meta["signature"], constants, meta["configs"][0])
    options = {"num_warps": tried.num_warps, "num_stages": tried.num_stages}
    return compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def _cost(kernel: Kernel, elements: int, sm: int) -> Cost:
    """The cost of its fastest configuration, per element of the whole function's tensors."""
    costs = []
    for tried in kernel.function.configs:
        listing = sass.disassemble(made(kernel, tried, sm).asm["cubin"])
        body = listing.hot(outermost=False)
        moves = [i for i in body if i.name in ("LDG", "STG")]
        widest = max(i.bytes for i in moves)
        # elements per thread and loop iteration
        each = tried.kwargs["XBLOCK"] * tried.kwargs.get("R0_BLOCK", 1) / (32 * tried.num_warps)
        cost = Cost(
            kernel.name, sm, False, kernel.bytes / elements, len(body) / each,
            {k: v / each for k, v in sass.pipes(body).items()}, widest, listing.registers, listing.stack,
            listing.count("LDL", "STL"), listing.calls(body), 0, 0.0, "",
        )  # fmt: skip
        clocks = GPUS[sm].clocks(cost)
        limit = max(clocks, key=lambda k: clocks[k])
        costs.append(replace(cost, ratio=clocks[limit], limit=limit))
    return min(costs, key=lambda c: c.ratio)


@dataclass(frozen=True)
class Pass:
    """A function to compile, which uses the ops' reference, and the number of tensors of x's size it has to read and write."""

    function: Callable[..., Any]
    tensors: int


def _reference_forward(_: Tensor, x: Tensor, *knobs: Tensor) -> Tensor:
    return OP.reference_forward((x, *knobs, None, None, None, None), ATTRS)


def _reference_backward(dy: Tensor, x: Tensor, *knobs: Tensor) -> list[Tensor]:
    return OP.reference_backward(dy, (x, *knobs, None, None, None, None), ATTRS, 0b111)


def chain(z: Tensor, x: Tensor, *knobs: Tensor) -> Tensor:
    """The unit between pointwise operations that a compiler can fuse with it."""
    return ctu(x * 2, *knobs, channel_dim=1) * 2 + z


PASSES = {
    "reference forward": Pass(_reference_forward, 2),
    "reference backward": Pass(_reference_backward, 3),
    "chain, reference inlined, forward": Pass(chain, 3),
}


def tensors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A gradient or residual, x, beta and coeff, as fake CUDA tensors."""
    with FakeTensorMode():
        x = torch.empty(SHAPE, dtype=dtype, device="cuda:0")
        return torch.empty_like(x), x, *(torch.empty(SHAPE[1], device="cuda:0") for _ in range(2))


def cost(name: str, dtype_name: str, sm: int) -> Cost:
    """The cost of all kernels of one of PASSES, relative to the memory time of its inputs and outputs. Sums over few values are
    ignored."""
    dtype, compiled = DTYPES[dtype_name], PASSES[name]
    with tempfile.TemporaryDirectory() as folder, pretended(sm), use_backend("reference"):
        args = tensors(dtype)
        every = kernels(*generated(compiled.function, args), Path(folder))
        x = args[0]
        parts = [_cost(k, x.numel(), sm) for k in every if k.bytes > 0.01 * x.nbytes]
    pipes: Counter[str] = sum((Counter(p.pipes) for p in parts), Counter())
    floor = GPUS[sm].clocks(replace(parts[0], bytes=compiled.tensors * dtype.itemsize))["memory"]
    return Cost(
        f"inductor {name} NCHW {dtype_name}", sm, False, sum(p.bytes for p in parts),
        sum(p.instructions for p in parts), dict(pipes), min(p.vector for p in parts), max(p.registers for p in parts),
        max(p.stack for p in parts), sum(p.spills for p in parts), sum(p.calls for p in parts), 0,
        sum(p.ratio for p in parts) / floor, max(parts, key=lambda p: p.ratio).limit,
    )  # fmt: skip


def costs(archs: list[int], only: str = "") -> Iterator[Cost]:
    """Yield the costs of passes with ``only`` in their name."""
    for dtype_name in DTYPES:
        for name in PASSES:
            if only in f"inductor {name} NCHW {dtype_name}":
                for sm in archs:
                    yield cost(name, dtype_name, sm)
