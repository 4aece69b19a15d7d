"""Max pooling of a batch of images, for compiled training steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .op import FORWARD


def max_pool2d(x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Tensor:
    """``torch.nn.functional.max_pool2d`` of (batch, channels, height, width), opaque to the compiler. Sizes: ints or pairs."""
    return FORWARD(x, *(_pair(size) for size in (kernel_size, stride, padding, dilation)), ceil_mode)[0]


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
