"""Snapshot and restore of what training changes in a network, and the mode it is trained in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def batch_norms(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def training_mode(network: nn.Module, bn_train: bool) -> Iterator[None]:
    """Evaluation mode, batch normalisation on batch statistics if ``bn_train``; evaluation mode after it."""
    network.eval()
    for module in batch_norms(network) if bn_train else ():
        module.train()
    try:
        yield
    finally:
        network.eval()


def state_of(network: nn.Module, bn_train: bool) -> dict[str, Tensor]:
    """Copies of what training changes: trained parameters, and the statistics of batch normalisation if ``bn_train``."""
    state = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    if bn_train:
        statistics = {id(b) for module in batch_norms(network) for b in module.buffers()}
        state |= {name: b.detach().clone() for name, b in network.named_buffers() if id(b) in statistics}
    return state


def load_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`state_of` gave."""
    unknown = network.load_state_dict(dict(state), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"weights: expected those of this network, got {unknown[:3]} besides")
