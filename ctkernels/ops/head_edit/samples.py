"""Calls of `head_edit` that together cover every code path."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..sample import Sample
from .function import head_edit


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """Calls of :func:`ctkernels.functional.head_edit` that together cover every code path."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def data(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, wide)

    heads, dim = 3, 5
    layouts = {
        "(B, T, H D)": (data(2, 3, heads * dim), {}),
        "(T, H D)": (data(4, heads * dim), {}),
        "(H D)": (data(heads * dim), {}),
        "(B, T, H, D)": (data(2, 3, heads, dim), {}),
        "(B, H, T, D)": (data(2, heads, 3, dim), {"head_axis": 1}),
        "(B, H, T, D), one token": (data(2, heads, 1, dim), {"head_axis": 1}),
        "(B, H, T, D) over (B, T, H, D) in memory": (data(2, 3, heads, dim).transpose(1, 2), {"head_axis": 1}),
        "(B, H, T, D), sliced": (data(2, heads, 6, dim)[:, :, ::2], {"head_axis": 1}),
        "heads first": (data(heads, 4, dim), {"head_axis": 0}),
        "sliced": (data(2, 3, 2 * heads * dim)[..., : heads * dim], {}),
        "no tokens": (data(2, 0, heads * dim), {}),
    }
    for name, (z, kwargs) in layouts.items():
        edits = [parameter(heads, dim) for _ in range(2)]
        gates = [parameter(heads) for _ in range(2)]
        yield Sample(f"head edit {name}", head_edit, (z, *edits, *gates), kwargs)
    z, m, a, g = data(2, 3, heads * dim), parameter(heads, dim), parameter(heads, dim), parameter(heads)
    yield Sample("head edit, scale only", head_edit, (z, m, None, g))
    yield Sample("head edit, offset only", head_edit, (z, None, a))
    yield Sample("head edit, one head", head_edit, (data(2, 4), parameter(1, 4), parameter(1, 4)))
    adapters = [parameter(4, heads, dim), parameter(4, heads, dim), parameter(4, heads), parameter(4, heads)]
    index = torch.tensor([3, 1], device=device)
    yield Sample("head edit per sample", head_edit, (z, *adapters), {"index": index})
    yield Sample("head edit per sample, (B, H, T, D)", head_edit, (data(2, heads, 2, dim), *adapters),
                 {"index": index, "head_axis": 1})  # fmt: skip
