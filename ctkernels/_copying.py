"""Copies of models."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def copy_module(model: M, memo: dict[int, Any] | None = None) -> M:
    """``copy.deepcopy`` of a model including its wrappers.

    peft's wrappers forward missing attributes, including ``__deepcopy__``, to the wrapped module. Around a module with
    that method, such as a ``torch.fx.GraphModule``, ``copy.deepcopy`` would copy only the wrapped module.

    Args:
        model: the model to copy.
        memo: as for ``copy.deepcopy``.
    """
    name = "__deepcopy__"
    forwarding = [m for m in model.modules() if getattr(m, name, None) is not None and not _has(m, name)]
    try:
        for module in forwarding:
            module.__dict__[name] = None
        copied = copy.deepcopy(model, memo)
    finally:
        for module in forwarding:
            del module.__dict__[name]
    for module in copied.modules():
        if module.__dict__.get(name, module) is None:
            del module.__dict__[name]
    return copied


def _has(module: nn.Module, name: str) -> bool:
    return name in module.__dict__ or hasattr(type(module), name)
