"""Runs the Triton backend's own launch code on CPU tensors, without a GPU.

Every launch is compiled ahead of time with exactly the types, alignments and constants that Triton derives from its
arguments, and the PTX is executed by the CPU, with bounds, races and uninitialised memory checked. Import only where
Triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from ptx import Memory, parse
from ptx.launch import Launch, execute
from ptx.runner import MAX_STEPS
from roofline.ahead_of_time import compiled
from torch import Tensor

from ctkernels.ops import launcher
from ctkernels.ops.channelwise.launch import implementation
from ctkernels.ops.record import Op

OUTPUTS = {"out", "dresidual", "dnoise", "d0", "d1", "d2", "d3", "d4"}
SCRATCH = {"partial", "b0", "b1", "b2", "b3", "b4"}
# What these kernels read is what the ones before them wrote.
FOLLOWING = ("reduce_partials_kernel", "reduce_shared_kernel")


class Recorder:
    """Stands in for :func:`ctkernels.ops.launcher.launch`. ``launches`` keeps (kernel name, grid, meta, compiled).

    ``approx``: the end of their error at which approximate units work. ``rewrite``: changes the PTX before it is run.
    """

    def __init__(
        self,
        sm: int,
        approx: int = 0,
        races: bool = True,
        rewrite: Callable[[str], str] = str,
        max_steps: int = MAX_STEPS,
    ):
        self.sm, self.approx, self.races, self.rewrite, self.max_steps = sm, approx, races, rewrite, max_steps
        self.launches: list[tuple[str, int, dict[str, Any], Any]] = []
        self.memory = Memory()

    def __call__(self, kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> None:
        found, values = compiled(kernel, args, meta, self.sm)
        self.launches.append((found.metadata.name, grid, meta, found))
        if kernel.__name__ not in FOLLOWING:
            self.memory = Memory()
        tensors = {name: t for name, t in values.items() if isinstance(t, Tensor)}
        in_place = tensors.get("out") is tensors.get("x")
        outputs = [t for name, t in tensors.items() if name in OUTPUTS and not (name == "out" and in_place)]
        scratch = [t for name, t in tensors.items() if name == "partial" and kernel.__name__ not in FOLLOWING]
        inputs = [t for name, t in tensors.items() if name not in OUTPUTS | SCRATCH and not (name == "x" and in_place)]
        text = self.rewrite(found.asm["ptx"])
        (entry,) = parse(text).entries
        hidden = len(parse(text).functions[entry].params) - len(values)
        launch = Launch(
            text,
            entry,
            (grid,),
            (32 * found.metadata.num_warps,),
            found.metadata.shared,
            [*values.values(), *[0] * hidden],
        )
        execute(
            [launch],
            memory=self.memory,
            unwritten=outputs + scratch,
            readonly=inputs,
            races=self.races,
            approx=self.approx,
            max_steps=self.max_steps,
        )
        for t in outputs:
            assert self.memory.written(t).all(), f"{kernel.__name__} leaves part of an output unwritten"


@contextmanager
def triton_on_cpu(recorder: Recorder) -> Iterator[Recorder]:
    """Every op goes through its Triton host code, and its kernels through ``recorder``."""
    with mock.patch.object(launcher, "launch", recorder), mock.patch.object(Op, "kernels", implementation):
        yield recorder
