"""Edit sizes of one batch of inputs, per row and head, accumulated over forward passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Inputs:
    """The relative sizes of edits in each row of a batch, all on the device.

    Attributes:
        total, count: sum over a row's tokens, and number of tokens, (rows, heads of all sites).
        low, high: smallest and largest size, (rows, heads of all sites).
        ids: token ids and padding mask of each pass, both (rows, tokens); kept only for a history.
        number: number of the watched batch, from 1.
        passes: number of passes.
        adapters: of a pool's monitor, what names the adapters of the rows.
    """

    total: Tensor
    count: Tensor
    low: Tensor
    high: Tensor
    ids: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    number: int = 0
    passes: int = 1
    adapters: Any = None

    @classmethod
    def of(cls, sizes: Tensor, real: Tensor | None) -> Inputs:
        """One pass, from ``sizes`` (sites, rows, tokens, heads) and ``real`` (rows, tokens), False for padding."""
        sites, rows, tokens, heads = sizes.shape
        if real is None:
            total, low, high = sizes.sum(2), sizes.amin(2), sizes.amax(2)
            count = sizes.new_full((rows, sites * heads), tokens)
        else:
            padding = ~real.unsqueeze(-1)
            total = sizes.masked_fill(padding, 0).sum(2)
            low, high = sizes.masked_fill(padding, torch.inf).amin(2), sizes.masked_fill(padding, -torch.inf).amax(2)
            count = real.sum(1, keepdim=True).expand(rows, sites * heads).to(sizes.dtype)
        total, low, high = (value.transpose(0, 1).reshape(rows, -1) for value in (total, low, high))
        return cls(total, count, low, high)

    @classmethod
    def nothing(cls, rows: int, heads: int, like: Tensor) -> Inputs:
        """The value for a site that no token reached."""
        zero, infinite = like.new_zeros(rows, heads), like.new_full((rows, heads), torch.inf)
        return cls(zero, zero, infinite, -infinite)

    @classmethod
    def joined(cls, measured: list[tuple[list[int], Inputs]], widths: list[int]) -> Inputs:
        """One pass, from the numbers of sites and what was measured there, on the device of the first.

        ``widths``: number of heads by site. Sites may be missing, and may come several times.
        """
        numbers, first = [number for sites, _ in measured for number in sites], measured[0][1]
        if len(measured) == 1 and numbers == list(range(len(widths))):
            return first
        by_site: dict[int, Inputs] = {}
        for sites, inputs in measured:
            for number, part in zip(sites, inputs._split([widths[number] for number in sites])):
                if number in by_site:
                    by_site[number].add(part)
                else:
                    by_site[number] = part
        parts = [
            by_site[number] if number in by_site else cls.nothing(len(first), heads, first.total)
            for number, heads in enumerate(widths)
        ]
        device = first.total.device
        blocks = [torch.stack([p.total, p.count, p.low, p.high]).to(device, non_blocking=True) for p in parts]
        total, count, low, high = torch.cat(blocks, -1).unbind(0)
        return cls(total, count, low, high)

    def _split(self, widths: list[int]) -> list[Inputs]:
        total, count, low, high = (value.split(widths, 1) for value in (self.total, self.count, self.low, self.high))
        return [Inputs(*values) for values in zip(total, count, low, high)]

    def of_rows(self, numbers: list[int]) -> Inputs:
        """Some of the rows, without ids."""
        return Inputs(self.total[numbers], self.count[numbers], self.low[numbers], self.high[numbers])

    def add(self, other: Inputs) -> None:
        """Accumulate a later pass over the same rows."""
        self.total, self.count = self.total + other.total, self.count + other.count
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.passes += other.passes

    @property
    def mean(self) -> Tensor:
        """The mean over each row's tokens, (rows, heads); 0 for rows without tokens."""
        return self.total / self.count.clamp_min(1)

    def __len__(self) -> int:
        return len(self.total)
