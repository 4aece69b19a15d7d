"""python -m roofline: the predicted cost per element of every Triton and CUDA kernel, from its machine code, without a GPU.

For comparison, it also has a plain translation of the formula, and the kernels of torch.compile for the composed reference.

The predicted time of a kernel is the maximum of memory time and the time of each execution pipe, per element and SM, relative to
memory time: 1.00 is the speed of memory. It assumes hidden latency and is not a measurement.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ctkernels._files import write_text

from . import sass
from .ahead_of_time import compiled
from .gpus import GPUS, Cost
from .variants import Variant, variants


def cost(variant: Variant, sm: int) -> Cost:
    """The cost of its main loop, or of all its code if it has no loop."""
    found, _ = compiled(variant.kernel, variant.args, variant.meta, sm)
    listing = sass.disassemble(found.asm["cubin"])
    body = listing.hot(outermost=not variant.meta.get("PLANE", False))
    # The accesses to tensors, not parameters: the widest ones.
    moves = [i for i in body if i.name in ("LDG", "STG")]
    vector = max(i.bytes for i in moves)
    tensors = [i for i in moves if i.bytes == vector]
    elements = sum(i.bytes for i in tensors if i.name == "LDG") / (variant.itemsize * variant.reads)
    narrowest = min(i.bytes for i in tensors)
    moved = sum(i.bytes for i in tensors) / elements
    pipes = {k: v / elements for k, v in sass.pipes(body).items()}
    threads = 32 * found.metadata.num_warps
    resident = min(32, 2048 // threads, 65536 // (-(-listing.registers // 8) * 8 * threads)) * threads // 32
    made = Cost(
        variant.name, sm, variant.ours, moved, len(body) / elements, pipes, narrowest, listing.registers, listing.stack,
        listing.count("LDL", "STL"), listing.calls(body), resident, 0.0, "",
    )  # fmt: skip
    clocks = GPUS[sm].clocks(made)
    limit = max(clocks, key=lambda k: clocks[k])
    return replace(made, ratio=clocks[limit] / clocks["memory"], limit=limit)


def costs(archs: list[int], only: str = "") -> Iterator[Cost]:
    """Yield the costs of variants with ``only`` in their name."""
    for variant in variants():
        if only in variant.name:
            for sm in archs:
                yield cost(variant, sm)


def _of_backends(backends: list[str], archs: list[int], only: str) -> Iterator[Cost]:
    if "triton" in backends:
        yield from costs(archs, only)
    if "cuda" in backends:
        from . import cuda

        if cuda.nvcc() is None:
            print("the CUDA kernels: nvcc is not installed")
        else:
            yield from cuda.costs(archs, only)
    if "inductor" in backends:
        from . import inductor

        yield from inductor.costs(archs, only)


def budget(found: Cost) -> dict[str, float]:
    """The budget entry of a kernel."""
    return {
        "instructions": round(found.instructions, 1),
        "mufu": round(found.pipes.get("mufu", 0.0), 2),
        "registers": found.registers,
        "vector": found.vector,
        "ratio": round(found.ratio, 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m roofline", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=GPUS, default=list(GPUS), help="default: all")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    parser.add_argument("--write-budgets", type=Path, metavar="FILE", help="write what is found as the new budgets")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=("triton", "cuda", "inductor"),
        default=["triton", "cuda", "inductor"],
        help="ours, and what torch.compile makes of the reference (default: all)",
    )
    args = parser.parse_args(argv)
    if args.write_budgets and len(args.backend) > 1:
        parser.error(
            "--write-budgets writes those of one --backend: budgets_triton.json for triton, budgets_cuda.json for cuda"
        )
    print(
        "per element: bytes, instructions, of them MUFU, FP32, conversions; then vector bytes, registers, spills, calls,"
    )
    print("resident warps an SM, and predicted time over the memory floor (what limits it)\n")
    found = []
    for c in _of_backends(args.backend, args.arch, args.only):
        found.append(c)
        p = {k: c.pipes.get(k, 0.0) for k in ("mufu", "fp32", "convert")}
        print(
            f"{c.variant:<44} {GPUS[c.sm].name:<5} {c.bytes:4.0f} B {c.instructions:6.1f} {p['mufu']:5.2f} {p['fp32']:5.1f} "
            f"{p['convert']:4.1f}  {c.vector:>2} B {c.registers:>4} {c.spills:>2} {c.calls:>2} {c.warps:>3} w  "
            f"{c.ratio:5.2f} ({c.limit})",
            flush=True,
        )
    print("\nThe fused attention: python -m roofline.attention")
    if args.json:
        write_text(args.json, json.dumps([asdict(c) for c in found], indent=1) + "\n")
    if args.write_budgets:
        known = json.loads(args.write_budgets.read_text()) if args.write_budgets.exists() else {}
        table = known if args.only else {}
        for c in found:
            if c.ours:
                name = f"{c.variant} sm_{c.sm}"
                table[name] = budget(c) | {k: v for k, v in known.get(name, {}).items() if k == "reason"}
        write_text(args.write_budgets, json.dumps(table, indent=1) + "\n")
    return 0
