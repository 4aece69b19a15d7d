"""Which slot serves which row: what a pool's sites read while a model runs."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor


class Selection:
    """The slots of the calls made in one block.

    Args:
        index: a slot for each sample of a call, or for each token of a packed one.
        packed: a call has one row in which the tokens of all samples follow each other.

    Attributes:
        last: the site that was computed last, None if none has been.
    """

    __slots__ = ("index", "last", "packed")

    def __init__(self, index: Tensor, packed: bool) -> None:
        self.index = index
        self.packed = packed
        self.last: Any = None

    def align(self, x: Tensor, site: str, samples_first: bool | None = True) -> tuple[Tensor, Tensor]:
        """`x` with a dimension 0 for the slots, and a slot for each index of it.

        Args:
            x: a site's input.
            site: its name, for the message.
            samples_first: whether dimension 0 is known to hold the samples, side by side what belongs to one (beams,
                windows); None: not known, so there have to be just as many.

        Raises:
            ValueError: the slots cannot be told to belong to what is in `x`.
        """
        index, count = self.index, self.index.shape[0]
        if index.device != x.device:
            index = index.to(x.device)  # of a model that is spread over devices
        if self.packed:
            if x.dim() > 1 and x.shape[0] == count:
                return x, index
            if x.dim() > 2 and x.shape[0] == 1 and x.shape[1] == count:
                return x.transpose(0, 1), index
            raise ValueError(
                f"{site}: the pool has an adapter for each of {count} packed tokens, so they must be dimension 0 of what "
                f"comes here, or dimension 1 after a single row, got shape {tuple(x.shape)}"
            )
        rows = x.shape[0] if x.dim() else 0
        if rows == count and samples_first is not False:
            return x, index
        if samples_first and rows and rows % count == 0:
            return x, index.repeat_interleave(rows // count, output_size=rows)
        raise ValueError(
            f"{site}: the pool has an adapter for each of {count} samples, so dimension 0 of what comes here must be those "
            f"samples, got shape {tuple(x.shape)}"
            + ", where it does not grow with the batch"
            * (samples_first is False)
        )


class Current(threading.local):
    """The selection that is in force in a thread. No context variable: torch 2.13 does not compile those."""

    selection: Selection | None = None


class Uncopyable:
    """Base of what a pool leaves on a model: a copy would be served from the pool of the original."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a model with an AdapterPool on it cannot be copied or pickled; remove() the pool first")
