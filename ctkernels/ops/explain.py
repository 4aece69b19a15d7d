"""Explains which backend serves an op."""

from __future__ import annotations

from torch import Tensor

from . import eager
from .attention import cost_model
from .backends import BACKENDS, forced
from .registration import OPS


def explain(x: Tensor, op: str = "ctu") -> str:
    """Says which backend would serve ``op`` on ``x``, and why each other one would not.

    Args:
        x: the first argument of the op.
        op: the name of an op, such as ``"ctu"``. For ``"attention_head_edit"``, x is q, and k has as many keys.

    Raises:
        ValueError: for an unknown op.

    Examples:
        >>> print(ctkernels.explain(torch.randn(8)))
        ctu on a float32 tensor of shape (8,) on cpu
        ...
    """
    known = (*OPS, "attention_head_edit")
    if op not in known:
        raise ValueError(f"explain: op must be one of {', '.join(map(repr, known))}; got {op!r}")
    if op == "attention_head_edit":
        return cost_model.explain(x)
    first, name = next(b for b in BACKENDS.values() if b.refusal(x) is None), forced()
    lines = [f"{op} on a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)} on {x.device}"]
    for backend in BACKENDS.values():
        refusal = backend.refusal(x)
        if backend is first:
            note = "used" if name in (None, backend.name) else "first choice"
        else:
            note = refusal or "could serve it, comes later"
        if backend.unproven is not None and refusal is None:
            note += f"; {backend.unproven}: compare with use_backend('reference')"
        if backend.name == name:
            note = f"forced; {refusal}" if refusal else "forced: used"
        lines.append(f"  {backend.name:<10} {note}")
    if first.name == "cpu" and name in (None, "cpu") and OPS[op].eager is not eager.NONE:
        lines.append(f"  eager calls: {eager.describe()}")
    return "\n".join(lines)
