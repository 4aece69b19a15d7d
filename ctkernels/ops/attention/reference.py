"""Attention with the head edit in plain torch: visibility, textbook forward, closed-form gradients.

Shapes: q (B, H, T, D), k (B, G, S, D), v (B, G, S, E) with H a multiple of G; m, a (H, E); g_m, g_a (H,); all widened.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import edit
from .problem import Edits

UNBOUNDED = -1
LOG2E = math.log2(math.e)


def visible(tokens: int, keys: int, left: int, right: int, device: torch.device) -> Tensor | None:
    """(tokens, keys) booleans: query i is at position p = i + keys - tokens and sees keys p - left to p + right."""
    if left == UNBOUNDED and right == UNBOUNDED:
        return None
    distance = torch.arange(keys, device=device) - torch.arange(tokens, device=device)[:, None] - (keys - tokens)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if right != UNBOUNDED:
        seen = seen & (distance <= right)
    if left != UNBOUNDED:
        seen = seen & (distance >= -left)
    return seen


def combine(mask: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """Combines a user's mask (True or 0: takes part) with the result of :func:`visible`; keeps the mask's kind."""
    if mask is None or seen is None:
        return seen if mask is None else mask
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def repeat_heads(t: Tensor, heads: int) -> Tensor:
    """Repeats key or value heads for the query heads that share them."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    s = scale * (q @ repeat_heads(k, q.shape[1]).mT)
    if mask is None:
        return s
    return s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(softmax(scale q k') v, log2 of the sum of exponentials). A query that sees no key gives 0 and +inf."""
    weights, lse = _weights(scores(q, k, mask, scale))
    return weights @ repeat_heads(v, q.shape[1]), lse * LOG2E


def _weights(s: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(s) and logsumexp(s). softmax is not e^(s - lse), whose exponent would carry the rounding of a large lse."""
    no_keys = (s == -math.inf).all(-1, keepdim=True)
    seen = s.masked_fill(no_keys, 0.0)
    return seen.softmax(-1).masked_fill(no_keys, 0.0), seen.logsumexp(-1).masked_fill(no_keys[..., 0], math.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, edits: Edits, mask: Tensor | None, scale: float) -> Tensor:
    return edit.forward(attention(q, k, v, mask, scale)[0], edits)


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, edits: Edits, mask: Tensor | None, scale: float
) -> list[Tensor | None]:
    """Gradients of q, k, v, m, a, g_m, g_a, from the inputs alone; None for absent ones. Differentiable."""
    heads, groups = q.shape[1], k.shape[1]
    weights, _ = _weights(scores(q, k, mask, scale))
    z = weights @ repeat_heads(v, heads)
    m, a, g_m, g_a = edits
    p = edit.scale(edits)
    s1, s0 = (dy * z).sum((0, 2)), dy.sum((0, 2))
    dz = dy if p is None else dy * p
    ds = weights * (dz @ repeat_heads(v, heads).mT - (dz * z).sum(-1, keepdim=True)) * scale

    def per_group(t: Tensor) -> Tensor:
        return t.unflatten(1, (groups, heads // groups)).sum(2)

    return [
        ds @ repeat_heads(k, heads),
        per_group(ds.mT @ q),
        per_group(weights.mT @ dz),
        None if m is None else (s1 if g_m is None else g_m[:, None] * s1),
        None if a is None else (s0 if g_a is None else g_a[:, None] * s0),
        None if g_m is None or m is None else (m * s1).sum(-1),
        None if g_a is None or a is None else (a * s0).sum(-1),
    ]
