"""Runs the attention kernels' own launch code on CPU tensors: see :mod:`triton_recorder`. Only where Triton is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton_recorder
from ptx import Memory
from recorder import Launched
from roofline.ahead_of_time import compiled
from torch import Tensor

from ctkernels.ops import launcher
from ctkernels.ops.attention import cost_model, function, op
from ctkernels.ops.attention.triton import launch as triton_launch

WRITES = {
    "forward_kernel": ("y", "z", "lse"),
    "split_kernel": ("part", "part_max", "part_sum"),
    "join_kernel": ("y", "z", "lse"),
    "prepare_kernel": ("dz", "delta", "partial"),
    "edit_kernel": ("dm", "da", "dg_m", "dg_a"),
    "keys_kernel": ("dk", "dv"),
    "queries_kernel": ("dq",),
}


class Recorder(triton_recorder.Recorder):
    """Replaces ``launcher.launch``. The detail of a launch is its arguments."""

    def __call__(self, kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> None:
        found, values = compiled(kernel, args, meta, self.sm)
        name = kernel.__name__
        self.launches.append(Launched(name, grid, None, args))
        tensors = {n: t for n, t in values.items() if isinstance(t, Tensor)}
        outputs = {n: t for n, t in tensors.items() if n in WRITES[name]}
        self.memory = Memory()
        inputs = [t for n, t in tensors.items() if n not in outputs]
        self.run_compiled(found, grid, values, outputs.values(), inputs)
        for n, t in outputs.items():
            partly = n == "partial" and args["z"] is None  # the sums that need z
            assert partly or self.memory.written(t).all(), f"{name} leaves part of {n} unwritten"


@contextmanager
def fused_on_cpu(recorder: Recorder) -> Iterator[Recorder]:
    """Route attention_head_edit through its Triton launch code, and the kernels through ``recorder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "launch", recorder)
        patch.setattr(op, "kernels", lambda q: triton_launch)
        patch.setattr(function, "_EAGER", lambda *args: NotImplemented)
        patch.setattr(function, "choose", lambda *args: cost_model.FUSED)
        yield recorder
