"""Runs the CUDA backend's own host code on CPU tensors, without a GPU.

The CUDA binding is registered for CPU tensors under another name, with a launcher that compiles the requested kernel with
nvcc and executes its PTX on the CPU, checking bounds, races and uninitialised memory. Names, grids, shared memory and argument
bytes are those of the host code.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import recorder
import torch
from ptx import Memory
from ptx.launch import Launch
from ptx.toolchain import compile_cuda
from recorder import Launched, through_kernels
from torch import Tensor

from ctkernels.ops import backends
from ctkernels.ops.record import Kernels, Op
from ctkernels.ops.registration import OPS

SOURCES = Path(__file__).parents[2] / "csrc"
LIBRARY = "ctkernels_recorded"
OPTIONS = ["--expt-relaxed-constexpr", "-Werror", "all-warnings"]


FAILED = ctypes.create_string_buffer(b"see the exception")


class Scratch(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


class Request(ctypes.Structure):
    """struct Launch of csrc/cuda/launch.h."""

    _fields_ = [
        ("kernel", ctypes.c_char_p), ("grid", ctypes.c_uint32), ("block_x", ctypes.c_uint32), ("block_y", ctypes.c_uint32),
        ("shared", ctypes.c_uint32), ("args", ctypes.c_void_p), ("args_size", ctypes.c_uint64), ("stream", ctypes.c_void_p),
        ("scratch", ctypes.POINTER(Scratch)), ("scratch_count", ctypes.c_int32),
    ]  # fmt: skip


class Tiling(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("group", "row", "width", "cols_per")]
    _fields_ += [(n, ctypes.c_uint32) for n in ("rows", "rows_per", "row_cuts", "col_cuts", "channels", "inner")]
    _fields_ += [("packed", ctypes.c_bool)]


class ParamRef(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("fallback", ctypes.c_double), ("rows", ctypes.c_uint32), ("count", ctypes.c_uint32),
        ("run", ctypes.c_uint32), ("is_double", ctypes.c_bool),
    ]  # fmt: skip

    def extent(self) -> tuple[int, int]:
        return self.data or 0, self.rows * self.count * (8 if self.is_double else 4)


class GradRef(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("is_double", ctypes.c_bool)]


class Channelwise(ctypes.Structure):
    """struct Channelwise without its arrays: a ParamRef and then a GradRef for each parameter, and the op's attributes."""

    _fields_ = [
        ("tiling", Tiling),
        *((n, ctypes.c_void_p) for n in ("x", "residual", "factor", "dy")),
        *((n, ctypes.c_void_p) for n in ("y", "dx", "dresidual", "dfactor", "partial", "table")),
        ("wanted", ctypes.c_uint32), ("table_rows", ctypes.c_uint32),
    ]  # fmt: skip


class Precompute(ctypes.Structure):
    """struct Precompute without its array of a ParamRef for each parameter."""

    _fields_ = [("to", ctypes.c_void_p), ("rows", ctypes.c_uint32), ("channels", ctypes.c_uint32)]


class ReducePartials(ctypes.Structure):
    """struct ReducePartials without its arrays, which are those of Channelwise."""

    _fields_ = [
        ("partial", ctypes.c_void_p), ("columns", ctypes.c_int64),
        *((n, ctypes.c_uint32) for n in ("channels", "inner", "repeat", "slots", "wanted")),
    ]  # fmt: skip


class Item(ctypes.Structure):
    _fields_ = [
        ("from_", ctypes.c_void_p), ("to", ctypes.c_void_p),
        *((n, ctypes.c_uint32) for n in ("rows", "count", "run", "first")), ("is_double", ctypes.c_bool),
    ]  # fmt: skip


class ReduceShared(ctypes.Structure):
    """struct ReduceShared without its array of items."""

    _fields_ = [(n, ctypes.c_uint32) for n in ("groups", "channels", "items")]


class Gates(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("log_alpha", "noise", "dy", "value", "d_log_alpha", "d_noise")),
        ("n", ctypes.c_int64), ("mode", ctypes.c_int), ("temperature", ctypes.c_double), ("low", ctypes.c_double),
        ("high", ctypes.c_double), ("seeded", ctypes.c_bool),
    ]  # fmt: skip


# The types of csrc/cuda/launch.h, csrc/cuda/args.h and csrc/hard_concrete.h mirrored here.
_MIRRORS = [
    ("cuda::Scratch", Scratch), ("cuda::Launch", Request), ("cuda::Tiling", Tiling), ("cuda::ParamRef", ParamRef),
    ("cuda::GradRef", GradRef), ("cuda::ReduceShared::Item", Item), ("cuda::ReduceShared", ReduceShared), ("Gates", Gates),
    *((f"cuda::{kind.__name__}<{op}>", kind) for op in ("CtuOp", "HeadEditOp")
      for kind in (Channelwise, Precompute, ReducePartials)),
]  # fmt: skip


_ARRAYS: dict[type[ctypes.Structure], dict[str, type[ctypes.Structure]]] = {
    Channelwise: {"params": ParamRef, "grads": GradRef}, ReducePartials: {"params": ParamRef, "grads": GradRef},
    Precompute: {"params": ParamRef}, ReduceShared: {"item": Item},
}  # fmt: skip


def check_layouts() -> None:
    """Check with the C++ compiler that the structures here have the layout of those in csrc."""
    lines = ["#include <cstddef>", '#include "cuda/args.h"', '#include "cuda/launch.h"', "using namespace ctk;"]
    for number, (name, mirror) in enumerate(_MIRRORS):
        lines.append(f"using S{number} = {name};")
        for field, kind in mirror._fields_:
            member = "from" if field == "from_" else field
            if mirror is Gates and field in ("mode", "temperature", "low", "high"):
                member = f"gate.{field}"
            offset, size = getattr(mirror, field).offset, ctypes.sizeof(kind)
            lines.append(
                f"static_assert(offsetof(S{number}, {member}) == {offset} && sizeof(S{number}::{member}) == {size});"
            )
        at = str(_end(mirror))
        for array, item in _ARRAYS.get(mirror, {}).items():
            size = f"sizeof(S{number}::{array})"
            lines.append(f"static_assert(offsetof(S{number}, {array}) == {at} && {size} % {ctypes.sizeof(item)} == 0);")
            at += f" + {size}"
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++20",
        "-fsyntax-only",
        "-Wno-invalid-offsetof",
        f"-I{SOURCES}",
        "-xc++",
        "-",
    ]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)


def _end(mirror: type[ctypes.Structure]) -> int:
    """The offset of the arrays after a structure, aligned to 8 bytes."""
    return -(-ctypes.sizeof(mirror) // 8) * 8


def structure(kernel: str) -> type[ctypes.Structure]:
    """The argument structure of a kernel, without the arrays whose length depends on the op."""
    if kernel == "ctk_reduce_shared" or kernel.endswith("_precompute"):
        return ReduceShared if kernel == "ctk_reduce_shared" else Precompute
    return ReducePartials if "_reduce_partials_" in kernel else Gates if "_gates_" in kernel else Channelwise


def arrays(kernel: str, data: bytes) -> dict[str, list[Any]]:
    """The arrays after the structure in the argument ``data`` of a kernel."""
    kind, at, found = structure(kernel), _end(structure(kernel)), {}
    for name, item in _ARRAYS.get(kind, {}).items():
        length = ReduceShared.from_buffer_copy(data).items if kind is ReduceShared else _parameters(kernel)
        found[name] = list((item * length).from_buffer_copy(data, at))
        at += ctypes.sizeof(item * length)
    return found


def _parameters(kernel: str) -> int:
    """The number of parameters of a kernel's op."""
    op = max((op for op in OPS.values() if kernel.startswith(f"ctk_{op.name}_")), key=lambda op: len(op.name))
    return op.elementwise_flags.count(False)


def source(kernel: str) -> tuple[Path, list[str]]:
    """The file that instantiates a kernel, and the compiler options for it."""
    if structure(kernel) is not Channelwise:
        return SOURCES / ("cuda/gates.cu" if structure(kernel) is Gates else "cuda/reduce.cu"), []
    dtype = re.fullmatch(r"ctk_\w+_(?:forward|backward)_(\w+)_(?:plane|lanes)_(?:scalar|vector|plain)", kernel)
    assert dtype, kernel
    return SOURCES / "cuda/channelwise.cu", [f"-DCTK_DTYPE={dtype[1]}"]


@lru_cache(maxsize=256)
def compiled(kernel: str, sm: int) -> str:
    """The PTX of one kernel."""
    file, options = source(kernel)
    text = compile_cuda(file, sm, options=[*OPTIONS, *options, f'-DCTK_SELECT=" {kernel} "'], include=[SOURCES])
    # without the other entries of the file
    empty = re.compile(r"^\.visible \.entry (\w+)\((?:.*?)^\}\n", re.M | re.S)
    return empty.sub(lambda m: m[0] if m[1] == kernel else "", text)


class Recorder(recorder.Recorder):
    """Replaces the library of kernels. The detail of a launch is the kernel's argument."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.known: dict[int, np.ndarray] = {}
        self.numel = self.itemsize = 0
        self.error: BaseException | None = None

    def begin(self, x: Tensor) -> None:
        """Start a call of an op on ``x``."""
        self.memory, self.known = Memory(), {}
        self.numel, self.itemsize = x.numel(), x.element_size()

    def __call__(self, request: Any) -> int | None:
        try:
            self.execute(request[0])
        except BaseException as error:
            self.error = error
            return ctypes.cast(FAILED, ctypes.c_void_p).value
        return None

    def bytes_at(self, address: int, size: int, **flags: bool) -> np.ndarray:
        """Register memory once, so that it is kept between the launches of a call."""
        if address not in self.known:
            self.known[address] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            self.memory.register(self.known[address], **flags)
        return self.known[address]

    def execute(self, r: Request) -> None:
        kernel, kind = r.kernel.decode(), structure(r.kernel.decode())
        data = ctypes.string_at(r.args, r.args_size)
        args = kind.from_buffer_copy(data)
        more = arrays(kernel, data)
        self.launches.append(Launched(kernel, r.grid, getattr(args, "wanted", None), args))
        outputs: list[tuple[int | None, int]] = []
        inputs: list[tuple[int | None, int]] = []
        scratch = {r.scratch[i].data: r.scratch[i].bytes for i in range(r.scratch_count)}
        for address, size in scratch.items():
            self.bytes_at(address, size, unwritten=True)
        big = self.numel * self.itemsize  # size of the first argument and of tensors with its layout
        if kind is Channelwise:
            packed = args.tiling.packed  # the factor and its gradient are parts of x and its gradient
            result = big // (2 if packed else 1)
            inputs = [(args.x, big)] if args.x != args.y else []
            inputs += [(args.residual, big), (None if packed else args.factor, big), (args.dy, result)]
            inputs += [p.extent() for p in more["params"]]
            outputs = [(args.y, result), (args.dx, big), (args.dresidual, big), (None if packed else args.dfactor, big)]
            outputs = [output for output in outputs if output[0] != args.x]
            if args.x == args.y:
                self.bytes_at(args.x, big)
            values = args.tiling.channels * (result // self.itemsize // (args.tiling.group or 1))
        elif kind is Precompute:
            inputs = [p.extent() for p in more["params"]]
        elif kind is ReducePartials:
            inputs = [p.extent() for p in more["params"]]
            values = args.channels * (r.grid // -(-args.channels // r.block_x))
        elif kind is ReduceShared:
            outputs = [(i.to, i.rows * i.count * (8 if i.is_double else 4)) for i in more["item"]]
        else:
            inputs = [(args.log_alpha, big), (args.noise, 8 if args.seeded else big), (args.dy, big)]
            outputs = [(a, big) for a in (args.value, args.d_log_alpha, args.d_noise)]
        if kind in (Channelwise, ReducePartials):
            outputs += [(g.data, values * (8 if g.is_double else 4)) for g in more["grads"]]
        for address, size in inputs:
            if address:
                self.bytes_at(address, size, readonly=True)
        written = [self.bytes_at(a, size, unwritten=True) for a, size in outputs if a]
        text = self.rewrite(compiled(kernel, self.sm))
        self.run(Launch(text, kernel, (r.grid,), (r.block_x, r.block_y), r.shared, data))
        for output in written:
            assert self.memory.written(output).all(), f"{kernel} leaves part of an output unwritten"


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL, torch.library.Library]:
    """The binding, registered for CPU tensors under LIBRARY with the schemas of the ops."""
    check_layouts()
    binding = ctypes.CDLL(str(backends.CUDA_BINDING))
    library = torch.library.Library(LIBRARY, "DEF")
    for op in OPS.values():
        for overload in filter(None, op.overloads):
            library.define(str(overload._schema).removeprefix("ctkernels::"))
    binding.ctk_cuda_register(LIBRARY.encode(), b"CPU")
    return binding, library


@contextmanager
def cuda_on_cpu(recorder: Recorder) -> Iterator[Recorder]:
    """Route every op through its CUDA host code, and the kernels through ``recorder``."""
    binding, _ = _library()
    launcher = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Request))(recorder)
    ops = getattr(torch.ops, LIBRARY)

    def kernels(op: Op) -> Kernels:
        def recorded(name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                recorder.begin(args[1] if name.endswith("_backward") else args[0])  # x, after dy
                try:
                    return getattr(ops, name).default(*args)
                except RuntimeError:
                    if recorder.error is not None:
                        raise recorder.error from None
                    raise

            return call

        return Kernels(*(recorded(op.name + suffix) for suffix in ("", "_", "_backward")))

    slot = ctypes.c_void_p.in_dll(binding, "ctk_cuda_launcher")
    previous, slot.value = slot.value, ctypes.cast(launcher, ctypes.c_void_p).value
    try:
        with through_kernels(kernels):
            yield recorder
    finally:
        slot.value = previous
