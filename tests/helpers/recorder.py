"""The common part of the toolchains' recorders, which run a backend's host code on CPU tensors without a GPU.

A recorder replaces the launcher, has the PTX of each kernel compiled for a given GPU, and executes it on the CPU, checking
bounds, races and uninitialised memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from ptx import Memory
from ptx.launch import Launch, execute
from ptx.runner import MAX_STEPS
from ptx.toolchain import has_triton, nvcc

import ctkernels
from ctkernels.ops import backends
from ctkernels.ops.record import Kernels, Op

ROLES = (
    "reduce_partials",
    "reduce_shared",
    "precompute",
    "backward",
    "forward",
)  # words in kernel names; a name can contain two


@contextmanager
def through_kernels(kernels: Callable[[Op], Kernels]) -> Iterator[None]:
    """Route every op's calls through ``kernels(op)``. Forcing a backend keeps eager CPU calls from the direct native path."""
    forced = nullcontext() if backends.NATIVE is None else ctkernels.use_backend("cpu")
    with forced, mock.patch.object(Op, "kernels", kernels):
        yield


class Launched(NamedTuple):
    """A launch. ``sums``: the mask of the sums that a kernel computes, if any. ``detail``: toolchain-specific information."""

    kernel: str
    grid: int
    sums: int | None
    detail: Any

    @property
    def role(self) -> str:
        """The role of the kernel, from its name."""
        return next(role for role in ROLES if role in self.kernel)


class Recorder:
    """Records ``launches``. ``approx``: error of approximate instructions, in units of their documented bound. ``rewrite``: a
    function that changes the PTX before execution."""

    def __init__(
        self,
        sm: int = 80,
        approx: int = 0,
        races: bool = True,
        rewrite: Callable[[str], str] = str,
        max_steps: int = MAX_STEPS,
    ):
        self.sm, self.approx, self.races, self.rewrite, self.max_steps = sm, approx, races, rewrite, max_steps
        self.launches: list[Launched] = []
        self.memory = Memory()

    @property
    def roles(self) -> list[str]:
        """The roles of the launches, in order."""
        return [launched.role for launched in self.launches]

    def run(self, launch: Launch, unwritten: Iterable[Any] = (), readonly: Iterable[Any] = ()) -> None:
        """Execute a launch in this recorder's memory."""
        execute(
            [launch],
            memory=self.memory,
            unwritten=unwritten,
            readonly=readonly,
            races=self.races,
            approx=self.approx,
            max_steps=self.max_steps,
        )


@dataclass(frozen=True)
class Toolchain:
    """``triton`` or ``cuda``: a call returns a context in which every op uses that backend's host code and kernels."""

    name: str

    @property
    def missing(self) -> str:
        """The reason why the toolchain is not available, or ""."""
        if self.name == "triton":
            return "" if has_triton() else "triton is not installed"
        if nvcc() is None:
            return "nvcc is not installed"
        built = backends.CUDA_BINDING.exists()
        return "" if built else "the host code of the CUDA kernels is not built (CTKERNELS_BUILD=none)"

    def __call__(self, sm: int = 80, approx: int = 0, **options: Any) -> AbstractContextManager[Recorder]:
        module = importlib.import_module(f"{self.name}_recorder")
        return getattr(module, f"{self.name}_on_cpu")(module.Recorder(sm, approx, **options))
