"""The head edit of the attention output z (B, H, T, E), by the op and in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import in_transform, needs_grad
from ..head_edit import reference
from ..head_edit.function import head_edit
from .problem import Edits


def apply(z: Tensor, edits: Edits) -> Tensor:
    """Edits z, in place if no gradient is needed."""
    m, a, g_m, g_a = edits
    if m is None and a is None:
        return z
    inplace = not (needs_grad((z, *edits)) or in_transform() or torch.compiler.is_compiling())
    return head_edit(z, m, a, g_m, g_a, head_axis=1, inplace=inplace)


def forward(z: Tensor, edits: Edits) -> Tensor:
    """The edit in plain torch."""
    return reference.forward(z, *_broadcast(edits))


def scale(edits: Edits) -> Tensor | None:
    """1 + g_m m, broadcastable against z; None without m."""
    m, _, g_m, _ = _broadcast(edits)
    return reference.scale(m, g_m)


def _broadcast(edits: Edits) -> Edits:
    m, a, g_m, g_a = edits
    m, a = (t if t is None else t[:, None, :] for t in (m, a))
    g_m, g_a = (t if t is None else t[:, None, None] for t in (g_m, g_a))
    return m, a, g_m, g_a
