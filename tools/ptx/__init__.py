"""Executes the PTX of CUDA and Triton kernels on the CPU, and faults where a kernel is wrong.

    program = ptx.load(text, entry="my_kernel")         # parse and decode; Unsupported for anything unknown
    ptx.run(program, [x, y, n], grid, block)             # run over CPU tensors; Fault for anything wrong
    low, high = ptx.run_both(program, args, grid, block) # approximate units at both ends of their error bounds

A device address is the host address, so pointers inside structs packed by real launch code are valid; every buffer they
name must be registered with `Memory.register`. `launch.execute` runs a recorded sequence of launches.

Checked: bounds, alignment, unwritten and read-only memory, races inside warps, inside blocks and between blocks,
divergent barriers, warp instructions with missing lanes, cp.async used before its wait, launch limits, endless loops.
House rules, stricter than the instruction set: a thread must not leave a block that others still synchronise, and a
lane named by a warp instruction must come even if it could leave instead.

Not modelled: wgmma, tcgen05, TMA, mbarrier, clusters, textures, fp8, integer mma, recursion, indirect calls, timing.
Unwritten registers and local memory read as zero, without a fault. Needs numpy 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from . import (
    approx,
    async_copy,
    atomics,
    bits,
    compare,
    control,
    convert,
    data,
    floating,
    integer,
    packed,
    tensor_core,
    warp,
)
from .decode import HANDLERS
from .errors import Fault, Unsupported
from .memory import Memory
from .parser import Module, parse
from .program import Program
from .runner import Run

__all__ = ["HANDLERS", "Fault", "Memory", "Program", "Unsupported", "load", "parse", "run", "run_both"]

INSTRUCTION_MODULES = (
    approx, async_copy, atomics, bits, compare, control, convert, data, floating, integer, packed, tensor_core, warp,
)  # fmt: skip


@lru_cache(maxsize=64)
def _module(text: str) -> Module:
    return parse(text)


def load(text: str, entry: str | None = None, storage: dict | None = None) -> Program:
    """Decodes a kernel. `entry` is its name or a unique part of it; None if the file has only one.

    Kernels that are to share their module's variables are loaded with the same `storage` (a dict, empty at first).
    """
    module = _module(text)
    names = module.entries
    if entry is not None:
        names = [entry] if entry in names else [n for n in names if entry in n]
    if len(names) != 1:
        raise LookupError(f"{len(names)} kernels match {entry!r}: {names or module.entries}")
    return Program(module, names[0], storage={} if storage is None else storage)


def run(
    program: Program | str,
    args: Sequence[Any] | bytes,
    grid: Sequence[int],
    block: Sequence[int],
    shared: int = 0,
    *,
    memory: Memory | None = None,
    races: bool = True,
    approx: int = 0,
    max_steps: int = 1_000_000,
) -> Run:
    """Runs a kernel over CPU memory, in place.

    `args`: one per parameter (tensor or array, int, float, bytes, ctypes object), or all of them as packed bytes.
    `memory`: registered buffers with their flags; without it, the tensors among `args` are all there is.
    `approx`: 0 exact, +1 or -1 to shift every approximate instruction by its documented error.
    Raises `Fault` at the first thing a correct kernel would not do.
    """
    if isinstance(program, str):
        program = load(program)
    return Run(
        program, args, grid, block, shared, memory=memory, races=races, approx=approx, max_steps=max_steps
    ).execute()


def run_both(
    program: Program | str,
    args: Sequence[Any],
    grid: Sequence[int],
    block: Sequence[int],
    shared: int = 0,
    *,
    outputs: Sequence[int],
    memory: Memory | None = None,
    races: bool = True,
) -> tuple[list[Any], list[Any]]:
    """Runs a kernel with every approximate instruction at the lower, then at the upper end of its error bound.

    Returns copies of the arguments numbered in `outputs` after each run. Contents are restored before the second run,
    and race checks are done in the first only. Afterwards the arguments hold the result of the second run.
    """
    before = [_copy(a) for a in args]
    results = []
    for sign in (-1, 1):
        for a, b in zip(args, before):
            if b is not None:
                a[...] = b
        run(program, args, grid, block, shared, memory=memory, races=races and sign < 0, approx=sign)
        results.append([_copy(args[k]) for k in outputs])
    return results[0], results[1]


def _copy(a: Any) -> Any:
    if hasattr(a, "untyped_storage"):
        return a.clone()
    return a.copy() if hasattr(a, "copy") and hasattr(a, "dtype") and a.ndim else None
