"""The scalar Triton functions are those of the CT unit; the skeleton multiplies. Imported only where Triton is installed."""

from dataclasses import replace

from ..ctu.triton_math import MATH as UNIT

MATH = replace(UNIT, name="ctu_and_mul", prologue=False, factor=True)
