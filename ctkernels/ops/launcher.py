"""Triton launches. Imported on the first CUDA call, never by ``import ctkernels``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> None:
    """Launches a kernel on the current stream of the current device, asynchronously."""
    kernel[(grid,)](**args, **meta)


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of ``x`` current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
