"""Weights in the order in which the CPU's convolution reads them, put there once instead of at every call.

The operators are those that torch's own compiler uses for frozen weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _supported(dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def can_pack(source: Any, x: Tensor) -> bool:
    """Whether ``source(x)`` is a convolution that has a packed form."""
    if not isinstance(source, nn.Conv2d) or source.padding_mode != "zeros" or isinstance(source.padding, str):
        return False
    if not x.is_cpu or x.dim() != 4 or x.numel() == 0:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled) and _supported(x.dtype)


def pack(source: Any, x: Tensor, weight: Tensor) -> Tensor:
    """``weight`` of ``source``, for inputs like ``x`` (and correct for others)."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, source.padding, source.stride, source.dilation, source.groups, list(x.shape)
    )


def call(source: Any, x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """``source(x)`` with a packed weight."""
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, source.padding, source.stride, source.dilation, source.groups, "none", [], None
    )
