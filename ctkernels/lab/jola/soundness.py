"""Whether the runs in a result are what they say, before a comparison goes on from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .._weights import damage
from .result import Cell

Rank = Callable[[Mapping[str, float]], tuple[float, ...]]


def weights_path(folder: str | os.PathLike[str], cell: Cell) -> Path:
    """Where a comparison in ``folder`` keeps what a run trained."""
    setting = "".join(f"-{name}={_number(value)}" for name, value in cell.setting.items())
    return Path(folder) / "weights" / f"{cell.method}-{cell.seed}{setting}.safetensors"


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)  # six digits may not tell two settings apart


def title(cell: Cell) -> str:
    """A run in words: ``"jola, seed 0, lr 0.005"``."""
    return ", ".join([cell.method, f"seed {cell.seed}", *(f"{k} {v:g}" for k, v in cell.setting.items())])


def sound(cells: Iterable[Cell], folder: Path, tests: int, primary: str, rank: Rank) -> tuple[list[Cell], list[str]]:
    """The runs that can be gone on from, and for every other one a sentence that says why it is done again.

    A tested run needs the weights that it left. Of the others only the one that validation will choose does, which is
    seen when it is tested.

    Args:
        cells: the runs of a result.
        folder: where it is.
        tests: number of test examples.
        primary: the metric that ``each`` of a run holds.
        rank: what makes one epoch better than another.
    """
    kept, told = [], []
    for cell in cells:
        reason = contradiction(cell, tests, primary, rank)
        if reason is None and cell.test is not None and cell.epochs:
            reason = damage(weights_path(folder, cell), cell.weights)
        if reason is None:
            kept.append(cell)
        else:
            told.append(f"{title(cell)}: {reason}; this run is done again")
    return kept, told


def contradiction(cell: Cell, tests: int, primary: str, rank: Rank) -> str | None:
    """What in a run does not agree with the rest of it; None if nothing."""
    try:
        ranks = [rank(epoch) for epoch in cell.epochs]
        if not all(math.isfinite(value) for own in ranks for value in own):
            return "its epochs are not numbers of validation"
        best = ranks.index(max(ranks)) + 1 if ranks else 0
        if cell.best != best:
            return f"it names epoch {cell.best} as its best, which is epoch {best}"
        if cell.test is not None:
            whole = cell.test[primary]
            mean = 100 * sum(cell.each) / tests
            if len(cell.each) != tests or not math.isclose(whole, mean, rel_tol=1e-9, abs_tol=1e-9):
                return f"its {primary}, {whole}, is not that of its {tests} test examples"
    except (KeyError, TypeError, AttributeError) as error:
        return f"it is damaged ({error!r})"
    return None
