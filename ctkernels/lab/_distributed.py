"""Process groups under torchrun, and the exchange of values among their processes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """A process group: the ``rank`` of this process among ``size``. Rank 0 collects results and writes files."""

    rank: int = 0
    size: int = 1

    def gather(self, block: Tensor) -> list[Tensor]:
        """Gathers blocks of one shape: on rank 0 the list of all processes' blocks, by rank; elsewhere an empty list."""
        if self.size == 1:
            return [block]
        blocks = [torch.empty_like(block) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(block, blocks, dst=0)
        return blocks or []

    def share(self, value: T) -> T:
        """Broadcasts rank 0's ``value``."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def interleave(self, items: Sequence[T], count: int) -> list[T]:
        """Collects ``count`` items in order on every process; this one has items rank, rank + size, ..."""
        if self.size == 1:
            return list(items)
        boxes: list[Sequence[T]] = [()] * self.size
        dist.all_gather_object(boxes, items)
        return [boxes[i % self.size][i // self.size] for i in range(count)]

    def meet(self) -> None:
        """Waits for all processes, so that none exits while another still communicates with it."""
        if self.size > 1:
            dist.barrier()

    def check_batch_size(self, batch_size: int) -> None:
        """ValueError unless every process gets an equal part of each batch."""
        if batch_size % self.size:
            raise ValueError(f"batch_size must be a multiple of the {self.size} processes, got {batch_size}")


def launched_rank() -> int:
    """The rank of this process under torchrun, 0 without it."""
    return int(os.environ.get("RANK", "0"))


def launched_device() -> torch.device:
    """The GPU assigned to this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def group(device: torch.device) -> Group:
    """The initialised process group; else torchrun's, which it initialises (nccl for a GPU, gloo for the CPU).

    torchrun's group stays open until the process ends: gloo does not reliably open a second one in its place.
    """
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        return Group()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The other processes wait while rank 0 fits probes, so the limit is generous.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    atexit.register(_close)
    return Group(dist.get_rank(), dist.get_world_size())


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
