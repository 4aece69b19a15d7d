"""Broadcasting of per-channel parameters, and strides of results.

A parameter is 0-d or of size 1 (shared), of size C (one value per index of ``channel_dim``), of a size that divides C (one
value per run of channels: the gate of a head), or 2-D with such rows: index g of dimension 0 of the tensor uses row
g modulo the number of rows (per-sample and per-head parameters, and vmapped ones).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NO_CHANNEL = -1


def broadcast(param: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """``param`` on x's device, with dimensions that broadcast against ``x``."""
    shape = [1] * x.dim()
    count = param.shape[-1] if param.dim() else 1
    if channel_dim != NO_CHANNEL and count != 1:
        channels = x.shape[channel_dim]
        if count != channels:
            param = param.repeat_interleave(channels // count, -1)
        shape[channel_dim] = channels
    if param.dim() == 2:
        if param.shape[0] not in (1, x.shape[0]):
            param = param.repeat(x.shape[0] // param.shape[0], 1)
        shape[0] = param.shape[0]
    return param.reshape(shape).to(x.device)


def reduce(values: Tensor, param: Tensor, channel_dim: int) -> Tensor:
    """The adjoint of :func:`broadcast`: elementwise ``values`` summed to ``param``'s shape and dtype."""
    count = param.shape[-1] if param.dim() else 1
    rows = param.shape[0] if param.dim() == 2 else 1
    kept, run = [], 1
    if rows != 1:
        kept.append(0)
    if channel_dim != NO_CHANNEL and count != 1:
        kept.append(channel_dim)
        run = values.shape[channel_dim] // max(count, 1)
    dims = [d for d in range(values.dim()) if d not in kept]
    total = values.sum(dims) if dims else values
    total = total.reshape(values.shape[0] // max(rows, 1) if rows != 1 else 1, rows, count, run)
    return total.sum((0, 3)).reshape(param.shape).to(param.dtype)


def halves(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """The first and the second half of a packed tensor's channels."""
    channels = x.shape[channel_dim] // 2
    return x.narrow(channel_dim, 0, channels), x.narrow(channel_dim, channels, channels)


def result_like(x: Tensor) -> Tensor:
    """An uninitialised result for ``x``: with its strides if ``x`` is dense, contiguous if it is not, or is empty.

    Compilers rely on every result and every elementwise gradient having these strides: the fakes promise them.
    ``result_like`` in csrc/binding.h does the same for compiled kernels."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    # In dimensions of size 1, views of fake tensors have other strides than views of real ones.
    sized = [(n, s) for n, s in zip(x.shape, x.stride()) if not (isinstance(n, int) and n == 1)]
    dense = torch._prims_common._is_non_overlapping_and_dense_or_false([n for n, _ in sized], [s for _, s in sized])
    if guard_or_false(x.numel() == 0) or not dense:
        return x.new_empty(x.shape)
    return x.new_empty_strided(x.shape, x.stride())


def parameter_like(param: Tensor) -> Tensor:
    """An uninitialised, contiguous gradient of a parameter."""
    return param.new_empty(param.shape)


def conform(value: Tensor, x: Tensor) -> Tensor:
    """``value`` with the strides of :func:`result_like` (``x``)."""
    out = result_like(x)
    same = all(a == b or size == 1 for size, a, b in zip(x.shape, value.stride(), out.stride()))
    return value if same else out.copy_(value)


def merge_vmapped(
    tensors: tuple[Tensor | None, ...],
    dims: tuple[int | None, ...],
    size: int,
    elementwise: tuple[bool, ...],
    per_sample: bool,
) -> tuple[list[Tensor | None], bool, int]:
    """Turns a vmapped call into one larger call: (tensors, whether the batch became groups, inner groups).

    If no parameter is batched, the batch is one more leading dimension of the elementwise tensors. If one is, or with
    ``per_sample`` (for per-sample parameter gradients), every sample gets its own row of parameters.
    """
    params_batched = any(d is not None for d, e in zip(dims, elementwise) if not e)
    params = [t for t, e in zip(tensors, elementwise) if not e and t is not None]
    inner = max((_rows(t, d) for t, d, e in zip(tensors, dims, elementwise) if not e and t is not None), default=0)
    grouped = len(params) > 0 and (per_sample or params_batched or inner > 0)
    out: list[Tensor | None] = []
    for t, d, e in zip(tensors, dims, elementwise):
        if t is None:
            out.append(None)
            continue
        t = t.movedim(d, 0) if d is not None else t.unsqueeze(0).expand(size, *t.shape)
        if e:
            out.append(t.flatten(0, 1) if grouped and inner else t)
        elif not grouped:
            out.append(t.select(0, 0))
        else:
            row = t.reshape(size, 1, -1) if t.dim() < 3 else t
            out.append(row.expand(size, max(inner, 1), row.shape[-1]).reshape(size * max(inner, 1), row.shape[-1]))
    return out, grouped, inner


def _rows(t: Tensor, batch_dim: int | None) -> int:
    """Rows of a 2-D (per-sample) parameter; 0 for others."""
    dim = t.dim() - (batch_dim is not None)
    if dim < 2:
        return 0
    shape = list(t.shape)
    if batch_dim is not None:
        del shape[batch_dim]
    return shape[0]


class View(NamedTuple):
    """A dense tensor in memory order, (groups, outer, channels, inner), as in csrc/layout.h. Each group may have its own row of
    parameters; ``inner`` counts neighbouring values of one channel. packed: rows of channels * inner values alternate with rows
    of the factor."""

    groups: int
    outer: int
    channels: int
    inner: int
    packed: bool = False


def view_of(x: Tensor, channel_dim: int, per_group: bool) -> View | None:
    """The view of ``x``; None if ``x`` must be copied first. ``per_group``: dimension 0 is the group."""
    groups = x.shape[0] if per_group else 1
    channels = x.shape[channel_dim] if channel_dim != NO_CHANNEL else 1
    if x.numel() == 0:
        return View(groups, 0, channels, 1)
    order = sorted((d for d in range(x.dim()) if x.shape[d] != 1), key=x.stride, reverse=True)
    expected = 1
    for d in reversed(order):
        if x.stride(d) != expected:
            return None
        expected *= x.shape[d]
    if per_group and groups != 1:
        if order[0] != 0:
            return None  # the group must be outermost
        order = order[1:]
    at = order.index(channel_dim) if channel_dim in order else None
    if at is None:
        return View(groups, 1, channels, math.prod(x.shape[d] for d in order))
    before, after = (math.prod(x.shape[d] for d in part) for part in (order[:at], order[at + 1 :]))
    return View(groups, before, channels, after)


def packed_view_of(x: Tensor, channel_dim: int, shared: bool, per_group: bool) -> View:
    """The view of the first half of the contiguous ``x``'s channels. ``shared``: all channels share their parameters."""
    view = view_of(x, channel_dim, per_group)
    assert view is not None
    channels, inner = view.channels // 2, view.inner
    if shared and channels:
        channels, inner = 1, channels * inner
    return view._replace(channels=channels, inner=inner, packed=True)


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` with the strides of the dense ``x``: itself, or a copy."""
    if all(size == 1 or a == b for size, a, b in zip(x.shape, t.stride(), x.stride())):
        return t
    return x.new_empty_strided(x.shape, x.stride()).copy_(t)
