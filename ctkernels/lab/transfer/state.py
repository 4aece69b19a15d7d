"""The state that training changes in a network: its mode, trained parameters and batch-normalisation statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset


def batch_norms(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def ends_with_single(data: Dataset[Any], batch_size: int) -> bool:
    """Whether the last of several batches has one example, which has no batch statistics."""
    count = len(data)  # type: ignore[arg-type]
    return count > batch_size and count % batch_size == 1


def statistics_of(network: nn.Module) -> dict[str, Tensor]:
    """The statistics of batch normalisation (buffers, not copies), by name."""
    names = {id(b): name for name, b in network.named_buffers()}
    return {names[id(b)]: b for module in batch_norms(network) for b in module.buffers()}


@contextmanager
def training_mode(network: nn.Module, bn_train: bool) -> Iterator[None]:
    """Evaluation mode, but with batch statistics in batch normalisation if ``bn_train``; evaluation mode afterwards."""
    network.eval()
    for module in batch_norms(network) if bn_train else ():
        module.train()
    try:
        yield
    finally:
        network.eval()


def state_of(network: nn.Module, bn_train: bool) -> dict[str, Tensor]:
    """Copies of the trained parameters, and of the statistics of batch normalisation if ``bn_train``."""
    state: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
    state |= statistics_of(network) if bn_train else {}
    return {name: value.detach().clone() for name, value in state.items()}


def load_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state from :func:`state_of`."""
    unknown = network.load_state_dict(dict(state), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"weights: expected those of this network, got {unknown[:3]} besides")
