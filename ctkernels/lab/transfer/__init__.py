"""The transfer comparison of the Curvature Tuning paper: linear probe, S-CT, LoRA, T-CT, and T-CT with LoRA."""

from .compare import DEFAULT_METHODS, compare_transfer
from .config import ImageOptions, TrainingConfig, TransferConfig
from .result import RunResult, TransferComparison
from .tune import TuneConfig, load_tuned, stages, tune_curvature

__all__ = [
    "DEFAULT_METHODS",
    "ImageOptions",
    "RunResult",
    "TrainingConfig",
    "TransferComparison",
    "TransferConfig",
    "TuneConfig",
    "compare_transfer",
    "load_tuned",
    "stages",
    "tune_curvature",
]
