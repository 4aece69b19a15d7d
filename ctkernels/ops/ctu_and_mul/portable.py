"""The portable form of a gated product, see :mod:`ctkernels.ops.portable`."""

from __future__ import annotations

from ..ctu.op import CtuAttrs
from ..ctu.portable import activated
from ..portable import Operands, Value
from .op import CtuAndMulInputs


def lower(operands: Operands, inputs: CtuAndMulInputs, attrs: CtuAttrs) -> Value:
    """The unit of the gate times ``up``."""
    gate, beta, coeff, slope, up = inputs
    if up is None:
        gate, up = operands.halves(gate)
    return activated(operands, operands.wide(gate), beta, coeff, slope, attrs) * operands.wide(up)
