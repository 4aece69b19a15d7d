"""Convolution with frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .op import FORWARD, Recorded


def frozen_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, geometry: Sequence[Any]
) -> Tensor:
    """Convolves with ``scale * weight``, differentiable in ``x`` only; saves the weights and not the input.

    Args:
        x: (batch, channels, ...), which requires a gradient.
        weight, bias, scale: frozen; ``scale`` is per output channel, or None.
        geometry: stride, padding, dilation and groups.
    """
    call = FORWARD if torch.compiler.is_compiling() else Recorded.apply
    return call(x, weight, bias, scale, *geometry)
