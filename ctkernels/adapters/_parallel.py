"""Tensor parallelism: the part of an adapter's tensor that belongs to a rank, with gradients that stay equal on all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Slice(torch.autograd.Function):
    """A rank's slice of a replicated tensor; backward gathers the full gradient on every rank."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, start: int, length: int, dim: int, group: Any) -> Tensor:
        ctx.slice = (start, length, dim, group, value.shape)
        return value.narrow(dim, start, length).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        start, length, dim, group, shape = ctx.slice
        full = grad.new_zeros(shape)
        full.narrow(dim, start, length).copy_(grad)
        dist.all_reduce(full, group=group)
        return full, None, None, None, None


def local_slice(value: Tensor, start: int, length: int, dim: int, group: Any) -> Tensor:
    """The part of `value`, the same on every rank of `group`, that begins at `start`."""
    return _Slice.apply(value, start, length, dim, group)


def mesh_around(module: nn.Module) -> Any:
    """The one-dimensional mesh over which a weight inside `module` is sharded; None without one."""
    meshes = (getattr(parameter, "device_mesh", None) for parameter in module.parameters())
    return next((mesh for mesh in meshes if mesh is not None and mesh.ndim == 1), None)
