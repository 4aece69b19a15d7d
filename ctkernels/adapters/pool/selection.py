"""The selection of slots that a pool's sites read while the model runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Selection:
    """The slots of the calls in one block.

    Args:
        index: a slot per sample of a call, or per token of a packed one.
        packed: whether calls have the tokens of all samples in a single row.

    Attributes:
        last: the last site computed, or None.
    """

    __slots__ = ("index", "last", "packed")

    def __init__(self, index: Tensor, packed: bool) -> None:
        self.index = index
        self.packed = packed
        self.last: Any = None

    def align(self, x: Tensor, site: str, samples_first: bool | None = True) -> tuple[Tensor, Tensor]:
        """`x` with samples or tokens in dimension 0, and a slot for each index of it.

        Args:
            x: a site's input.
            site: its name, for the message.
            samples_first: whether dimension 0 holds the samples, possibly several adjacent rows each (beams, windows).
                None: unknown; then it must have exactly one row per sample.

        Raises:
            ValueError: the slots cannot be matched with `x`.
        """
        index, count = self.index, self.index.shape[0]
        if index.device != x.device:
            index = index.to(x.device)  # for a model that is spread over devices
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
    """The current selection, per thread. Not a context variable, which torch 2.13 cannot compile.

    Attributes:
        watch: a monitor's function of a site's name, what is edited there, and the slot of each row; None if none watches.
    """

    selection: Selection | None = None
    watch: Callable[[str, Tensor, Tensor], None] | None = None


class Uncopyable:
    """Base class of a pool's objects on a model, which must not be copied: a copy would use the original's pool."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a model with an AdapterPool on it cannot be copied or pickled; remove() the pool first")
