"""Curvature Tuning and JoLA: fused activations with tunable curvature, gated MLPs, and edits of attention heads."""

import torch

if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"ctkernels needs torch 2.11 or newer, got {torch.__version__}")

from . import layers
from .functional import attention_head_edit, ctu, ctu_and_mul, expected_l0, hard_concrete, head_edit
from .ops.backends import use_backend
from .ops.explain import explain

__all__ = [
    "attention_head_edit",
    "ctu",
    "ctu_and_mul",
    "expected_l0",
    "explain",
    "hard_concrete",
    "head_edit",
    "layers",
    "use_backend",
]
