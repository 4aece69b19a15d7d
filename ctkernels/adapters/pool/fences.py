"""Orders what streams of a GPU do with a pool's tables, without waiting on the host."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_Events = dict[torch.cuda.Stream, torch.cuda.Event]  # the newest of each stream


class Fences:
    """A slot is written after the forwards that read its last adapter, and read after it was written.

    On a CPU a call is over when it returns. On a GPU it is only queued then, and another thread's stream may overtake
    it: so each release and each write leaves an event that the other side's stream waits for. Nothing is recorded
    while a CUDA graph is captured; its replays are ordered by the stream that they run on.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = sorted({device for device in devices if device.type == "cuda"}, key=str)
        self._written: _Events = {}
        self._read: dict[int, _Events] = {}

    def before_read(self) -> None:
        """The current streams wait for all writes."""
        self._wait(self._written)

    def after_read(self, slot: int) -> None:
        """What the current streams have queued may read `slot`."""
        self._record(self._read.setdefault(slot, {}))

    def before_write(self, slot: int) -> None:
        """The current streams wait for those that read `slot`."""
        self._wait(self._read.pop(slot, {}))

    def after_write(self) -> None:
        """What reads from now on waits for what the current streams have queued."""
        self._record(self._written)

    def _record(self, events: _Events) -> None:
        """Replace the current streams' events: the newest covers those before."""
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
