"""Detects a model that uses a projection's weight without calling the projection, which would skip the edit."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class _Record:
    """Whether one call of the module around `layer` read its weight and called it."""

    __slots__ = ("called", "layer", "read")

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.read = self.called = False


class _Running(threading.local):
    def __init__(self) -> None:
        self.records: list[_Record] = []


_running = _Running()


def watch(block: nn.Module, layer: nn.Module) -> list[RemovableHandle]:
    """Check that each call of `block`, the module around `layer`, calls the layer if it reads the layer's weight."""
    return [
        block.register_forward_pre_hook(partial(_begin, layer)),
        block.register_forward_hook(partial(_end, layer), always_call=True),
    ]


def note_read(layer: nn.Module) -> None:
    """Record that the weight or bias of `layer` was read while an adapter is active."""
    for record in reversed(_running.records):
        if record.layer is layer:
            record.read = True
            return


def note_call(layer: nn.Module) -> None:
    """Record that `layer` was called."""
    for record in reversed(_running.records):
        if record.layer is layer:
            record.called = True
            return


def _begin(layer: nn.Module, block: nn.Module, args: Any) -> None:
    _running.records.append(_Record(layer))


def _end(layer: Any, block: nn.Module, args: Any, output: Any) -> None:
    records = _running.records
    for position in range(len(records) - 1, -1, -1):
        record = records[position]
        if record.layer is layer:
            del records[position:]  # with the records above it, of calls interrupted before their hook ran
            if record.read and not record.called and output is not None:  # None: the call raised
                raise ValueError(
                    f"{layer.site}: {type(block).__name__} used the projection's weight without calling the projection, "
                    "so the edit of its heads would be left out. Set the model to a way that calls it (Bloom: "
                    "slow_but_exact=False), or leave the module out with exclude_modules"
                )
            return
