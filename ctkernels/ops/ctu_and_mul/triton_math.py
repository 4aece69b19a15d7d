"""The CT unit's scalar Triton functions; the skeleton multiplies by ``up``. Imported only if Triton is installed."""

from dataclasses import replace

from ..ctu.triton_math import MATH as UNIT

MATH = replace(UNIT, name="ctu_and_mul", prologue=False, factor=True)
