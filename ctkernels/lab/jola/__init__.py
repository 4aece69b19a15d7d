"""The JoLA paper's protocol: a few examples, several ways to adapt a language model, one budget for all.

What it needs beyond torch is in the extra ``ctkernels[lab]``.
"""

from .compare import compare_methods
from .language_models import load_language_model
from .methods import METHODS, Method
from .reporting import gate_frames, restored, save_report
from .result import Cell, MethodComparison
from .scoring import Answering
from .texts import Draw, Example, TextData, draw, read_texts
from .wordnet import wordnet_nouns

__all__ = [
    "METHODS",
    "Answering",
    "Cell",
    "Draw",
    "Example",
    "Method",
    "MethodComparison",
    "TextData",
    "compare_methods",
    "draw",
    "gate_frames",
    "load_language_model",
    "read_texts",
    "restored",
    "save_report",
    "wordnet_nouns",
]
