"""One launch: arguments to parameter bytes, blocks in batches, race shadows of the buffers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import Fault
from .machine import Machine
from .memory import WRITABLE, Buffer, Memory
from .parser import Variable
from .program import Program
from .races import Shadow

RAW_BYTES = (bytes, bytearray, memoryview, ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._SimpleCData)
LANES = 16384  # lanes that run together: enough to amortise numpy calls, few enough to stay in cache
MAX_STEPS = 1_000_000
SHARED_LIMIT = 227 * 1024


def pack_argument(variable: Variable, value: Any, memory: Memory) -> bytes:
    """The bytes of one kernel parameter.

    Tensors and arrays pass their address (and are registered if they are not), ints and floats their value in the
    width of the parameter, bytes and ctypes objects themselves.
    """
    if hasattr(value, "untyped_storage") or isinstance(value, np.ndarray):
        address = memory.register(value)
        raw = struct.pack("<Q", address)
    elif isinstance(value, RAW_BYTES):
        raw = bytes(value)
    elif value is None:
        raw = bytes(variable.size)
    elif isinstance(value, bool | int | np.integer):
        raw = (int(value) & ((1 << 8 * variable.size) - 1)).to_bytes(variable.size, "little")
    elif isinstance(value, float | np.floating):
        if variable.size not in (4, 8):
            raise Fault("launch", f"float for the {variable.size}-byte parameter {variable.name}")
        raw = struct.pack("<f" if variable.size == 4 else "<d", value)
    else:
        raise TypeError(f"argument {value!r}")
    if len(raw) != variable.size:
        raise Fault("launch", f"parameter {variable.name} has {variable.size} bytes, the argument {len(raw)}")
    return raw


class Run:
    """A launch in progress."""

    def __init__(
        self,
        program: Program,
        args: Sequence[Any] | bytes,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int = 0,
        *,
        memory: Memory | None = None,
        races: bool = True,
        approx: int = 0,
        max_steps: int = MAX_STEPS,
    ):
        self.program, self.memory = program, memory or Memory()
        self.grid, self.block = (tuple(int(v) for v in (*t, 1, 1)[:3]) for t in (grid, block))
        self.shared, self.races, self.approx, self.max_steps = shared, races, approx, max_steps
        self.shared_size = -(-program.shared // program.dynamic_align) * program.dynamic_align if shared else 0
        self.shared_size = max(program.shared, self.shared_size + shared)
        self.grid_blocks = int(np.prod(self.grid))
        self._check()
        self.params = self._pack(args)
        program.hosted(self.memory)
        self.lanes_per_block = -(-int(np.prod(self.block)) // 32) * 32
        self._shadows: dict[int, Shadow | None] = {}
        self._locations: dict[int, np.ndarray] = {}
        self.steps = 0

    def _check(self) -> None:
        threads, entry = int(np.prod(self.block)), self.program.entry
        limits = (1024, 1024, 64)
        if threads < 1 or threads > 1024 or any(b > n for b, n in zip(self.block, limits)):
            raise Fault("launch", f"block {self.block}")
        if self.grid_blocks < 1 or self.grid[0] >= 2**31 or max(self.grid[1:]) > 65535:
            raise Fault("launch", f"grid {self.grid}")
        if threads > self.program.max_threads:
            raise Fault("launch", f"block {self.block} of a kernel compiled for {self.program.max_threads} threads")
        if entry.exact_block and (*entry.exact_block, 1, 1)[:3] != self.block:
            raise Fault("launch", f"block {self.block} of a kernel compiled for {entry.exact_block}")
        if self.shared_size > SHARED_LIMIT:
            raise Fault("launch", f"{self.shared_size} bytes of shared memory")

    def _pack(self, args: Sequence[Any] | bytes) -> np.ndarray:
        out = np.zeros(self.program.param_bytes, np.uint8)
        if isinstance(args, bytes):
            if len(args) != len(out):
                raise Fault("launch", f"{len(args)} bytes of arguments for {len(out)} bytes of parameters")
            out[:] = np.frombuffer(args, np.uint8)
            return out
        if len(args) != len(self.program.params):
            raise Fault("launch", f"{len(args)} arguments for {len(self.program.params)} parameters")
        for (variable, offset), value in zip(self.program.params, args):
            raw = pack_argument(variable, value, self.memory)
            out[offset : offset + len(raw)] = np.frombuffer(raw, np.uint8)
        return out

    def new_shadow(self, size: int) -> Shadow:
        """Race detection for this many bytes."""
        return Shadow(size // self.program.granule + 2, self.lanes_per_block)

    def shadow(self, buffer: Buffer) -> Shadow | None:
        """Race detection for a buffer; None where nothing can be written."""
        if not self.races:
            return None
        if buffer.base not in self._shadows:
            writable = bool((buffer.state & WRITABLE).any())
            self._shadows[buffer.base] = self.new_shadow(buffer.size) if writable else None
        return self._shadows[buffer.base]

    def location(self, address: int) -> np.ndarray:
        """What strong accesses to an address have published: for every thread of the grid, a time."""
        if address not in self._locations:
            self._locations[address] = np.zeros(self.grid_blocks * self.lanes_per_block, np.int64)
        return self._locations[address]

    def execute(self) -> Run:
        """Runs the whole grid, a batch of blocks at a time."""
        batch = max(1, LANES // self.lanes_per_block)
        with np.errstate(all="ignore"):
            for first in range(0, self.grid_blocks, batch):
                machine = Machine(self, first, min(batch, self.grid_blocks - first))
                if first:
                    machine.order.now = self._now
                machine.run()
                self._now = machine.order.now + 1
                self.steps += machine.steps
        return self
