"""The layer in plain torch, W ((1 + g_m m) z + g_a a) + b, and its gradients in closed form.

Shapes: z (..., H D), W (outputs, H D), b (outputs,); m, a (H, D); g_m, g_a (H,).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..head_edit import reference as head_edit

Edits = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
SMALLEST, LARGEST = 0.5, 16.0


def scale(m: Tensor, g_m: Tensor | None) -> Tensor:
    """1 + g_m m, (H, D)."""
    return 1 + (m if g_m is None else g_m[:, None] * m)


def bounded(p: Tensor) -> Tensor:
    """p with magnitudes in [SMALLEST, LARGEST], where a quantity can be scaled by it and divided by it again."""
    return p.abs().clamp(SMALLEST, LARGEST).copysign(p)


def forward(z: Tensor, weight: Tensor, bias: Tensor | None, edits: Edits) -> Tensor:
    m, a, g_m, g_a = edits
    heads = z.unflatten(-1, (m if a is None else a).shape)  # type: ignore[union-attr]
    g_m, g_a = (g if g is None else g[:, None] for g in (g_m, g_a))
    return F.linear(head_edit.forward(heads, m, a, g_m, g_a).flatten(-2).to(z.dtype), weight, bias)


def backward(dy: Tensor, z: Tensor, weight: Tensor, edits: Edits) -> list[Tensor | None]:
    """Gradients of z, m, a, g_m and g_a; None for absent ones. Differentiable."""
    m, a, g_m, _ = edits
    shape = (m if a is None else a).shape  # type: ignore[union-attr]
    d_edited = (dy @ weight).unflatten(-1, shape)
    rows = tuple(range(z.dim() - 1))
    s1, s0 = ((d_edited * z.unflatten(-1, shape)).sum(rows), d_edited.sum(rows)) if rows else (d_edited, d_edited)
    dz = d_edited if m is None else d_edited * scale(m, g_m)
    return [dz.flatten(-2).to(z.dtype), *parameter_gradients(s1, s0, edits)]


def parameter_gradients(s1: Tensor | None, s0: Tensor | None, edits: Edits) -> list[Tensor | None]:
    """Gradients of m, a, g_m and g_a from S1, the sum of the edited z's gradient times z over rows, and S0, that of the gradient
    alone, both (H, D); None where its sum is."""
    m, a, g_m, g_a = edits

    def gradients(
        sums: Tensor | None, vector: Tensor | None, gate: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if sums is None or vector is None:
            return None, None
        if gate is None:
            return sums, None
        return gate[:, None] * sums, (vector * sums).sum(-1)

    (dm, dg_m), (da, dg_a) = gradients(s1, m, g_m), gradients(s0, a, g_a)
    return [dm, da, dg_m, dg_a]
