"""What ``torch.compile`` makes of the composed reference, for ``python -m benchmarks.roofline``: without a GPU.

Inductor asks the CUDA runtime for little more than a device's properties. With those given, it lowers a graph traced on fake
CUDA tensors to the Triton kernels it would launch, with the block sizes it would try. They are compiled ahead of time, like
ours, and their predicted times added up: intermediate tensors go through memory, so there is more than one kernel.
"""

from __future__ import annotations

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
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.driver import driver

from ctkernels.ops.ctu import OP

from . import sass
from .roofline import GPUS, Cost

SHAPE = (32, 64, 56, 56)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def _pretended(sm: int) -> Iterator[None]:
    """A device of this architecture, as far as Inductor looks."""
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
    """``function``: with its heuristics, among them the configurations that would be tried. bytes: that it moves."""

    name: str
    function: Any
    bytes: int


def kernels(function: Callable[..., Any], args: tuple[Tensor, ...], mode: FakeTensorMode, folder: Path) -> list[Kernel]:
    """What Inductor generates for a function of fake tensors; the sources go to ``folder``. Call it where a GPU is pretended."""
    with mode:
        traced = make_fx(function, decomposition_table=select_decomp_table())(*args)
    graph = GraphLowering(traced, example_inputs=args)
    with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        graph.run(*args)
        code = graph.codegen()[0]
        moved = [node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes]
    text = getattr(code, "value", code)
    sources = dict(re.findall(r"async_compile\.triton\('(\w+)', '''\n(.*?)''',", text, re.S))
    launched = re.findall(r"^\s+(\w+)\.run\(", text, re.M)
    found = []
    for name, size in zip(launched, moved, strict=True):
        path = folder / f"{name}.py"
        path.write_text(sources[name])
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(Kernel(name, getattr(module, name), size))
    return found


def _cost(kernel: Kernel, elements: int, sm: int) -> Cost:
    """Of the fastest of its configurations, per element of the tensors that the whole function is of."""
    costs = []
    for config in kernel.function.configs:
        jit, meta = kernel.function.fn, kernel.function.triton_meta
        constants = {(jit.arg_names.index(k),): v for k, v in {**meta["constants"], **config.kwargs}.items()}
        source = ASTSource(jit, meta["signature"], constants, meta["configs"][0])
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        made = compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        listing = sass.disassemble(made.asm["cubin"])
        body = listing.hot(outermost=False)
        block = config.kwargs["XBLOCK"] * config.kwargs.get("R0_BLOCK", 1)
        each = block / (32 * config.num_warps)  # elements of a thread, in one turn of its loop
        moves = [i.bytes for i in body if i.name in ("LDG", "STG")]
        cost = Cost(
            kernel.name, sm, False, kernel.bytes / elements, len(body) / each,
            {k: v / each for k, v in sass.pipes(body).items()}, max(moves), listing.registers, listing.stack,
            listing.count("LDL", "STL"), listing.calls(body), 0, 0.0, "",
        )  # fmt: skip
        clocks = GPUS[sm].clocks(cost)
        limit = max(clocks, key=lambda k: clocks[k])
        costs.append(replace(cost, ratio=clocks[limit], limit=limit))
    return min(costs, key=lambda c: c.ratio)


def cost(direction: str, dtype_name: str, sm: int) -> Cost:
    """All kernels of one pass, over the memory time of its inputs and outputs alone. Sums over a few values are left out."""
    dtype, static = DTYPES[dtype_name], (1, 0, False, 0.0)
    with tempfile.TemporaryDirectory() as folder, _pretended(sm):
        mode = FakeTensorMode()
        with mode:
            x = torch.empty(SHAPE, dtype=dtype, device="cuda:0")
            dy, *knobs = torch.empty_like(x), *(torch.empty(SHAPE[1], device="cuda:0") for _ in range(2))

        def forward(x: Tensor, *knobs: Tensor) -> Tensor:
            return OP.reference_forward((x, *knobs, None, None, None, None), static)

        def backward(dy: Tensor, x: Tensor, *knobs: Tensor) -> list[Tensor]:
            return OP.reference_backward(dy, (x, *knobs, None, None, None, None), static, 0b111)

        function, args = (forward, (x, *knobs)) if direction == "forward" else (backward, (dy, x, *knobs))
        every = kernels(function, args, mode, Path(folder))
        parts = [_cost(k, x.numel(), sm) for k in every if k.bytes > 0.01 * x.nbytes]
    pipes: Counter[str] = sum((Counter(p.pipes) for p in parts), Counter())
    needed = (3 if direction == "backward" else 2) * dtype.itemsize
    floor = GPUS[sm].clocks(replace(parts[0], bytes=needed))["memory"]
    return Cost(
        f"inductor reference {direction} NCHW {dtype_name}", sm, False, sum(p.bytes for p in parts),
        sum(p.instructions for p in parts), dict(pipes), min(p.vector for p in parts), max(p.registers for p in parts),
        max(p.stack for p in parts), sum(p.spills for p in parts), sum(p.calls for p in parts), 0,
        sum(p.ratio for p in parts) / floor, max(parts, key=lambda p: p.ratio).limit,
    )  # fmt: skip


def costs(archs: list[int], only: str = "") -> Iterator[Cost]:
    """Of the passes whose name contains ``only``."""
    for dtype_name in DTYPES:
        for direction in ("forward", "backward"):
            if only in f"inductor reference {direction} NCHW {dtype_name}":
                for sm in archs:
                    yield cost(direction, dtype_name, sm)
