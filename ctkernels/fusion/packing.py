"""Weights in the order in which the CPU's convolution reads them, put there once instead of at every call.

The operators are those that torch's own compiler uses for frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _supported(dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def can_pack(x: Tensor) -> bool:
    """Whether a convolution over ``x`` has a packed form."""
    if not x.is_cpu or x.dim() != 4 or x.numel() == 0:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled) and _supported(x.dtype)


def order(x: Tensor, geometry: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Of a weight: the order for inputs like ``x`` (correct for others). ``geometry``: stride, padding, dilation, groups."""
    stride, padding, dilation, groups = geometry

    def pack(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(x.shape))

    return pack


def call(x: Tensor, packed: Tensor, bias: Tensor | None, geometry: Sequence[Any]) -> Tensor:
    """The convolution with a packed weight."""
    stride, padding, dilation, groups = geometry
    return _pointwise()(x, packed, bias, padding, stride, dilation, groups, "none", [], None)


@cache
def _pointwise() -> Any:
    return torch.ops.mkldnn._convolution_pointwise.default
