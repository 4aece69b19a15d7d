"""Runs the Triton backend's own launch code on CPU tensors, without a GPU.

Every launch is compiled ahead of time with exactly the types, alignments and constants that Triton derives from its
arguments, and the PTX is executed by the CPU, with bounds, races and uninitialised memory checked. Import only where
Triton is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import recorder
from ptx import Memory, parse
from ptx.launch import Launch
from recorder import Launched, through_kernels
from roofline.ahead_of_time import compiled
from torch import Tensor

from ctkernels.ops import launcher
from ctkernels.ops.channelwise.launch import implementation

OUTPUTS = {"out", "dresidual", "dfactor", "dnoise", "d0", "d1", "d2", "d3", "d4"}
SCRATCH = {"partial", "b0", "b1", "b2", "b3", "b4"}
# What these kernels read is what the ones before them wrote.
FOLLOWING = ("reduce_partials_kernel", "reduce_shared_kernel")


class Recorder(recorder.Recorder):
    """Stands in for :func:`ctkernels.ops.launcher.launch`. The detail of a launch is the compiled kernel."""

    def __call__(self, kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> None:
        found, values = compiled(kernel, args, meta, self.sm)
        self.launches.append(Launched(found.metadata.name, grid, meta.get("SUM_MASK"), found))
        if kernel.__name__ not in FOLLOWING:
            self.memory = Memory()
        tensors = {name: t for name, t in values.items() if isinstance(t, Tensor)}
        in_place = tensors.get("out") is tensors.get("x")
        outputs = [t for name, t in tensors.items() if name in OUTPUTS and not (name == "out" and in_place)]
        scratch = [t for name, t in tensors.items() if name == "partial" and kernel.__name__ not in FOLLOWING]
        given = [t for name, t in tensors.items() if name not in OUTPUTS | SCRATCH]
        inputs = [t for t in given if not (t is tensors.get("x") and in_place)]
        self.run_compiled(found, grid, values, outputs + scratch, inputs)
        for t in outputs:
            assert self.memory.written(t).all(), f"{kernel.__name__} leaves part of an output unwritten"

    def run_compiled(
        self, found: Any, grid: int, values: dict[str, Any], unwritten: Iterable[Tensor], readonly: Iterable[Tensor]
    ) -> None:
        """Executes a compiled kernel with the values of its arguments, and 0 for those that Triton adds."""
        text = self.rewrite(found.asm["ptx"])
        (entry,) = parse(text).entries
        args = [*values.values()]
        args += [0] * (len(parse(text).functions[entry].params) - len(args))
        block = (32 * found.metadata.num_warps,)
        self.run(Launch(text, entry, (grid,), block, found.metadata.shared, args), unwritten, readonly)


@contextmanager
def triton_on_cpu(recorder: Recorder) -> Iterator[Recorder]:
    """Every op goes through its Triton host code, and its kernels through ``recorder``."""
    with mock.patch.object(launcher, "launch", recorder), through_kernels(implementation):
        yield recorder
