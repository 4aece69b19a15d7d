"""A frozen linear layer of edited heads, for the layers that choose it by :mod:`.cost_model`."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from .op import FORWARD
from .reference import Edits


def head_edit_linear(z: Tensor, weight: Tensor, bias: Tensor | None, edits: Edits) -> Tensor:
    """``linear(head_edit(z, *edits), weight, bias)``, with the edit computed in the weights.

    Args:
        z: (..., heads * head_dim).
        weight, bias: of z's dtype; they get no gradient.
        edits: m and a, (heads, head_dim), and their gates, (heads,); each may be None, but not both m and a.

    Differentiable in z and the edits, to any order; saves z, the weights and the edits.
    """
    return FORWARD(z, weight, bias, *(checks.widened(t) for t in edits))
