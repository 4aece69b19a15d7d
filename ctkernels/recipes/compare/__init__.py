"""The transfer comparison of the Curvature Tuning paper: linear probe, S-CT, LoRA, T-CT, and T-CT with LoRA.

Beyond torch it needs what is in ``ctkernels[recipes,adapters]``.
"""

from .heads import Budget
from .inputs import ImageOptions
from .protocol import DEFAULT_METHODS, compare_transfer
from .result import Cell, TransferComparison, read_comparison

__all__ = [
    "DEFAULT_METHODS",
    "Budget",
    "Cell",
    "ImageOptions",
    "TransferComparison",
    "compare_transfer",
    "read_comparison",
]
