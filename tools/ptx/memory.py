"""Device memory. A buffer's device address IS its host address, so pointers packed by real launch code just work.

Only registered bytes may be touched. Each byte carries flags: registered, written, writable.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .values import RAW, U8

ALLOWED, WRITTEN, WRITABLE = 1, 2, 4


def gather(flat: np.ndarray, offset: np.ndarray, size: int, base: int = 0) -> np.ndarray:
    """Bytes [n, size] at the offsets. `base` is the address of flat[0], whose alignment decides how to read."""
    if size & (size - 1) == 0 and base % size == 0:
        if size <= 8:
            return flat[: flat.size // size * size].view(RAW[size])[offset // size].view(U8).reshape(-1, size)
        rows = flat[: flat.size // size * size].view(np.uint64).reshape(-1, size // 8)
        return rows[offset // size].view(U8)
    return flat[offset[:, None] + np.arange(size)]


def scatter(flat: np.ndarray, offset: np.ndarray, data: np.ndarray, base: int = 0) -> None:
    """Stores bytes [n, size] at the offsets; of two lanes that hit the same place, the later one wins."""
    size = data.shape[1]
    if size & (size - 1) == 0 and base % size == 0:
        data = np.ascontiguousarray(data)
        if size <= 8:
            flat[: flat.size // size * size].view(RAW[size])[offset // size] = data.view(RAW[size])[:, 0]
        else:
            rows = flat[: flat.size // size * size].view(np.uint64).reshape(-1, size // 8)
            rows[offset // size] = data.view(np.uint64)
    else:
        flat[offset[:, None] + np.arange(size)] = data


class Buffer:
    """One host allocation: its bytes and their flags."""

    def __init__(self, base: int, size: int, owner: Any, name: str):
        self.base, self.size, self.owner, self.name = base, size, owner, name
        if size:
            self.data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        else:
            self.data = np.zeros(0, U8)
        self.state = np.zeros(size, U8)

    def __repr__(self) -> str:
        return f"{self.name} ({self.size} bytes)"


def extent(obj: Any) -> tuple[int, int, int, int, Any]:
    """(allocation base, allocation size, first byte, end) of a tensor or array, and what keeps it alive."""
    if hasattr(obj, "untyped_storage"):
        if obj.device.type != "cpu":
            raise ValueError(f"only CPU tensors can stand in for device buffers, not {obj.device}")
        storage = obj.untyped_storage()
        span = 0
        if obj.numel():
            span = (sum((n - 1) * s for n, s in zip(obj.shape, obj.stride())) + 1) * obj.element_size()
        return storage.data_ptr(), storage.nbytes(), obj.data_ptr(), obj.data_ptr() + span, storage
    root = obj
    while isinstance(root.base, np.ndarray):
        root = root.base
    low, high = np.lib.array_utils.byte_bounds(obj)
    start, end = np.lib.array_utils.byte_bounds(root)
    return start, end - start, low, high if obj.size else low, obj


class Memory:
    """The registered buffers of a sequence of launches."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self._bases = np.zeros(0, np.int64)
        self._sorted: list[Buffer] = []

    def register(self, obj: Any, *, unwritten: bool = False, readonly: bool = False, name: str | None = None) -> int:
        """Makes a CPU tensor's or numpy array's memory accessible and returns its device address.

        Only the bytes the tensor spans are accessible, not the rest of its storage. `unwritten` marks them as garbage
        that must be written before it is read, `readonly` as never to be written. Registering again is harmless and
        keeps the flags, unless it sets one.
        """
        base, size, low, high, owner = extent(obj)
        buffer = self.buffers.get(base)
        if buffer is None or buffer.size != size:
            buffer = self.buffers[base] = Buffer(base, size, owner, name or f"buffer {len(self.buffers)}")
            self._sorted = sorted(self.buffers.values(), key=lambda b: b.base)
            self._bases = np.array([b.base for b in self._sorted], np.int64)
        elif name:
            buffer.name = name
        state = buffer.state[low - base : high - base]
        state |= np.where(state & ALLOWED, U8(0), U8(ALLOWED | WRITTEN | WRITABLE))
        if unwritten:
            state &= U8(~WRITTEN & 255)
        if readonly:
            state &= U8(~WRITABLE & 255)
        return low

    def address_of(self, obj: Any) -> int:
        """The device address of a registered tensor or array: its host address."""
        base, size, low, _, _ = extent(obj)
        if base not in self.buffers or self.buffers[base].size != size:
            raise KeyError("not registered")
        return low

    def find(self, address: int) -> Buffer | None:
        """The buffer whose allocation holds an address."""
        k = int(np.searchsorted(self._bases, address, "right")) - 1
        if k < 0:
            return None
        buffer = self._sorted[k]
        return buffer if address < buffer.base + buffer.size else None

    def near(self, address: int) -> str:
        """Where an address outside all buffers lies, for messages."""
        around = [(min(abs(address - b.base), abs(address - b.base - b.size)), b) for b in self._sorted]
        distance, buffer = min(around, key=lambda x: x[0], default=(0, None))
        if buffer is None or distance > 1 << 20:
            return f"{address:#x}, in no buffer"
        return f"byte {address - buffer.base} of {buffer!r}, in no buffer"

    def written(self, obj: Any) -> np.ndarray:
        """Which bytes of a registered tensor hold data (a boolean per byte of its span)."""
        base, _, low, high, _ = extent(obj)
        return (self.buffers[base].state[low - base : high - base] & WRITTEN) != 0

    def groups(self, address: np.ndarray) -> list[tuple[Buffer | None, np.ndarray | None]]:
        """Splits addresses by buffer: (buffer, positions), positions None meaning all."""
        if not self._sorted:
            return [(None, None)]
        low, high = int(address.min()), int(address.max())
        buffer = self.find(low)
        if buffer is not None and high < buffer.base + buffer.size:
            return [(buffer, None)]
        which = np.searchsorted(self._bases, address, "right") - 1
        out: list[tuple[Buffer | None, np.ndarray | None]] = []
        for k in np.unique(which):
            at = np.flatnonzero(which == k)
            if k < 0:
                out.append((None, at))
                continue
            buffer = self._sorted[k]
            inside = address[at] < buffer.base + buffer.size
            if inside.any():
                out.append((buffer, at[inside]))
            if not inside.all():
                out.append((None, at[~inside]))
        return out
