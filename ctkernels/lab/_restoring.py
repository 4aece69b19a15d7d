"""Contexts that put a model into evaluation mode or freeze it, and restore each submodule and parameter afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """Puts the model into evaluation mode; restores the mode of each submodule afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Freezes all parameters; restores their ``requires_grad`` afterwards."""
    with kept_trainable(model):
        yield model.requires_grad_(False)


@contextmanager
def kept_trainable(model: nn.Module) -> Iterator[nn.Module]:
    """Restores ``requires_grad`` of each parameter afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield model
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
