"""Predicted cost of the fused attention kernels from their machine code, with and without the edit.

A kernel's time is predicted per SM from the instructions inside and outside its loops, times their executions, with every pipe
at its own rate. ``share`` is the tensor cores' fraction if all pipes overlap, ``serial`` if none do; a real kernel lies in
between. A pass with and without the edit is compared by the larger of memory time and the sum of all pipes' times, summed over
its kernels. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ctkernels.ops import launcher
from ctkernels.ops.attention.problem import KEEP_LSE, KEEP_Z, Problem, lse_for
from ctkernels.ops.attention.reference import UNBOUNDED
from ctkernels.ops.attention.triton import launch as triton_launch

from . import sass
from .ahead_of_time import compiled
from .gpus import GPUS

TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
# Dense 16-bit flops per clock and SM, and fp32 lanes, from data sheets. MUFU has 16 lanes, a warp scheduler issues one
# instruction per clock.
FLOPS = {80: 2048, 90: 4096, 100: 8192}
FP32 = {80: 64, 90: 128, 100: 128}
LENGTH = 4096  # number of queries and of keys
SHARED_LIMIT = 99 * 1024
# matrix products of a kernel per query, key and value of a head: forward q k', w v; keys also g v', w' g, ds' q ...
PRODUCTS = {"forward_kernel": (1, 1), "keys_kernel": (2, 2), "queries_kernel": (2, 1)}


@dataclass(frozen=True)
class Cost:
    """A kernel on an architecture. ``clocks``: SM clocks per program, by pipe; ``rows``: queries (keys) per program; ``bytes``:
    memory traffic per query."""

    variant: str
    kernel: str
    sm: int
    registers: int
    spills: int
    stack: int
    shared: int
    tensor: int
    share: float
    serial: float
    clocks: dict[str, float]
    rows: int
    bytes: float

    @property
    def time(self) -> float:
        """SM clocks per query of one head: the sum over pipes, or memory's."""
        gpu = GPUS[self.sm]
        return max(sum(self.clocks.values()) / self.rows, self.bytes / (gpu.gigabytes / gpu.sms / gpu.ghz))


def problem(size: int, dtype: torch.dtype, edited: bool) -> Problem:
    q, k, v = (torch.empty(1, 1, LENGTH, size, dtype=dtype) for _ in range(3))
    m, a, g_m, g_a = (
        (torch.empty(1, size), torch.empty(1, size), torch.empty(1), torch.empty(1)) if edited else [None] * 4
    )
    return Problem(q, k, v, m, a, g_m, g_a, None, None, None, 0, 0, size**-0.5, UNBOUNDED, 0)


def launches(p: Problem, backward: bool) -> list[tuple[Any, int, dict[str, Any], dict[str, Any]]]:
    """The launches of a training step's forward or backward pass."""
    found: list[Any] = []
    with mock.patch.object(launcher, "launch", lambda *launch: found.append(launch)):
        if backward:
            z, needs = torch.empty_like(p.q), 0b1111111 if p.m is not None else 0b111
            triton_launch.backward(torch.empty_like(p.q), z, lse_for(p.q), p, needs)
        else:
            # without an edit, the backward pass needs the output itself instead of z
            triton_launch.forward(p, KEEP_LSE | (KEEP_Z if p.m is not None else 0))
    return found


def _clocks(body: list[sass.Instruction], warps: int, sm: int) -> dict[str, float]:
    """SM clocks for all warps of a block to execute a piece of code once; tensor cores separately."""
    work = sass.pipes(body)
    return {
        "issue": len(body) * warps / 4,
        "mufu": work["mufu"] * warps * 32 / 16,
        "fp32": work["fp32"] * warps * 32 / FP32[sm],
    }


def cost(variant: str, launch: tuple[Any, int, dict[str, Any], dict[str, Any]], sm: int) -> Cost:
    kernel, _, args, meta = launch
    found, _ = compiled(kernel, args, meta, sm)
    listing = sass.disassemble(found.asm["cubin"])
    warps, name = found.metadata.num_warps, kernel.__name__
    # waits on sm_100 spin in code after the last exit and jump back from there; these are not loops
    end = max(i for i, x in enumerate(listing.instructions) if x.name == "EXIT")
    loops = [(a, b) for a, b in listing.loops if b < end]
    loops = [(a, b) for a, b in loops if any(i.name in TENSOR for i in listing.instructions[a : b + 1])]
    inside = {i for a, b in loops for i in range(a, b + 1)}
    clocks = _clocks([x for i, x in enumerate(listing.instructions) if i not in inside], warps, sm)
    clocks["tensor"] = 0.0
    if name in PRODUCTS:
        # causal: half of the keys (queries) on average, those of one tile in the loop with comparisons
        step, tile = (meta["M"], meta["N"]) if name == "keys_kernel" else (meta["N"], meta["M"])
        bodies = sorted((listing.instructions[a : b + 1] for a, b in loops), key=len)
        passes = [LENGTH / 2 / step, tile / step]
        for body, count in zip((bodies[0], bodies[-1]), passes):
            for pipe, value in _clocks(body, warps, sm).items():
                clocks[pipe] += count * value
        products = PRODUCTS[name]
        flops = 2 * meta["M"] * meta["N"] * (products[0] * meta["BD"] + products[1] * meta["BE"])
        rate = FLOPS[sm] / (6 if args["q"].dtype == torch.float32 else 1)  # three products at half the rate
        clocks["tensor"] = sum(passes) * flops / rate
    tensor = sum(i.name in TENSOR for i in listing.instructions)
    # a program's rows; the kernel of the edit's gradients runs once per head
    rows = LENGTH if name == "edit_kernel" else meta["N"] if name == "keys_kernel" else meta["M"]
    moved = sum(t.numel() * t.element_size() for t in args.values() if isinstance(t, torch.Tensor))
    return Cost(
        variant, name, sm, listing.registers, listing.count("LDL", "STL"), listing.stack, found.metadata.shared, tensor,
        clocks["tensor"] / max(clocks.values()), clocks["tensor"] / sum(clocks.values()), clocks, rows, moved / LENGTH,
    )  # fmt: skip


def variants(every: bool) -> Iterator[tuple[str, list[Any]]]:
    """(name, launches) for heads of 128 with and without the edit; with ``every``, also for heads of 256."""
    shapes = [("bf16", torch.bfloat16, 128, True), ("bf16", torch.bfloat16, 128, False)]
    if every:
        shapes += [
            ("bf16", torch.bfloat16, 64, True),
            ("bf16", torch.bfloat16, 256, True),
            ("fp32", torch.float32, 64, True),
        ]
    for dtype_name, dtype, size, edited in shapes:
        for name, backward in (("forward", False), ("backward", True)):
            edit = "edited" if edited else "plain"
            yield f"attention {name}, {edit}, {dtype_name} {size}", launches(problem(size, dtype, edited), backward)


def costs(archs: list[int], every: bool = True) -> list[Cost]:
    return [cost(name, launch, sm) for name, found in variants(every) for launch in found for sm in archs]


def ratios(found: list[Cost], sm: int) -> dict[str, float]:
    """Predicted time of a pass with the edit relative to the same pass without it."""

    def time(name: str) -> float:
        return sum(c.time for c in found if c.variant == name and c.sm == sm)

    names = {n: [f"attention {n}, {edit}, bf16 128" for edit in ("edited", "plain")] for n in ("forward", "backward")}
    return {n: time(with_edit) / time(without) for n, (with_edit, without) in names.items()}


def traffic(edited: bool, backward: bool) -> dict[str, int]:
    """The number of tensors of the output's size that a pass reads and writes in addition to q, k, v, lse and their gradients,
    counted from the arguments of its kernels."""
    written = {"forward_kernel": {"y", "z"}, "prepare_kernel": {"dz"}}
    found = {"reads": 0, "writes": 0}
    for kernel, _, args, _ in launches(problem(128, torch.bfloat16, edited), backward):
        for name in ("y", "z", "dy", "dz"):
            t = args.get(name)
            if isinstance(t, torch.Tensor) and t.numel() >= LENGTH * 128:
                found["writes" if name in written.get(kernel.__name__, ()) else "reads"] += 1
    return found


def budget(c: Cost) -> dict[str, float]:
    return {"registers": c.registers, "shared": c.shared, "share": round(c.share, 2), "serial": round(c.serial, 2)}


def report(found: list[Cost]) -> None:
    print(
        "\nattention: registers, shared memory, tensor-core instructions; share of the tensor peak if pipes overlap, if not"
    )
    for c in found:
        print(
            f"{c.variant:<34} {c.kernel:<15} sm_{c.sm:<4} {c.registers:>4} {c.shared / 1024:5.1f} KiB {c.tensor:>4}  "
            f"{c.share:5.2f} {c.serial:5.2f}" + (f"  {c.spills} spills" if c.spills else "")
        )
    for sm in sorted({c.sm for c in found}):
        print(f"sm_{sm}: " + ", ".join(f"{n} with edit / without {r:.4f}" for n, r in ratios(found, sm).items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m roofline.attention", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=FLOPS, default=list(FLOPS), help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    parser.add_argument("--write-budgets", type=Path, metavar="FILE", help="write what is found as the new budgets")
    args = parser.parse_args(argv)
    found = costs(args.arch)
    report(found)
    if args.json:
        args.json.write_text(json.dumps([asdict(c) for c in found], indent=1) + "\n")
    if args.write_budgets:
        table = {f"{c.variant}, {c.kernel} sm_{c.sm}": budget(c) for c in found}
        args.write_budgets.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
