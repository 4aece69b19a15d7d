"""Records of the attention blocks that are running, for attention functions that edit heads themselves.

Such a function has to tell the projection that follows that its input is edited already, in the same call and in no
other: not in another thread's, not in the one after an exception, not in the one that a checkpoint runs again. So
each call of a block has a record of its own, on a stack of its thread, for as long as it runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn


class Call:
    """One running call of an attention block. `edited`: what the projection `layer` gets next holds its edit."""

    __slots__ = ("edited", "layer")

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.edited = False


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []


_running = _Running()


def current() -> Call | None:
    """The innermost recorded call of this thread."""
    return _running.calls[-1] if _running.calls else None


def take_edit(layer: nn.Module) -> bool:
    """Whether the input that `layer` has just got is edited already; true once for each edit."""
    call = current()
    if call is None or call.layer is not layer or not call.edited:
        return False
    call.edited = False
    return True


def _recorded(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _running.calls.append(Call(layer))
    try:
        return forward(*args, **kwargs)
    finally:
        _running.calls.pop()


class Recording:
    """Records the calls of `block`, the attention around the projection `layer`, until `stop`.

    The block's `forward` is wrapped by a `partial` of a bound method: a deep copy or a pickle of the block has one that
    is bound to its own block and layer. (A forward hook would not run after a `KeyboardInterrupt`.)
    """

    def __init__(self, block: nn.Module, layer: nn.Module) -> None:
        self._block = block
        self._before = block.__dict__.get("forward")
        self._forward = functools.update_wrapper(functools.partial(_recorded, layer, block.forward), block.forward)
        block.forward = self._forward

    def stop(self) -> None:
        """Put the block's forward back, unless another one has been put over this one since."""
        if self._block.__dict__.get("forward") is not self._forward:
            return
        del self._block.forward
        if self._before is not None:
            self._block.forward = self._before
