"""Runs the Triton backend's own launch code on CPU tensors, without a GPU.

Every launch is compiled ahead of time with the types, alignments and constants that Triton derives from its arguments, and
the PTX is executed on the CPU, checking bounds, races and uninitialised memory. Needs Triton.
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
# These kernels read the results of earlier kernels.
FOLLOWING = ("reduce_partials_kernel", "reduce_shared_kernel")


class Recorder(recorder.Recorder):
    """Replaces :func:`ctkernels.ops.launcher.launch`. The detail of a launch is the compiled kernel."""

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
        """Execute a compiled kernel with its arguments' values, and 0 for the arguments that Triton adds."""
        text = self.rewrite(found.asm["ptx"])
        (entry,) = parse(text).entries
        args = [*values.values()]
        args += [0] * (len(parse(text).functions[entry].params) - len(args))
        block = (32 * found.metadata.num_warps,)
        self.run(Launch(text, entry, (grid,), block, found.metadata.shared, args), unwritten, readonly)


@contextmanager
def triton_on_cpu(recorder: Recorder) -> Iterator[Recorder]:
    """Route every op through its Triton host code, and the kernels through ``recorder``."""
    implementation.cache_clear()  # plans made with other partitions, where a test patches them
    with mock.patch.object(launcher, "launch", recorder), through_kernels(implementation):
        yield recorder
