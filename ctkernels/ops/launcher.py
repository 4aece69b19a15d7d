"""Triton launches. Imported on the first CUDA call, never by ``import ctkernels``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> None:
    """Launches a kernel on the current stream of the current device, asynchronously."""
    if torch.version.hip:
        meta = with_waves(meta, torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size)
    kernel[(grid,)](**args, **meta)


def with_waves(meta: dict[str, Any], threads: int) -> dict[str, Any]:
    """``meta``, whose ``num_warps`` counts warps of 32, for a GPU with this many threads per wave: as many threads in all."""
    return meta | {"num_warps": max(1, meta["num_warps"] * 32 // threads)}


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of ``x`` current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
