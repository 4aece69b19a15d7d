"""A backend's own host code, run on CPU tensors without a GPU: what the recorders of the toolchains have in common.

A recorder stands in for what launches kernels, has the PTX of each made for the GPU it is told, and executes it on the CPU,
with bounds, races and uninitialised memory checked.
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
)  # words of kernels' names; one may have two


@contextmanager
def through_kernels(kernels: Callable[[Op], Kernels]) -> Iterator[None]:
    """Every op's calls go through ``kernels(op)``, also those of eager CPU tensors that would go to the compiled code directly:
    they do not where a backend is forced."""
    forced = nullcontext() if backends.NATIVE is None else ctkernels.use_backend("cpu")
    with forced, mock.patch.object(Op, "kernels", kernels):
        yield


class Launched(NamedTuple):
    """``sums``: the mask of the sums to make, where a kernel makes sums. ``detail``: what the toolchain knows of it."""

    kernel: str
    grid: int
    sums: int | None
    detail: Any

    @property
    def role(self) -> str:
        """What the kernel is for, whatever else the backend's name of it says."""
        return next(role for role in ROLES if role in self.kernel)


class Recorder:
    """``launches`` keeps what was launched. ``approx``: the end of their error at which approximate units work. ``rewrite``:
    changes the PTX before it is run."""

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
        """Of the launches, in order."""
        return [launched.role for launched in self.launches]

    def run(self, launch: Launch, unwritten: Iterable[Any] = (), readonly: Iterable[Any] = ()) -> None:
        """Executes a launch in this recorder's memory."""
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
    """``triton`` or ``cuda``: called, it makes a context in which every op goes through that backend's host code and kernels."""

    name: str

    @property
    def missing(self) -> str:
        """Why there is none here, or ""."""
        if self.name == "triton":
            return "" if has_triton() else "triton is not installed"
        if nvcc() is None:
            return "nvcc is not installed"
        built = backends.CUDA_BINDING.exists()
        return "" if built else "the host code of the CUDA kernels is not built (CTKERNELS_BUILD=none)"

    def __call__(self, sm: int = 80, approx: int = 0, **options: Any) -> AbstractContextManager[Recorder]:
        module = importlib.import_module(f"{self.name}_recorder")
        return getattr(module, f"{self.name}_on_cpu")(module.Recorder(sm, approx, **options))
