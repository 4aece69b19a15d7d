"""The namespace of the dispatcher ops: the file that a build for the Kernel Hub replaces (tools/kernel_hub).

The names are those of the Hub's builder, which gives every build a namespace of its own.
"""

from __future__ import annotations

import torch

ops = torch.ops.ctkernels


def add_op_namespace_prefix(op_name: str) -> str:
    """As in ``"ctkernels::ctu"``."""
    return f"{ops.name}::{op_name}"
