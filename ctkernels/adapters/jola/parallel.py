"""Tensor parallelism: the heads of a rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._parallel import local_slice


def first_head(layer: Any, count: int, heads: int) -> tuple[int, Any]:
    """The first of this rank's `count` heads, out of `heads`, and the tensor-parallel process group.

    Raises:
        ValueError: the projection is not sharded that way.
    """
    base = layer.get_base_layer()
    mesh = getattr(getattr(base, "weight", None), "device_mesh", None) or getattr(base, "_hf_device_mesh", None)
    if mesh is None or mesh.ndim != 1 or mesh.size() * count != heads:
        raise ValueError(
            f"{layer.site}: expected an input of {heads} heads, got {count}, and the projection is not split over "
            "ranks accordingly"
        )
    return mesh.get_local_rank() * count, mesh.get_group()


def local_heads(value: Tensor, layer: Any, count: int, dim: int) -> Tensor:
    """The part of `value` that belongs to this rank's heads.

    Args:
        value: a tensor with all heads along `dim`, the same on every rank.
        layer: the `JolaLayer`, whose projection has a device mesh (a DTensor weight, or transformers' plan).
        count: heads on this rank.
        dim: the head dimension.

    Raises:
        ValueError: the input has fewer heads than the layer, but the projection is not sharded that way.
    """
    start, group = first_head(layer, count, value.shape[dim])
    return local_slice(value, start, count, dim, group)
