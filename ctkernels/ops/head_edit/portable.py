"""The portable form of the head edit, see :mod:`ctkernels.ops.portable`."""

from __future__ import annotations

from typing import Any

from ..portable import Operands, Value, plus, times
from .op import HeadEditAttrs, HeadEditInputs


def lower(operands: Operands, inputs: HeadEditInputs, attrs: HeadEditAttrs) -> Value:
    """p z + q."""
    z, *parameters = inputs
    p, q = operands.computed(factors, parameters, ("scale", "offset"))
    return plus(times(operands.wide(z), 1.0 if p is None else p), 0.0 if q is None else q)


def factors(m: Any, a: Any, g_m: Any, g_a: Any) -> tuple[Any, Any]:
    """(1 + g_m m, g_a a) of the head edit; None without m, or a."""
    p = None if m is None else 1 + (m if g_m is None else g_m * m)
    return p, a if a is None or g_a is None else g_a * a
