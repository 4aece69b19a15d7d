"""Orders accesses of GPU streams to a pool's tables without synchronising the host."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_Events = dict[torch.cuda.Stream, torch.cuda.Event]  # the newest of each stream


class Fences:
    """Ensures that a slot is written after all forwards that read its previous adapter, and read after it is written.

    On a GPU, a call that returns is only queued, and another thread's stream may overtake it. Each release and each write
    therefore records an event that streams on the other side wait for. Nothing is recorded during the capture of a CUDA
    graph; its replays are ordered by their stream.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = sorted({device for device in devices if device.type == "cuda"}, key=str)
        self._written: _Events = {}
        self._read: dict[int, _Events] = {}

    def before_read(self) -> None:
        """Makes the current streams wait for all writes."""
        self._wait(self._written)

    def after_read(self, slot: int) -> None:
        """Records that work queued on the current streams may read `slot`."""
        self._record(self._read.setdefault(slot, {}))

    def before_write(self, slot: int) -> None:
        """Makes the current streams wait for all reads of `slot`."""
        self._wait(self._read.pop(slot, {}))

    def after_write(self) -> None:
        """Makes later reads wait for work queued on the current streams."""
        self._record(self._written)

    def _record(self, events: _Events) -> None:
        """Replaces the current streams' events: the newest covers earlier ones."""
        for stream in self._streams():
            events[stream] = stream.record_event()

    def _wait(self, events: _Events) -> None:
        for stream in self._streams():
            for event in events.values():
                stream.wait_event(event)

    def _streams(self) -> list[torch.cuda.Stream]:
        if not self._devices or torch.cuda.is_current_stream_capturing():
            return []
        return [torch.cuda.current_stream(device) for device in self._devices]
