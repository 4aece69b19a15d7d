"""Records of running attention blocks, for attention functions that apply the edit themselves.

Such a function has to tell the following projection that its input is already edited, in this call only: not in another
thread, after an exception, or in a checkpoint's recomputation. So every call of a block has its own record, on a
thread-local stack, while it runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn


class BlockCall:
    """A running call of an attention block. `edited`: the next input of the projection `layer` is already edited."""

    __slots__ = ("edited", "layer")

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.edited = False


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[BlockCall] = []


_running = _Running()


def current_call() -> BlockCall | None:
    """The innermost recorded call of this thread."""
    return _running.calls[-1] if _running.calls else None


def take_edit(layer: nn.Module) -> bool:
    """Whether the current input of `layer` is already edited; true once per edit."""
    call = current_call()
    if call is None or call.layer is not layer or not call.edited:
        return False
    call.edited = False
    return True


def _recorded(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _running.calls.append(BlockCall(layer))
    try:
        return forward(*args, **kwargs)
    finally:
        _running.calls.pop()


class CallRecorder:
    """Records the calls of `block`, the attention around the projection `layer`, until `stop`.

    The block's `forward` is replaced by a `partial` over the bound method, so deep copies and pickles of the block refer
    to their own block and layer. (A forward hook would not run after a `KeyboardInterrupt`.)
    """

    def __init__(self, block: nn.Module, layer: nn.Module) -> None:
        self._block = block
        self._before = block.__dict__.get("forward")
        self._forward = functools.update_wrapper(functools.partial(_recorded, layer, block.forward), block.forward)
        block.forward = self._forward

    def stop(self) -> None:
        """Restore the block's forward, unless it has been replaced again since."""
        if self._block.__dict__.get("forward") is not self._forward:
            return
        del self._block.forward
        if self._before is not None:
            self._block.forward = self._before
