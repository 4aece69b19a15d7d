"""The public functions, each from its op's folder."""

from .ops.attention.function import attention_head_edit
from .ops.ctu.function import ctu
from .ops.ctu_and_mul.function import ctu_and_mul
from .ops.hard_concrete.function import expected_l0, hard_concrete
from .ops.head_edit.function import head_edit

__all__ = ["attention_head_edit", "ctu", "ctu_and_mul", "expected_l0", "hard_concrete", "head_edit"]
