"""The convolution that keeps its weights and not its input for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .op import FORWARD, Recorded


def frozen_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, geometry: Sequence[Any]
) -> Tensor:
    """A convolution with ``scale * weight``, differentiable in ``x`` alone.

    Args:
        x: (batch, channels, ...), which needs a gradient.
        weight, bias, scale: without gradients; ``scale`` is per output channel, or None.
        geometry: stride, padding, dilation and groups.
    """
    call = FORWARD if torch.compiler.is_compiling() else Recorded.apply
    return call(x, weight, bias, scale, *geometry)
