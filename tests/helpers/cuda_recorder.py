"""Runs the CUDA backend's own host code on CPU tensors, without a GPU.

The binding that a GPU would get is registered for CPU tensors under another name, with a launcher that compiles the kernel
it is asked for with nvcc and executes the PTX on the CPU, with bounds, races and uninitialised memory checked. Names, grids,
shared memory and argument bytes are those that the host code made.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import recorder
import torch
from ptx import Memory
from ptx.launch import Launch
from ptx.toolchain import compile_cuda
from recorder import Launched
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


class Static(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("raw", ctypes.c_bool), ("eps", ctypes.c_double)]


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
    _fields_ = [
        ("tiling", Tiling),
        *((n, ctypes.c_void_p) for n in ("x", "residual", "dy", "y", "dx", "dresidual", "partial")),
        ("knobs", ctypes.c_void_p), ("wanted", ctypes.c_uint32), ("knob_rows", ctypes.c_uint32), ("ctu", Static),
        ("params", ParamRef * 5), ("grads", GradRef * 5),
    ]  # fmt: skip


class Knobs(ctypes.Structure):
    _fields_ = [
        ("to", ctypes.c_void_p), ("rows", ctypes.c_uint32), ("channels", ctypes.c_uint32), ("ctu", Static),
        ("params", ParamRef * 2),
    ]  # fmt: skip


class Finish(ctypes.Structure):
    _fields_ = [
        ("partial", ctypes.c_void_p), ("columns", ctypes.c_int64),
        *((n, ctypes.c_uint32) for n in ("channels", "inner", "repeat", "slots", "wanted")),
        ("ctu", Static), ("params", ParamRef * 5), ("grads", GradRef * 5),
    ]  # fmt: skip


class Item(ctypes.Structure):
    _fields_ = [
        ("from_", ctypes.c_void_p), ("to", ctypes.c_void_p),
        *((n, ctypes.c_uint32) for n in ("rows", "count", "run", "first")), ("is_double", ctypes.c_bool),
    ]  # fmt: skip


class Collect(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint32) for n in ("groups", "channels", "items")] + [("item", Item * 5)]


class Gates(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("log_alpha", "noise", "dy", "value", "d_log_alpha", "d_noise")),
        ("n", ctypes.c_int64), ("mode", ctypes.c_int), ("temperature", ctypes.c_double), ("low", ctypes.c_double),
        ("high", ctypes.c_double), ("seeded", ctypes.c_bool),
    ]  # fmt: skip


def structure(kernel: str) -> type[ctypes.Structure]:
    """The argument of a kernel."""
    if kernel in ("ctk_collect", "ctk_ctu_knobs"):
        return Collect if kernel == "ctk_collect" else Knobs
    return Finish if "_finish_" in kernel else Gates if "_gates_" in kernel else Channelwise


def source(kernel: str) -> Path:
    """The file that instantiates a kernel."""
    if structure(kernel) is not Channelwise:
        return SOURCES / "cuda/small.cu"
    found = re.fullmatch(r"ctk_(\w+)_(?:forward|backward)_(\w+)_(?:plane|lanes)_(?:one|wide|lean)", kernel)
    assert found, kernel
    return SOURCES / ("cuda/head_edit.cu" if found[1] == "head_edit" else f"cuda/ctu_{found[2]}.cu")


@lru_cache(maxsize=256)
def compiled(kernel: str, sm: int) -> str:
    """PTX of one kernel."""
    options = [*OPTIONS, f'-DCTK_SELECT=" {kernel} "']
    text = compile_cuda(source(kernel), sm, options=options, include=[SOURCES])
    # the other entries of the file are empty
    empty = re.compile(r"^\.visible \.entry (\w+)\((?:.*?)^\}\n", re.M | re.S)
    return empty.sub(lambda m: m[0] if m[1] == kernel else "", text)


class Recorder(recorder.Recorder):
    """Stands in for the library of kernels. The detail of a launch is the argument of the kernel."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.known: dict[int, np.ndarray] = {}
        self.numel = self.itemsize = 0
        self.error: BaseException | None = None

    def begin(self, x: Tensor) -> None:
        """A call of an op on ``x``."""
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
        """Registers memory once; later launches of the same call find it as the earlier ones left it."""
        if address not in self.known:
            self.known[address] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            self.memory.register(self.known[address], **flags)
        return self.known[address]

    def execute(self, r: Request) -> None:
        kernel, kind = r.kernel.decode(), structure(r.kernel.decode())
        assert r.args_size == ctypes.sizeof(kind), kernel
        args = kind.from_buffer_copy(ctypes.string_at(r.args, r.args_size))
        self.launches.append(Launched(kernel, r.grid, getattr(args, "wanted", None), args))
        outputs: list[tuple[int | None, int]] = []
        inputs: list[tuple[int | None, int]] = []
        scratch = {r.scratch[i].data: r.scratch[i].bytes for i in range(r.scratch_count)}
        for address, size in scratch.items():
            self.bytes_at(address, size, unwritten=True)
        big = self.numel * self.itemsize
        if kind is Channelwise:
            inputs = [(args.x, big)] if args.x != args.y else []
            inputs += [(args.residual, big), (args.dy, big), *(p.extent() for p in args.params)]
            outputs = [(a, big) for a in (args.y, args.dx, args.dresidual) if a != args.x]
            if args.x == args.y:
                self.bytes_at(args.x, big)
            values = args.tiling.channels * (self.numel // (args.tiling.group or 1))
        elif kind is Knobs:
            inputs = [p.extent() for p in args.params]
        elif kind is Finish:
            inputs = [p.extent() for p in args.params]
            values = args.channels * (r.grid // -(-args.channels // r.block_x))
        elif kind is Collect:
            outputs = [(i.to, i.rows * i.count * (8 if i.is_double else 4)) for i in args.item[: args.items]]
        else:
            inputs = [(args.log_alpha, big), (args.noise, 8 if args.seeded else big), (args.dy, big)]
            outputs = [(a, big) for a in (args.value, args.d_log_alpha, args.d_noise)]
        if kind in (Channelwise, Finish):
            outputs += [(g.data, values * (8 if g.is_double else 4)) for g in args.grads]
        for address, size in inputs:
            if address:
                self.bytes_at(address, size, readonly=True)
        written = [self.bytes_at(a, size, unwritten=True) for a, size in outputs if a]
        text = self.rewrite(compiled(kernel, self.sm))
        self.run(Launch(text, kernel, (r.grid,), (r.block_x, r.block_y), r.shared, bytes(args)))
        for output in written:
            assert self.memory.written(output).all(), f"{kernel} leaves part of an output unwritten"


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL, torch.library.Library]:
    """The binding, registered for CPU tensors under LIBRARY with the schemas of the real ops."""
    binding = ctypes.CDLL(str(backends.CUDA_BINDING))
    library = torch.library.Library(LIBRARY, "DEF")
    for op in OPS.values():
        for overload in filter(None, op.overloads):
            library.define(str(overload._schema).removeprefix("ctkernels::"))
    binding.ctk_cuda_register(LIBRARY.encode(), b"CPU")
    return binding, library


@contextmanager
def cuda_on_cpu(recorder: Recorder) -> Iterator[Recorder]:
    """Every op goes through its CUDA host code, and its kernels through ``recorder``."""
    binding, _ = _library()
    launcher = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Request))(recorder)
    ops = getattr(torch.ops, LIBRARY)

    def kernels(op: Op) -> Kernels:
        def recorded(name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                recorder.begin(args[0])
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
        with mock.patch.object(Op, "kernels", kernels):
            yield recorder
    finally:
        slot.value = previous
