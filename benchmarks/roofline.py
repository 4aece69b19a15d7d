"""python -m benchmarks.roofline: what every Triton kernel costs an element, from its machine code, without a GPU.

The predicted time of a kernel is the largest of memory time and the time of each execution pipe, per element and SM, over
memory time alone: 1.00 is as fast as memory can be. It assumes that latency is hidden; it is no measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctkernels.ops import _triton
from ctkernels.ops.ctu import ACTIVATIONS
from ctkernels.ops.ctu import OP as CTU

from . import sass
from .ahead_of_time import compiled


@dataclass(frozen=True)
class Gpu:
    """SMs, clock and bandwidth: vendor data sheets of the SXM parts. Lanes a clock and SM of each pipe: the throughput
    table of the CUDA C++ programming guide, for its compute capability. The clock is a sustained one."""

    name: str
    sms: int
    ghz: float
    gigabytes: float
    fp32: int
    fp64: int

    def clocks(self, cost: Cost) -> dict[str, float]:
        """Clocks of an SM per element, by what limits them."""
        lanes = {"issue": 128, "mufu": 16, "fp32": self.fp32, "fp64": self.fp64, "convert": 64, "other": 64}
        work = {"issue": cost.instructions, **{k: cost.pipes.get(k, 0.0) for k in lanes if k != "issue"}}
        return {"memory": cost.bytes / (self.gigabytes / self.sms / self.ghz), **{k: work[k] / lanes[k] for k in lanes}}


GPUS = {
    80: Gpu("A100", 108, 1.41, 2039, fp32=64, fp64=32),
    90: Gpu("H100", 132, 1.755, 3350, fp32=128, fp64=64),
    100: Gpu("B200", 148, 1.85, 8000, fp32=128, fp64=64),
}


@dataclass(frozen=True)
class Cost:
    """A kernel on one architecture; instructions and bytes are per element of its hot loop."""

    variant: str
    sm: int
    bytes: float
    instructions: float
    pipes: dict[str, float]
    vector: int
    registers: int
    stack: int
    spills: int
    calls: int
    warps: int
    ratio: float
    limit: str


@triton.jit
def naive_kernel(x, y, beta, coeff, n, LANES: tl.constexpr):
    """The published formula, one knob for all, as one would write it down."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    v, b, c = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), tl.load(beta), tl.load(coeff)
    u = v / (1.0 - b + 1e-6)
    soft = tl.where(u > 20.0, u, tl.log(1.0 + tl.exp(u)))
    value = c * tl.sigmoid(b * u) * v + (1.0 - c) * soft * (1.0 - b + 1e-6)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)


SHAPES = {"NCHW": ((32, 64, 56, 56), 1), "NLC": ((8, 197, 768), 2)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Launch = tuple[Any, dict[str, Any], dict[str, Any]]


def _recorded(call: Callable[[], Any]) -> list[Launch]:
    launches: list[Launch] = []
    with mock.patch.object(_triton, "launch", lambda kernel, grid, args, meta: launches.append((kernel, args, meta))):
        call()
    return launches


def _ctu(x: Tensor, channel_dim: int, activation: str, needs: int | None) -> Launch:
    """The main launch of a forward, or of a backward that makes the gradients in ``needs``."""
    count = x.shape[channel_dim]
    knobs = [torch.empty(count) for _ in range(2)]
    inputs, static = (x, *knobs, None, None, None, None), (channel_dim, ACTIVATIONS[activation], False, 0.0)
    if needs is None:
        return _recorded(lambda: _triton.forward(CTU, inputs, static))[0]
    return _recorded(lambda: _triton.backward(CTU, torch.empty_like(x), inputs, static, needs))[0]


def variants() -> Iterator[tuple[str, int, Launch]]:
    """(name, tensors of x's size that are read, launch)."""
    for layout, (shape, channel_dim) in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            x = torch.empty(shape, dtype=dtype)
            name = f"{layout} {dtype_name}"
            yield f"ctu forward {name}", 1, _ctu(x, channel_dim, "relu", None)
            yield f"ctu backward, sums {name}", 2, _ctu(x, channel_dim, "relu", 7)
            yield f"ctu backward, frozen {name}", 2, _ctu(x, channel_dim, "relu", 1)
            if layout == "NCHW":
                yield f"ctu gelu forward {name}", 1, _ctu(x, channel_dim, "gelu", None)
    for dtype_name, dtype in DTYPES.items():
        x, knob = torch.empty(1 << 20, dtype=dtype), torch.empty(1)
        args = {"x": x, "y": torch.empty_like(x), "beta": knob, "coeff": knob, "n": x.numel()}
        yield f"naive formula forward {dtype_name}", 1, (naive_kernel, args, {"LANES": 1024, "num_warps": 4})


def cost(variant: str, reads: int, launch: Launch, sm: int) -> Cost:
    kernel, args, meta = launch
    found, _ = compiled(kernel, args, meta, sm)
    listing = sass.disassemble(found.asm["cubin"])
    body = listing.hot(outermost=not meta.get("PLANE", False))
    # Of the body, the accesses that move the tensors, not parameters: the widest.
    moves = [i for i in body if i.name in ("LDG", "STG")]
    vector = max(i.bytes for i in moves)
    tensors = [i for i in moves if i.bytes == vector]
    elements = sum(i.bytes for i in tensors if i.name == "LDG") / (args["x"].element_size() * reads)
    narrowest = min(i.bytes for i in tensors)
    moved = sum(i.bytes for i in tensors) / elements
    pipes = {k: v / elements for k, v in sass.pipes(body).items()}
    threads = 32 * found.metadata.num_warps
    resident = min(32, 2048 // threads, 65536 // (-(-listing.registers // 8) * 8 * threads)) * threads // 32
    made = Cost(
        variant, sm, moved, len(body) / elements, pipes, narrowest, listing.registers, listing.stack,
        listing.count("LDL", "STL"), listing.calls(body), resident, 0.0, "",
    )  # fmt: skip
    clocks = GPUS[sm].clocks(made)
    limit = max(clocks, key=lambda k: clocks[k])
    return Cost(**(asdict(made) | {"ratio": clocks[limit] / clocks["memory"], "limit": limit}))


def costs(archs: list[int]) -> list[Cost]:
    return [cost(name, reads, launch, sm) for name, reads, launch in variants() for sm in archs]


def budget(found: Cost) -> dict[str, float]:
    """What the checked-in budget says about a kernel."""
    return {
        "instructions": round(found.instructions, 1),
        "mufu": round(found.pipes.get("mufu", 0.0), 2),
        "registers": found.registers,
        "vector": found.vector,
        "ratio": round(found.ratio, 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=GPUS, default=list(GPUS), help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    parser.add_argument("--write-budgets", type=Path, metavar="FILE", help="write what is found as the new budgets")
    args = parser.parse_args(argv)
    found = costs(args.arch)
    print(
        "per element: bytes, instructions, of them MUFU, FP32, conversions; then vector bytes, registers, spills, calls,"
    )
    print("resident warps an SM, and predicted time over the memory floor (what limits it)\n")
    for c in found:
        p = {k: c.pipes.get(k, 0.0) for k in ("mufu", "fp32", "convert")}
        print(
            f"{c.variant:<32} {GPUS[c.sm].name:<5} {c.bytes:4.0f} B {c.instructions:6.1f} {p['mufu']:5.2f} {p['fp32']:5.1f} "
            f"{p['convert']:4.1f}  {c.vector:>2} B {c.registers:>4} {c.spills:>2} {c.calls:>2} {c.warps:>3} w  "
            f"{c.ratio:5.2f} ({c.limit})"
        )
    print("\nThe fused attention: python -m benchmarks.attention")
    if args.json:
        args.json.write_text(json.dumps([asdict(c) for c in found], indent=1) + "\n")
    if args.write_budgets:
        table = {f"{c.variant} sm_{c.sm}": budget(c) for c in found if not c.variant.startswith("naive")}
        args.write_budgets.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
