"""Portable forms of ops: torch's operations, for programs that must run without this library.

The ``portable`` module of an op's record has a function

    lower(operands, inputs, attrs) -> value

whose inputs and attributes are those of a node that calls the op. Values are floats for constants that are one number, and
proxies for other constants and for tensors of the program. A constant that switches a part off removes that part. No
intermediate of a finite result overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Value = Any  # a proxy, or a float


class Operands(Protocol):
    """The operands of a call, as values. Per-channel parameters vary along the call's channel dimension."""

    def wide(self, node: Any) -> Value:
        """An elementwise operand, in the dtype of the arithmetic."""
        ...

    def parameter(self, node: Any, name: str) -> Value:
        """A per-channel parameter."""
        ...

    def computed(
        self, function: Callable[..., tuple[Any, ...]], nodes: list[Any], names: tuple[str, ...]
    ) -> list[Value]:
        """Results of ``function`` on per-channel parameters: constants, computed in float64, if all of them are constant."""
        ...

    def fold(self, node: Any, scale: Any, shift: Any) -> bool:
        """Folds constants per channel into the weights of the layer at ``node``, if it is one that nothing else uses."""
        ...

    def halves(self, node: Any) -> tuple[Any, Any]:
        """The halves of a packed operand's channels; the first is what parameters are aligned with from then on."""
        ...


def times(value: Value, factor: Value) -> Value:
    """``value * factor``, without an operation if the factor is the number 1."""
    return value if isinstance(factor, float) and factor == 1.0 else value * factor


def plus(value: Value, offset: Value) -> Value:
    """``value + offset``, without an operation if the offset is the number 0."""
    return value if isinstance(offset, float) and offset == 0.0 else value + offset


def aligned(param: Any, shape: torch.Size, x: Tensor, channel_dim: int) -> Any:
    """:func:`ctkernels.ops.layout.broadcast` for a proxy ``param`` of ``shape``."""
    size = [1] * x.dim()
    count = int(shape[-1]) if len(shape) else 1
    if channel_dim >= 0 and count != 1:
        channels = int(x.shape[channel_dim])
        if count != channels:
            param = torch.repeat_interleave(param, channels // count, -1)
        size[channel_dim] = channels
    if len(shape) == 2 and shape[0] != 1:
        if isinstance(x.shape[0], int) and int(shape[0]) != x.shape[0]:
            param = param.repeat(x.shape[0] // int(shape[0]), 1)
        size[0] = -1
    return torch.reshape(param, size)
