"""The calls of the GPU benchmark's tables, and their launches by each backend's host code, without a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ctkernels.functional import ctu, head_edit

from . import sass

MEASURED = Path(__file__).parents[2] / "benchmarks/results/h100.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIM = 128
UNROLLED = 4  # terms per iteration of the loop over partial sums, whose loads overlap
PASSES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Call:
    """A row of the table."""

    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.case} {self.dtype}"

    @property
    def nbytes(self) -> int:
        """The size of the tensor."""
        return math.prod(self.shape) * torch.empty(0, dtype=DTYPES[self.dtype]).element_size()

    def arguments(self) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """The function and its tensors, uninitialised."""
        order = torch.channels_last if "NHWC" in self.case else torch.contiguous_format
        x = torch.empty(self.shape, dtype=DTYPES[self.dtype], memory_format=order)
        if self.op == "head_edit":
            heads = self.shape[-1] // HEAD_DIM
            return head_edit, [x, *(torch.empty(s) for s in ((heads, HEAD_DIM), (heads, HEAD_DIM), (heads,), (heads,)))]
        dim = 1 if x.dim() == 4 else 2
        logits = [torch.empty(self.shape[dim]) for _ in range(2)]
        return lambda x, beta, coeff: ctu(x, beta, coeff, channel_dim=dim, raw=True), [x, *logits]


def measured(section: str = "ops") -> list[tuple[Call, dict[str, Any]]]:
    """The measured calls, with their records."""
    records = json.loads(MEASURED.read_text())[section]["records"]
    return [(Call(r["op"], r["case"], tuple(r["shape"]), r["dtype"]), r) for r in records]


@dataclass(frozen=True)
class Code:
    """Machine code of a kernel: registers, instructions per loop iteration, MUFU instructions among them, and instructions before
    the loop."""

    registers: int
    instructions: float
    mufu: float
    before: int


@dataclass(frozen=True)
class Launch:
    """One launch.

    role: one of :data:`recorder.ROLES`. key: key of its machine code. steps: loop iterations per thread. asked: bytes that a
    thread loads per step. moved: bytes of tensors that a step reads and writes. ahead: whether a step's loads are issued before
    the previous step's arithmetic. used: fraction of the threads' steps with values. finishes: whether it computes gradients from
    sums. barriers, shuffles: levels of the tree over a block's sums, by kind of exchange.
    """

    role: str
    key: Any
    blocks: int
    threads: int
    steps: int = 1
    asked: int = 0
    moved: int = 0
    ahead: bool = False
    used: float = 1.0
    finishes: bool = False
    barriers: int = 0
    shuffles: int = 0


class _Recorder:
    """Records the launches of a call."""

    def __init__(self, call: Call):
        self.launches: list[Launch] = []
        self.elements, self.itemsize = math.prod(call.shape), DTYPES[call.dtype].itemsize

    def over_tensor(
        self, role: str, key: Any, blocks: int, threads: int, steps: int, values: int, ahead: bool, finishes: bool
    ) -> None:
        """A launch over the tensor, with ``values`` per thread and step."""
        reads = 2 if role == "backward" else 1
        used = min(1.0, self.elements / (blocks * threads * steps * values))
        step = values * self.itemsize
        self.launches.append(
            Launch(role, key, blocks, threads, steps, reads * step, (reads + 1) * step, ahead, used, finishes)
        )

    def reduction(
        self, role: str, key: Any, blocks: int, threads: int, terms: int, rows: int, sums: int, size: int, per_sum: bool
    ) -> None:
        """A launch that adds ``terms`` of each of several sums with ``rows`` threads. per_sum: whether every sum has its own
        tree."""
        levels = max(rows, 1).bit_length() - 1
        barriers = min(levels, max(0, threads.bit_length() - 6))
        shuffles, trees = levels - barriers, sums if per_sum else 1
        self.launches.append(
            Launch(role, key, blocks, threads, _ceil(terms, rows), size * sums, finishes=role == "reduce_partials",
                   barriers=trees * barriers, shuffles=sums * shuffles)
        )  # fmt: skip


class _CudaRecorder(_Recorder):
    """Replaces the launcher of CUDA kernels."""

    def note(self, request: Any) -> None:
        import cuda_recorder as c
        from recorder import ROLES

        kernel, data = request.kernel.decode(), c.ctypes.string_at(request.args, request.args_size)
        args, threads = c.structure(kernel).from_buffer_copy(data), request.block_x * request.block_y
        role = next(role for role in ROLES if role in kernel)
        launch = (role, kernel, request.grid, threads)
        if role == "precompute":
            self.launches.append(Launch(*launch))
        elif role == "reduce_partials":
            terms = args.slots * args.repeat * args.inner
            self.reduction(*launch, terms, request.block_y, args.wanted.bit_count(), 4, per_sum=False)
        elif role == "reduce_shared":
            item = c.arrays(kernel, data)["item"][0]
            self.reduction(*launch, args.groups // item.rows * item.run, threads, 1, 8, per_sum=False)
        else:
            t, plane = args.tiling, "_plane_" in kernel
            values = 1 if kernel.endswith("_scalar") else 16 // self.itemsize
            steps = t.rows_per * (_ceil(min(t.cols_per, t.width), threads * values) if plane else 1)
            finishes = args.wanted != 0 and not args.partial
            self.over_tensor(*launch, steps, values, role == "backward" or not plane, finishes)

    @contextmanager
    def recording(self) -> Iterator[None]:
        import cuda_recorder

        class Recorder(cuda_recorder.Recorder):
            execute = staticmethod(self.note)

        with cuda_recorder.cuda_on_cpu(Recorder()):
            yield


class _TritonRecorder(_Recorder):
    """Replaces the launcher of Triton kernels."""

    def note(self, kernel: Any, grid: int, args: dict[str, Any], meta: dict[str, Any]) -> None:
        threads, name = 32 * meta["num_warps"], kernel.__name__
        launch = ((kernel, args, meta), grid, threads)
        if name == "reduce_partials_kernel":
            terms, sums = args["slots"] * args["repeat"] * args["inner"], meta["SUM_MASK"].bit_count()
            rows = max(1, threads // meta["LANES"])
            self.reduction("reduce_partials", *launch, terms, rows, sums, 4, per_sum=True)
        elif name == "reduce_shared_kernel":
            terms = max(meta["RUNS"]) or args["channels"]
            self.reduction("reduce_shared", *launch, terms, threads, 1, 8, per_sum=True)
        else:
            lanes, unit = meta["LANES"], meta["UNIT"]
            columns = _ceil(min(args["cols_per"] * unit, args["inner"]), lanes) if meta["PLANE"] else 1
            role = "forward" if args["dy"] is None else "backward"
            finishes = meta["SUM_MASK"] != 0 and args["partial"] is None
            self.over_tensor(role, *launch, args["rows_per"] * columns, lanes // threads, False, finishes)

    @contextmanager
    def recording(self) -> Iterator[None]:
        from recorder import through_kernels

        from ctkernels.ops import launcher
        from ctkernels.ops.channelwise.launch import implementation

        with mock.patch.object(launcher, "launch", self.note), through_kernels(implementation):
            yield


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


RECORDERS = {"cuda": _CudaRecorder, "triton": _TritonRecorder}


@lru_cache(maxsize=256)
def launches(call: Call, backend: str, which: str) -> tuple[Launch, ...]:
    """The launches of a call without gradients, or with all gradients: ``which`` of :data:`PASSES`."""
    recorder = RECORDERS[backend](call)
    function, tensors = call.arguments()
    with recorder.recording():
        if which == "forward":
            function(*tensors)
        else:
            leaves = [t.requires_grad_() for t in tensors]
            y = function(*leaves)
            torch.autograd.grad(y, leaves, torch.empty_like(y))
    return tuple(recorder.launches)


# ---- machine code ----------------------------------------------------------------------------------------------------


def code_of(listing: sass.Listing, role: str, outermost: bool = False) -> Code:
    """The machine code with the main loop, with or without the loops around it; of several versions, the one with most work."""
    wanted = "STG" if role in ("forward", "backward") else "LDG"
    loops = [(a, b) for a, b in listing.loops if any(i.name == wanted for i in listing.instructions[a : b + 1])]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    inner = loops if outermost else inner
    if not inner:
        return Code(listing.registers, len(listing.instructions), listing.count("MUFU"), 0)
    a, b = max(inner, key=lambda loop: loop[1] - loop[0])
    body = listing.instructions[a : b + 1]
    passes = UNROLLED if role.startswith("reduce") and sum(i.name == "LDG" for i in body) >= UNROLLED else 1
    mufu = sum(i.name == "MUFU" for i in body)
    return Code(listing.registers, len(body) / passes, mufu / passes, min(a for a, _ in inner))


def cuda_codes(kernels: Iterable[tuple[str, str]], sm: int) -> dict[str, Code]:
    """The machine code of CUDA kernels, given as (name, role)."""
    from . import cuda

    roles = dict(kernels)
    return {name: code_of(listing, roles[name]) for name, listing in cuda.listings(tuple(sorted(roles)), sm).items()}


def codes(found: Iterable[Launch], backend: str, sm: int) -> list[Code]:
    """The machine code of every launch."""
    found = list(found)
    if backend == "cuda":
        known = cuda_codes({(launch.key, launch.role) for launch in found}, sm)
        return [known[launch.key] for launch in found]
    from .ahead_of_time import compiled

    return [_triton_code(launch, compiled(*launch.key, sm)[0]) for launch in found]


_TRITON: dict[int, Code] = {}


def _triton_code(launch: Launch, kernel: Any) -> Code:
    if id(kernel) not in _TRITON:  # compiled kernels stay in memory, so that ids are unique
        *_, meta = launch.key
        outermost = not launch.role.startswith("reduce") and not meta["PLANE"]  # rows of one step
        _TRITON[id(kernel)] = code_of(sass.disassemble(kernel.asm["cubin"]), launch.role, outermost)
    return _TRITON[id(kernel)]
