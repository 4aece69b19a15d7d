"""Triton launches. Imported on the first CUDA call, never by ``import ctkernels``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes that Triton compiles a kernel for if a pointer is a multiple of them


def launch(kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> Any:
    """Launches a kernel on the current stream of the current device, asynchronously. Returns the compiled kernel."""
    if torch.version.hip:
        meta = with_waves(meta, torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size)
    return kernel[(grid,)](**args, **meta)


class Repeated:
    """A launch that is repeated with other tensors of the same dtypes on the same device, other numbers, and nothing else new.

    Triton binds, inspects and hashes every argument of every launch to find the compiled kernel. Here only the alignments of
    the tensors select it: Triton's own launch finds it for the first call with some alignments, and later ones use it directly.
    (For AMD's GPUs Triton also tells storages of up to 2 GiB apart, whose offsets fit 32 bits. Those of equal tensors are equal.)

    Args:
        args, meta: the arguments that stay the same, and the constants.
        numbers: the kernel's parameters that are numbers of a call, which are neighbours; the others are tensors.
    """

    def __init__(self, kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any], numbers: Sequence[str] = ()):
        self.kernel, self.grid, self.args, self.meta, self._numbers = kernel, grid, args, meta, numbers
        fixed = args | meta
        self.tensors = [name for name in kernel.arg_names if name not in fixed and name not in numbers]
        before = kernel.arg_names.index(numbers[0]) if numbers else len(self.tensors)
        self._before, self._after = slice(before), slice(before, None)  # tensors before the numbers, and after them
        self._fixed = [fixed[name] for name in kernel.arg_names if name in fixed]
        self._compiled: dict[tuple[bool, ...], Callable[..., None]] = {}

    def __call__(self, tensors: Sequence[Tensor | None], numbers: Sequence[float] = ()) -> None:
        """Launches it. None stands for a null pointer, in every call."""
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        aligned = tuple([p % ALIGNMENT == 0 for p in pointers])
        run = self._compiled.get(aligned)
        if run is not None:
            run(*pointers[self._before], *numbers, *pointers[self._after], *self._fixed)
            return
        args = dict(zip(self.tensors, tensors, strict=True)) | dict(zip(self._numbers, numbers, strict=True))
        compiled = launch(self.kernel, self.grid, args | self.args, self.meta)
        if compiled is not None:  # Triton's interpreter compiles nothing; its futures have __getitem__ as an attribute
            self._compiled[aligned] = compiled.__getitem__((self.grid, 1, 1))


def with_waves(meta: dict[str, Any], threads: int) -> dict[str, Any]:
    """``meta``, whose ``num_warps`` counts warps of 32, for a GPU with this many threads per wave: as many threads in all."""
    return meta | {"num_warps": max(1, meta["num_warps"] * 32 // threads)}


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of ``x`` current."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
