"""Arguments of the attention op, and allocation of its results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIFFERENTIABLE = ("q", "k", "v", "m", "a", "g_m", "g_a")
KEEP_Z, KEEP_LSE = 1, 2

Edits = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Packed(NamedTuple):
    """Packed sequences: (B + 1,) int32 boundaries, and the longest length, of queries and of keys."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


class Problem(NamedTuple):
    """A call: q (B, H, T, D), k (B, G, S, D), v (B, G, S, E), mask (B, H, T, S), any strides. With starts, packed: q (T, H, D),
    k (S, G, D), v (S, G, E). left, right: how far from its own position a query sees, or UNBOUNDED."""

    q: Tensor
    k: Tensor
    v: Tensor
    m: Tensor | None
    a: Tensor | None
    g_m: Tensor | None
    g_a: Tensor | None
    mask: Tensor | None
    starts_q: Tensor | None
    starts_k: Tensor | None
    longest_q: int
    longest_k: int
    scale: float
    left: int
    right: int

    @property
    def edits(self) -> Edits:
        return self.m, self.a, self.g_m, self.g_a

    @property
    def packed(self) -> Packed | None:
        if self.starts_q is None or self.starts_k is None:
            return None
        return Packed(self.starts_q, self.starts_k, self.longest_q, self.longest_k)


def result_for(q: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, of q's shape except the last dimension; the heads of a token are adjacent in memory."""
    if q.dim() == 3:
        return q.new_empty((*q.shape[:2], size), dtype=dtype)
    batch, heads, tokens = q.shape[:3]
    return q.new_empty((batch, tokens, heads, size), dtype=dtype).transpose(1, 2)


def lse_for(q: Tensor) -> Tensor:
    """Uninitialised (B, H, T), or (H, T) if packed."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return q.new_empty(shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def keep_for(needs_grad: list[bool]) -> int:
    """Bits of the results that the backward pass needs for these gradients, in the order of DIFFERENTIABLE."""
    inner = any(needs_grad[:3])
    return KEEP_Z * (inner or needs_grad[3] or needs_grad[5]) + KEEP_LSE * inner
