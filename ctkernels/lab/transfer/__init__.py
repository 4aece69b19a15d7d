"""The transfer comparison of the Curvature Tuning paper: linear probe, S-CT, LoRA, T-CT, and T-CT with LoRA.

Beyond torch it needs what is in ``ctkernels[lab]``.
"""

from .heads import Budget
from .inputs import ImageOptions
from .protocol import DEFAULT_METHODS, compare_transfer
from .result import Cell, TransferComparison, read_comparison
from .tune import load_tuned, stages, tune_curvature

__all__ = [
    "DEFAULT_METHODS",
    "Budget",
    "Cell",
    "ImageOptions",
    "TransferComparison",
    "compare_transfer",
    "load_tuned",
    "read_comparison",
    "stages",
    "tune_curvature",
]
