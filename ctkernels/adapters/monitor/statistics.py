"""Statistics of the completed inputs of one adapter, on its device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .inputs import Inputs
from .reference import Reference, Window


@dataclass(frozen=True)
class Snapshot:
    """The statistics of a monitor as Python numbers; lists are over heads, in the order of :attr:`EditMonitor.heads`.

    Attributes:
        inputs, outside: number of completed rows, and of those outside the range.
        total, count: sum of edit sizes over tokens, and number of tokens.
        high: largest edit size.
        beyond: number of inputs in which the head was outside its range.
        windows, alarms: number of full windows, and of those above the threshold.
        drift: distance of the last full window; None before the first.
    """

    inputs: int
    outside: int
    total: list[float]
    count: list[float]
    high: list[float]
    beyond: list[float]
    windows: int
    alarms: int
    drift: list[float] | None


class Statistics:
    """Sums over completed inputs, compared with a reference if there is one. Nothing synchronises with the device but reads.

    Attributes:
        rows: number of completed inputs.
        reference: the result of calibration, or None.
        window: the current window of inputs that is compared with the reference, or None.
        sums: sum of edit sizes over tokens, and number of tokens, (2, heads).
        low, high: smallest and largest edit size, (heads,).
    """

    def __init__(self, heads: int, device: torch.device, tolerance: float) -> None:
        self.reference: Reference | None = None
        self._heads, self._device, self._tolerance = heads, device, tolerance
        self.reset()

    def reset(self) -> None:
        """Forget the inputs; the reference is kept."""
        self.rows = 0
        with torch.inference_mode(False):  # so that they can be updated outside of it too
            kind = torch.float32 if self._device.type == "mps" else torch.float64
            self.sums = torch.zeros(2, self._heads, dtype=kind, device=self._device)
            self.low = torch.full((self._heads,), torch.inf, dtype=kind, device=self._device)
            self.high = -self.low
            self._beyond_by_head = torch.zeros(self._heads, dtype=torch.long, device=self._device)
            self._outside = torch.zeros((), dtype=torch.long, device=self._device)
            self.window = _new_window(self.reference)
            self._ended: torch.Event | None = None  # recorded after the last inputs were counted; None on a CPU

    def place(self, reference: Reference) -> None:
        """Compare later inputs with another reference."""
        with torch.inference_mode(False):
            self.reference = reference.to(self._device)
            self.window = _new_window(self.reference)

    def beyond(self, inputs: Inputs) -> Tensor:
        """Whether each head of each row is outside the range, (rows, heads), on the device."""
        if self.reference is None:
            return torch.zeros_like(inputs.low, dtype=torch.bool)
        return self.reference.beyond(inputs.low, inputs.high, self._tolerance)

    def add(self, inputs: Inputs) -> None:
        """Count completed inputs."""
        self.rows += len(inputs)
        self.sums += torch.stack([inputs.total, inputs.count]).to(self.sums.dtype).sum(1)
        torch.minimum(self.low, inputs.low.amin(0), out=self.low)
        torch.maximum(self.high, inputs.high.amax(0), out=self.high)
        if self.reference is not None:
            beyond = self.beyond(inputs)
            self._beyond_by_head += beyond.sum(0)
            self._outside += beyond.any(-1).sum()
        if self.window is not None:
            self.window.add(inputs.mean)
        if self._device.type != "cpu":
            self._ended = torch.Event(self._device)
            self._ended.record()

    @property
    def outside(self) -> int:
        """The number of :attr:`rows` outside the range; synchronises with the device."""
        return int(self._outside)

    def snapshot(self) -> Snapshot:
        """The statistics in one read from the device, which waits for the passes of completed inputs."""
        if self._ended is not None:
            self._ended.synchronize()
        window, heads = self.window, self._heads
        parts = [*self.sums, self.high, self._beyond_by_head, self._outside.view(1)]
        parts += [] if window is None else [window.distances, window.alarms.view(1)]
        values = torch.cat([part.to(self.sums.dtype) for part in parts]).tolist()
        total, count, high, beyond = (values[i * heads : (i + 1) * heads] for i in range(4))
        seen = Snapshot(self.rows, int(values[4 * heads]), total, count, high, beyond, 0, 0, None)
        if window is not None and window.number:
            alarms, drift = int(values[-1]), values[4 * heads + 1 : -1]
            seen = replace(seen, windows=window.number, alarms=alarms, drift=drift)
        return seen


def _new_window(reference: Reference | None) -> Window | None:
    return Window(reference.drift) if reference is not None and reference.drift is not None else None
