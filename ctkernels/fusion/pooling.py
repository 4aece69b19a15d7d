"""Max poolings that call torch's own kernels in compiled training steps (:mod:`ctkernels.ops.max_pool2d`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.max_pool2d.function import max_pool2d
from .overrides import FusedForward


class Pooling(FusedForward):
    """The ``forward`` in a max pooling's ``__dict__``."""

    def __init__(self, module: nn.MaxPool2d) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Any:
        m = self.module
        recorded = torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad
        if not recorded or torch.compiler.is_exporting() or not x.is_cpu or x.dim() != 4 or m.return_indices:
            return type(m).forward(m, x)
        return max_pool2d(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)


def poolings(model: nn.Module) -> dict[nn.Module, Pooling]:
    """A forward for every max pooling of ``model`` that runs torch's."""
    modules = (m for m in model.modules() if isinstance(m, nn.MaxPool2d) and "forward" not in vars(m))
    return {m: Pooling(m) for m in modules if type(m).forward is nn.MaxPool2d.forward}
