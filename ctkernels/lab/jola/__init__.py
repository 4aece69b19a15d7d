"""The JoLA paper's protocol: a few examples, several ways to adapt a language model, one budget for all.

What it needs beyond torch is in the extra ``ctkernels[lab]``.
"""

from ..experiment import Method
from .compare import compare_methods
from .config import Answering, MethodsConfig, TrainingConfig
from .language_models import load_language_model
from .methods import METHODS
from .reporting import gate_frames, restored, save_report
from .result import MethodComparison, RunResult
from .texts import Example, Split, TextData, draw, read_texts

__all__ = [
    "METHODS",
    "Answering",
    "Example",
    "Method",
    "MethodComparison",
    "MethodsConfig",
    "RunResult",
    "Split",
    "TextData",
    "TrainingConfig",
    "compare_methods",
    "draw",
    "gate_frames",
    "load_language_model",
    "read_texts",
    "restored",
    "save_report",
]
