"""The transfer comparison of the Curvature Tuning paper: linear probe, S-CT, LoRA, T-CT, and T-CT with LoRA.

Beyond torch it needs what is in ``ctkernels[recipes,adapters]``.
"""

from .result import Cell, TransferComparison, read_comparison

__all__ = ["Cell", "TransferComparison", "read_comparison"]
