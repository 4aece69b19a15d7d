"""Edit sizes of one batch of inputs, per row and head, accumulated over forward passes."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    total: Tensor
    count: Tensor
    low: Tensor
    high: Tensor
    ids: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    number: int = 0
    passes: int = 1

    @classmethod
    def of(cls, sizes: Tensor, real: Tensor | None) -> Inputs:
        """One pass at one site, from ``sizes`` (rows, tokens, heads) and ``real`` (rows, tokens), False for padding."""
        rows, tokens, heads = sizes.shape
        if real is None:
            low, high = sizes.amin(1), sizes.amax(1)
            return cls(sizes.sum(1), sizes.new_full((rows, heads), tokens), low, high)
        padding = ~real.unsqueeze(-1)
        low, high = sizes.masked_fill(padding, torch.inf).amin(1), sizes.masked_fill(padding, -torch.inf).amax(1)
        total, count = (
            sizes.masked_fill(padding, 0).sum(1),
            real.sum(1, keepdim=True).expand(rows, heads).to(sizes.dtype),
        )
        return cls(total, count, low, high)

    @classmethod
    def nothing(cls, rows: int, heads: int, like: Tensor) -> Inputs:
        """The value for a site that no token reached."""
        zero, infinite = like.new_zeros(rows, heads), like.new_full((rows, heads), torch.inf)
        return cls(zero, zero, infinite, -infinite)

    @classmethod
    def joined(cls, parts: list[Inputs]) -> Inputs:
        """The sites of one pass, concatenated along heads, on the device of the first."""
        device = parts[0].total.device
        blocks = [torch.stack([p.total, p.count, p.low, p.high]).to(device, non_blocking=True) for p in parts]
        total, count, low, high = torch.cat(blocks, -1).unbind(0)
        return cls(total, count, low, high)

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
