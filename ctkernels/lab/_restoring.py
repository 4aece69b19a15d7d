"""Contexts that put a model into evaluation mode or freeze it, and restore each submodule and parameter afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into evaluation mode; afterwards each submodule is in its own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Freeze all parameters, so that no gradients of them are computed; afterwards each is as it was."""
    with kept_trainable(model):
        yield model.requires_grad_(False)


@contextmanager
def kept_trainable(model: nn.Module) -> Iterator[nn.Module]:
    """Restore ``requires_grad`` of each parameter afterwards, whatever happens to it meanwhile."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield model
    finally:
        for parameter, grad in before:
            parameter.requires_grad_(grad)
