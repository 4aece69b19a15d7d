"""The processes of torchrun: their number, and what they exchange."""

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
    """A process group: this process's number (``rank``) among ``size``; number 0 collects."""

    rank: int = 0
    size: int = 1

    def gather(self, block: Tensor) -> list[Tensor]:
        """Gather blocks of one shape from all processes: on rank 0 their list, in order; elsewhere an empty one."""
        if self.size == 1:
            return [block]
        blocks = [torch.empty_like(block) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(block, blocks, dst=0)
        return blocks or []

    def share(self, value: T) -> T:
        """Give every process rank 0's ``value``."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def interleave(self, items: Sequence[T], count: int) -> list[T]:
        """Give every process all items in order; this one has those numbered rank, rank + size, ..."""
        if self.size == 1:
            return list(items)
        boxes: list[Sequence[T]] = [()] * self.size
        dist.all_gather_object(boxes, items)
        return [boxes[i % self.size][i // self.size] for i in range(count)]

    def meet(self) -> None:
        """Wait for all processes, so that none ends while another still listens to it."""
        if self.size > 1:
            dist.barrier()


def launched_rank() -> int:
    """This process's number under torchrun, 0 without."""
    return int(os.environ.get("RANK", "0"))


def launched_device() -> torch.device:
    """The GPU that belongs to this process if there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def group(device: torch.device) -> Group:
    """Return the process group that is initialised; else open torchrun's (nccl for a GPU, gloo for the CPU) if there is one.

    torchrun's is opened once and closed when the process ends: gloo cannot open a second one in its place reliably.
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
