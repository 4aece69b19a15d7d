"""Whether the runs in a result are what they say, before a comparison goes on from them."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

from .._weights import damage
from .heads import rank
from .result import Cell, TransferComparison, describe


def weights_path(folder: Path, cell: Cell) -> Path:
    """Where a run keeps what it trained."""
    name = re.sub(r"[^\w.+-]+", "-", f"{cell.model}_{cell.data}_{cell.method}_{cell.seed}")
    return folder / "weights" / f"{name}_{hashlib.sha256(repr(cell.key).encode()).hexdigest()[:8]}.safetensors"


def title(cell: Cell) -> str:
    """A run in words: ``"resnet18, flowers, tct, seed 42, lr 0.1"``."""
    return f"{cell.model}, {cell.data}, {cell.method}, seed {cell.seed}, {describe(cell.setting)}"


def sound(result: TransferComparison, folder: Path) -> tuple[TransferComparison, list[str]]:
    """The runs that can be gone on from, and for every other one a sentence that says why it is done again.

    A tested run needs the weights that it left. Of the others only the one that validation will choose does, which is
    seen when it is tested.
    """
    kept, told = [], []
    for cell in result.cells:
        reason = contradiction(cell, result.setup)
        if reason is None and cell.test is not None:
            reason = damage(weights_path(folder, cell), cell.weights)
        if reason is None:
            kept.append(cell)
        else:
            told.append(f"{title(cell)}: {reason}; this run is done again")
    return TransferComparison(tuple(kept), result.setup, result.seconds), told


def contradiction(cell: Cell, setup: dict[str, Any]) -> str | None:
    """What in a run does not agree with the rest of it; None if nothing."""
    try:
        ranks = [rank(epoch) for epoch in cell.epochs]
        if not ranks or not all(math.isfinite(value) for pair in ranks for value in pair):
            return f"its {len(ranks)} epochs are not numbers of validation"
        best = ranks.index(max(ranks)) + 1
        if cell.best != best:
            return f"it names epoch {cell.best} as its best, which is epoch {best}"
        if search := cell.detail.get("search"):
            found = max(search, key=lambda row: (row["val_accuracy"], 2.0 if row["beta"] is None else row["beta"]))
            if found["beta"] != cell.detail["beta"]:
                return f"it names beta {cell.detail['beta']} as its best, which is {found['beta']}"
        if cell.test is not None:
            count = setup["data"][cell.data]["sizes"]["test"]
            if len(cell.right) != count or set(cell.right) - {"0", "1"} or cell.test != cell.right.count("1") / count:
                return f"its test accuracy, {cell.test}, is not that of its {count} test images"
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return f"it is damaged ({error!r})"
    return None
