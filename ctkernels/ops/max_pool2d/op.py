"""``ctkernels::max_pool2d``: torch's kernels, opaque to a compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..registration import define


def _forward(x: Tensor, *sizes: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.max_pool2d_with_indices.default(x, *sizes)


def _backward(dy: Tensor, indices: Tensor, shape: Sequence[int], channels_last: bool, *sizes: Any) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format)  # only its strides are read
    return torch.ops.aten.max_pool2d_with_indices_backward.default(dy, x, *sizes, indices)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.sizes = inputs
    ctx.shape, ctx.channels_last = x.shape, x.is_contiguous(memory_format=torch.channels_last)
    ctx.save_for_backward(output[1])


def _first_order(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    dx = BACKWARD(dy, *ctx.saved_tensors, ctx.shape, ctx.channels_last, *ctx.sizes)
    return (dx, *[None] * len(ctx.sizes))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.others = len(inputs) - 1


def _second_order(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    ddy = ddx.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)
    return (ddy, *[None] * ctx.others)


_SIZES = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
FORWARD = define(
    f"max_pool2d(Tensor x, {_SIZES}) -> (Tensor, Tensor)",
    kernel=_forward, fake=_forward, backward=_first_order, save=_save,
)  # fmt: skip
BACKWARD = define(
    f"max_pool2d_backward(Tensor dy, Tensor indices, SymInt[] shape, bool channels_last, {_SIZES}) -> Tensor",
    kernel=_backward, fake=_backward, backward=_second_order, save=_save_backward,
)  # fmt: skip
