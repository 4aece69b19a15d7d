"""Max pooling in compiled training steps, by torch's own kernels.

On the CPU the compiler writes the backward pass of a pooling itself, and what it writes takes several times as long
(docs/fusion.md). Here it is an op, ``ctkernels::max_pool2d``, that calls what eager code calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.record import _LIBRARY


class Pooling:
    """Stands in a max pooling's ``__dict__`` as its ``forward``."""

    def __init__(self, module: nn.MaxPool2d) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Any:
        m = self.module
        recorded = torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad
        if not recorded or torch.compiler.is_exporting() or not x.is_cpu or x.dim() != 4 or m.return_indices:
            return type(m).forward(m, x)
        sizes = (_pair(size) for size in (m.kernel_size, m.stride, m.padding, m.dilation))
        return torch.ops.ctkernels.max_pool2d(x, *sizes, m.ceil_mode)[0]


def poolings(model: nn.Module) -> dict[nn.Module, Pooling]:
    """For every max pooling in ``model`` whose forward is torch's."""
    found = (m for m in model.modules() if isinstance(m, nn.MaxPool2d) and "forward" not in vars(m))
    return {m: Pooling(m) for m in found if type(m).forward is nn.MaxPool2d.forward}


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


# ---- the op ------------------------------------------------------------------------------------------------------------

_SIZES = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
_TAGS = [torch.Tag.pt2_compliant_tag]
_LIBRARY.define(f"max_pool2d(Tensor x, {_SIZES}) -> (Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    f"max_pool2d_backward(Tensor dy, Tensor indices, SymInt[] shape, bool channels_last, {_SIZES}) -> Tensor",
    tags=_TAGS,
)


def _forward(x: Tensor, *sizes: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.max_pool2d_with_indices.default(x, *sizes)


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _backward(dy: Tensor, indices: Tensor, shape: Sequence[int], channels_last: bool, *sizes: Any) -> Tensor:
    x = torch.empty(
        shape, dtype=dy.dtype, device=dy.device, memory_format=_layout(channels_last)
    )  # asked for its strides
    return torch.ops.aten.max_pool2d_with_indices_backward.default(dy, x, *sizes, indices)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.sizes = inputs
    ctx.shape, ctx.channels_last = x.shape, x.is_contiguous(memory_format=torch.channels_last)
    ctx.save_for_backward(output[1])


def _first_order(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    dx = torch.ops.ctkernels.max_pool2d_backward(dy, *ctx.saved_tensors, ctx.shape, ctx.channels_last, *ctx.sizes)
    return (dx, *[None] * len(ctx.sizes))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.others = len(inputs) - 1


def _second_order(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    ddy = ddx.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)
    return (ddy, *[None] * ctx.others)


for _name, _kernel, _derivative, _context in (
    ("max_pool2d", _forward, _first_order, _save),
    ("max_pool2d_backward", _backward, _second_order, _save_backward),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ctkernels::{_name}", _kernel, lib=_LIBRARY)
    torch.library.register_autograd(f"ctkernels::{_name}", _derivative, setup_context=_context, lib=_LIBRARY)
