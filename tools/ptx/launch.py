"""Recorded launches and their execution, one after the other, as on one stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import load
from .memory import Memory
from .program import Program
from .runner import MAX_STEPS, Run


@dataclass
class Launch:
    """What a launch path hands to the driver.

    `args`: one per parameter, as tensors (pointers, at an offset into their storage or not), ints, floats, raw bytes or
    ctypes objects; or the whole packed parameter block as bytes. Pointers inside bytes are host addresses.
    """

    ptx: str
    entry: str | None
    grid: Sequence[int]
    block: Sequence[int]
    shared: int
    args: Sequence[Any] | bytes


_PROGRAMS: dict[tuple[str, str | None], Program] = {}


def _program(launch: Launch, storages: dict[str, dict]) -> Program:
    """Decoded kernels are kept, except those with module variables, which start afresh in every sequence."""
    cached = _PROGRAMS.get((launch.ptx, launch.entry))
    if cached is not None:
        return cached
    program = load(launch.ptx, launch.entry, storages.setdefault(launch.ptx, {}))
    if not program.module.variables:
        if len(_PROGRAMS) > 256:
            _PROGRAMS.clear()
        _PROGRAMS[launch.ptx, launch.entry] = program
    return program


def execute(
    launches: Iterable[Launch],
    *,
    memory: Memory | None = None,
    buffers: Iterable[Any] = (),
    unwritten: Iterable[Any] = (),
    readonly: Iterable[Any] = (),
    races: bool = True,
    approx: int = 0,
    max_steps: int = MAX_STEPS,
) -> list[Run]:
    """Runs the launches in order; results are in the tensors.

    `buffers`, `unwritten` and `readonly` are registered first: all tensors whose addresses are hidden in structs,
    outputs and scratch that a kernel must write before it is read, and inputs no kernel may change. Tensors that appear
    as arguments register themselves. `approx` is 0, +1 or -1 (see `run`).
    """
    memory = memory or Memory()
    for group, flags in ((buffers, {}), (unwritten, {"unwritten": True}), (readonly, {"readonly": True})):
        for tensor in group:
            memory.register(tensor, **flags)
    storages: dict[str, dict] = {}
    programs: dict[tuple[str, str | None], Program] = {}
    runs = []
    for launch in launches:
        name = (launch.ptx, launch.entry)
        if name not in programs:
            programs[name] = _program(launch, storages)
        runs.append(
            Run(
                programs[name],
                launch.args,
                launch.grid,
                launch.block,
                launch.shared,
                memory=memory,
                races=races,
                approx=approx,
                max_steps=max_steps,
            ).execute()
        )
    return runs
