"""Reports on a comparison: plots of JoLA's gates over training, and the largest edits and their inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._files import write_text
from .._weights import damage, read_weights
from ..experiment import weights_path
from .methods import METHODS
from .result import MethodComparison, RunResult

if TYPE_CHECKING:
    from ...adapters import GateMap


@contextmanager
def restored(run: RunResult, model: Any, folder: str | os.PathLike[str]) -> Iterator[Any]:
    """The model with the trained weights of a tested run; restores the plain model afterwards.

    Args:
        run: a tested run of a comparison.
        model: the model of the comparison.
        folder: ``out`` of the comparison.

    Raises:
        ValueError: the run trained nothing, or its weights are missing or damaged.

    Examples:
        >>> sizes = {"train": 8, "val": 4, "test": 4, "progress": False, "out": "out/jola"}
        >>> result = compare_methods(model, tokenizer, data, methods=["jola"], seeds=[0], **sizes)
        >>> with restored(result.tested("jola")[0], model, "out/jola") as adapted:
        ...     tokens = adapted.generate(**inputs, max_new_tokens=2)
    """
    method, path = METHODS[run.method], weights_path(folder, run)
    if method.attach is None:
        raise ValueError(f"{run.method} trained nothing that could be put back")
    if reason := damage(path, run.weights):
        raise ValueError(f"{run.method}, seed {run.seed}: {reason}")
    with method.attach(model, run.setting) as attached:
        attached.load(read_weights(path))
        attached.model.eval()
        yield attached.model


def gate_frames(run: RunResult, most: int = 6) -> tuple[list[GateMap], list[str]]:
    """The gates of a JoLA run at up to ``most`` steps from start to end, and labels for them."""
    from ...adapters import GateMap

    last = len(run.gates) - 1
    shown = sorted({round(i * last / max(1, most - 1)) for i in range(most)})
    prefixes = {0: "start, ", last: "end, "}
    labels = [f"{prefixes.get(i, '')}step {run.gates[i]['step']}" for i in shown]
    return [GateMap.from_dict(run.gates[i]) for i in shown], labels


def save_report(
    result: MethodComparison, model: Any, tokenizer: Any, texts: Sequence[str], out: str | os.PathLike[str]
) -> list[Path]:
    """Writes ``gates.png`` and ``edits.txt`` for the JoLA run of the first seed.

    Args:
        result: a comparison with JoLA, whose files are in ``out``.
        model: the model of the comparison.
        tokenizer: its tokenizer.
        texts: inputs for measuring edits, such as the test prompts.
        out: folder.

    Returns:
        the files.

    Raises:
        ValueError: JoLA was not tested.
    """
    from ...adapters import GateMap, edit_sizes, plot_gates

    if not result.tested("jola"):
        raise ValueError("the report needs a tested run of jola, got none")
    run, folder = result.tested("jola")[0], Path(out)
    frames, labels = gate_frames(run)
    plot_gates(frames, folder / "gates.png", labels, f"JoLA's gates, seed {run.seed}, best epoch {run.best}")
    with restored(run, model, folder) as adapted:
        edits = edit_sizes(adapted, tokenizer, texts)
    kept = GateMap.from_dict(run.gates[run.best])
    write_text(folder / "edits.txt", f"{kept.text()}\n\n{edits.text()}\n")
    return [folder / "gates.png", folder / "edits.txt"]
