"""After a comparison: JoLA's gates over training as a picture, and the inputs on which its heads act."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._files import write_text
from .._weights import damage, read_weights
from .methods import METHODS
from .result import Cell, MethodComparison
from .soundness import weights_path

if TYPE_CHECKING:
    from ...adapters import GateMap


@contextmanager
def restored(cell: Cell, model: Any, folder: str | os.PathLike[str]) -> Iterator[Any]:
    """The model as a tested run left it; afterwards it is plain again.

    Args:
        cell: a tested run of a comparison.
        model: the model that was compared.
        folder: the comparison's ``out``.

    Raises:
        ValueError: the run trained nothing, or its weights are not there or not those that it left.

    Example:
        >>> with restored(result.tested("jola")[0], model, "out/jola") as adapted:  # doctest: +SKIP
        ...     adapted.generate(**inputs)
    """
    method, path = METHODS[cell.method], weights_path(folder, cell)
    if method.attach is None:
        raise ValueError(f"{cell.method} trained nothing that could be put back")
    if reason := damage(path, cell.weights):
        raise ValueError(f"{cell.method}, seed {cell.seed}: {reason}")
    with method.attach(model, cell.setting) as attached:
        attached.load(read_weights(path))
        attached.model.eval()
        yield attached.model


def gate_frames(cell: Cell, most: int = 6) -> tuple[list[GateMap], list[str]]:
    """The gates of a JoLA run from start to end, at most ``most`` of them, and their labels."""
    from ...adapters import GateMap

    last = len(cell.gates) - 1
    picked = sorted({round(i * last / max(1, most - 1)) for i in range(most)})
    names = {0: "start", last: "end"}
    labels = [
        f"{names[i]}, step {cell.gates[i]['step']}" if i in names else f"step {cell.gates[i]['step']}" for i in picked
    ]
    return [GateMap.from_dict(cell.gates[i]) for i in picked], labels


def save_report(
    result: MethodComparison, model: Any, tokenizer: Any, texts: Sequence[str], out: str | os.PathLike[str]
) -> list[Path]:
    """Write ``gates.png`` and ``edits.txt`` for the first seed's JoLA run.

    Args:
        result: a comparison with JoLA in it, kept in ``out``.
        model: the model that was compared.
        tokenizer: its tokenizer.
        texts: on which to measure edits, such as the test prompts.
        out: folder.

    Returns:
        the files.

    Raises:
        ValueError: JoLA has not been tested.
    """
    from ...adapters import GateMap, edit_sizes, plot_gates

    if not result.tested("jola"):
        raise ValueError("the report needs a tested run of jola, got none")
    cell, folder = result.tested("jola")[0], Path(out)
    frames, labels = gate_frames(cell)
    plot_gates(frames, folder / "gates.png", labels, f"JoLA's gates, seed {cell.seed}, best epoch {cell.best}")
    with restored(cell, model, folder) as adapted:
        edits = edit_sizes(adapted, tokenizer, texts)
    kept = GateMap.from_dict(cell.gates[cell.best])
    write_text(folder / "edits.txt", f"{kept.text()}\n\n{edits.text()}\n")
    return [folder / "gates.png", folder / "edits.txt"]
