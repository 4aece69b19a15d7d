"""Runs what ``torch.compile`` makes of inlined Triton launches on CPU tensors, without a GPU: the graph that a compiler gets,
and the module that Inductor writes from it, with the PTX of all kernels executed. Import only where Triton is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from ptx import parse
from ptx.launch import Launch, execute
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from triton.runtime.jit import JITFunction

from benchmarks import inductor
from ctkernels.ops import backends


def _allowed(x: Tensor) -> None:
    """Every tensor, on whatever device."""


@contextmanager
def graph_on_cpu(launch: Callable[..., None], sm: int) -> Iterator[None]:
    """The Triton backend is forced, for CPU tensors too. Of a compiled function, the graph that ``aot_eager`` makes runs node
    by node, its kernels through ``launch``."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args)) | kwargs
        passed = {p.name for p in kernel.params if not p.is_constexpr}
        launch(
            kernel,
            (grid(values) if callable(grid) else grid)[0],
            {k: v for k, v in values.items() if k in passed},
            {k: v for k, v in values.items() if k not in passed},
        )

    torch._dynamo.reset()
    with (
        inductor.pretended(sm),
        mock.patch.object(backends, "_forced", ["triton"]),
        mock.patch.object(backends, "forced_refusal", _allowed),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield


class _Kernel:
    """In place of one that Inductor's module would compile and launch."""

    def __init__(self, kernel: inductor.Kernel, sm: int):
        self.kernel, self.sm = kernel, sm

    def run(self, *args: Any, stream: int) -> None:
        tried = self.kernel.function.configs[0]
        found = inductor.made(self.kernel, tried, self.sm)
        jit, signature = self.kernel.function.fn, self.kernel.function.triton_meta["signature"]
        declared = self.kernel.function.inductor_meta.get("declared_constexpr_names", tried.kwargs)
        names = [name for name in jit.arg_names if name not in declared]
        values = dict(zip(names, args))
        if "XBLOCK" in tried.kwargs:
            grid = -(-values["xnumel"] // tried.kwargs["XBLOCK"])
        else:
            grid = args[len(names)]
        passed = [value for name, value in values.items() if signature[name] != "constexpr"]
        text = found.asm["ptx"]
        (entry,) = parse(text).entries
        hidden = len(parse(text).functions[entry].params) - len(passed)
        block = (32 * found.metadata.num_warps,)
        execute([Launch(text, entry, (grid,), block, found.metadata.shared, [*passed, *[0] * hidden])])


def module_on_cpu(text: str, found: list[inductor.Kernel], args: list[Tensor], sm: int) -> list[Tensor]:
    """The results of a module that Inductor wrote for fake CUDA tensors, on CPU tensors."""
    by_name = {kernel.name: kernel for kernel in found}

    def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty_strided(size, stride, dtype=dtype)
        return made.fill_(float("nan")) if dtype.is_floating_point else made

    with ExitStack() as stack:
        for target, name, value in (
            (AsyncCompile, "triton", lambda self, name, source, device_str: None),
            (torch._C._dynamo.guards, "_empty_strided_cuda", empty),
            (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
            (torch.cuda, "_DeviceGuard", lambda device: nullcontext()),
            (torch.cuda, "set_device", lambda device: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        module: dict[str, Any] = {}
        exec(text, module)
        module |= {name: _Kernel(kernel, sm) for name, kernel in by_name.items()}
        return list(module["call"](list(args)))
