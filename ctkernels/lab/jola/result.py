"""What a comparison found: every run, a table over seeds, and one honest sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..._files import read_json, write_text
from ..search.result import versions

SCHEMA = "ctkernels.compare_methods/1"
NAMES = {"exact_match": "exact match", "bleu": "BLEU", "rouge_l": "ROUGE-L", "bertscore": "BERTScore"}


@dataclass(frozen=True)
class Cell:
    """One run: a method with a setting on a seed's examples.

    Attributes:
        method, seed, setting: what ran.
        parameters: numbers that were trained.
        epochs: validation metrics after each epoch.
        best: the epoch that was kept, from 1; 0 for a model that is not trained.
        seconds: that training took.
        gates: of JoLA, before training and after each epoch (see :class:`ctkernels.adapters.GateMap`).
        test: metrics on the test examples, in [0, 100]; None for a run that only served to choose the setting.
        each: the primary metric of every test example, in [0, 1].
        weights: size and digest of the file of what was trained; None where nothing was, and in results that are older
            than this entry.
    """

    method: str
    seed: int
    setting: dict[str, float]
    parameters: int
    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0
    gates: list[dict[str, Any]] = field(default_factory=list)
    test: dict[str, float] | None = None
    each: list[float] = field(default_factory=list)
    weights: dict[str, Any] | None = None

    @property
    def validation(self) -> dict[str, float]:
        """Metrics of the epoch that was kept."""
        return self.epochs[self.best - 1] if self.best else {}

    def is_run(self, method: str, seed: int, setting: Mapping[str, float]) -> bool:
        return (self.method, self.seed, self.setting) == (method, seed, dict(setting))


@dataclass(frozen=True)
class MethodComparison:
    """The outcome of :func:`compare_methods`.

    Attributes:
        cells: all runs so far, those that chose settings included.
        setup: everything that decides the numbers: data, model, sizes, methods with their grids, seeds.
        primary: the metric that chose settings and that the verdict is about.
        seconds: that this call took.
    """

    cells: tuple[Cell, ...]
    setup: dict[str, Any]
    primary: str
    seconds: float = 0.0

    def tested(self, method: str) -> list[Cell]:
        """The runs of a method that were scored on the test examples, by seed."""
        return sorted((c for c in self.cells if c.method == method and c.test is not None), key=lambda c: c.seed)

    @property
    def methods(self) -> list[str]:
        return [name for name in self.setup["methods"] if self.tested(name)]

    @property
    def _choosing(self) -> list[int]:
        """The seeds that chose settings."""
        return self.setup["seeds"][: self.setup.get("choose_on", 1)]

    def rows(self) -> list[dict[str, Any]]:
        """The table as plain values: per method the mean and the deviation over seeds of every metric."""
        found = []
        for name in self.methods:
            cells = self.tested(name)
            metrics = {}
            for metric in cells[0].test or {}:
                values = [(c.test or {})[metric] for c in cells]
                metrics[metric] = {
                    "mean": mean(values),
                    "deviation": stdev(values) if len(values) > 1 else None,
                    "values": values,
                }
            found.append(
                {
                    "method": name,
                    "setting": cells[0].setting,
                    "parameters": cells[0].parameters,
                    "seeds": [c.seed for c in cells],
                    "seconds": mean(c.seconds for c in cells),
                    "metrics": metrics,
                }
            )
        return found

    def table(self) -> str:
        """The scores as text, best method of the primary metric marked."""
        rows = self.rows()
        if not rows:
            return "no method has been tested yet"
        metrics = sorted(rows[0]["metrics"], key=lambda name: (name != self.primary, name))
        best = max(row["metrics"][self.primary]["mean"] for row in rows)
        lines = [
            ["method", *(NAMES.get(m, m) for m in metrics), "trained", "seeds", "s/run", "setting"],
            *(
                [
                    row["method"],
                    *(_cell(row["metrics"][m]) for m in metrics),
                    f"{row['parameters']:,}",
                    str(len(row["seeds"])),
                    f"{row['seconds']:.0f}",
                    ", ".join(f"{k} {v:g}" for k, v in row["setting"].items()) or "–",
                ]
                for row in rows
            ),
        ]
        widths = [max(map(len, column)) for column in zip(*lines)]
        marks = ["", *("  ← best" if row["metrics"][self.primary]["mean"] == best else "" for row in rows)]
        return "\n".join(
            "  ".join(
                text.ljust(width) if i in (0, len(widths) - 1) else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths))
            ).rstrip()
            + mark
            for line, mark in zip(lines, marks)
        )

    def tuning(self) -> str:
        """The settings that were tried, with their validation scores, as text."""
        lines = []
        for name in self.methods:
            tried = [c for c in self.cells if c.method == name and c.seed in self._choosing and c.setting]
            for cell in tried:
                setting = ", ".join(f"{k} {v:g}" for k, v in cell.setting.items())
                mark = "  ← chosen" if cell.test is not None else ""
                values = ", ".join(f"{k} {v:.3g}" for k, v in cell.validation.items())
                if len(self._choosing) > 1:
                    setting += f", seed {cell.seed}"
                lines.append(f"{name:<10}{setting:<28}{values}  (epoch {cell.best} of {len(cell.epochs)}){mark}")
        return "\n".join(lines)

    def verdict(self, method: str = "jola") -> str:
        """One sentence about ``method`` beside the best other one, with the uncertainty from the test examples.

        Both were scored on the same examples, so the standard error is that of the paired differences, each averaged
        over seeds; it does not cover the choice of training examples, which the deviation over seeds shows.
        """
        others = [name for name in self.methods if name != method]
        if not self.tested(method) or not others:
            return "Nothing to compare: " + (f"only {method} was tested." if others == [] else f"no run of {method}.")
        own = self._each(method)
        best = max(others, key=lambda name: mean(self._each(name)))
        other = self._each(best)
        differences = [100 * (a - b) for a, b in zip(own, other)]
        gain = mean(differences)
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
        seeds = len(self.tested(method))
        numbers = (
            f"{100 * mean(own):.1f} against {100 * mean(other):.1f} for {best} ({NAMES.get(self.primary, self.primary)}, "
            f"{gain:+.1f} ± {error:.1f} points, standard error over {len(own)} test examples, "
            f"{seeds} seed{'s' if seeds > 1 else ''})"
        )
        among = self.setup.get("zero-shot chooses among")
        if among and best == "zero-shot":
            numbers += f"; zero-shot chose among the {len(among)} answers of the training examples"
        if abs(gain) < 2 * error or gain == 0:
            return f"No difference beyond chance between {method} and the best other method was shown: {numbers}."
        outcome = "better than every other method" if gain > 0 else f"worse than {best}"
        return f"{method} was {outcome} here: {numbers}."

    def _each(self, method: str) -> list[float]:
        """The primary metric of every test example, averaged over a method's seeds."""
        return [mean(values) for values in zip(*(c.each for c in self.tested(method)))]

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Everything as plain values for JSON, with ``extra`` entries (a command line, say) at the end."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict(),
            "primary": self.primary,
            "setup": self.setup,
            "table": self.rows(),
            "cells": [asdict(cell) for cell in self.cells],
            "seconds": self.seconds,
            "versions": {**versions(), **_more_versions()},
            **extra,
        }

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write :meth:`to_dict` as JSON, through a temporary name."""
        write_text(path, json.dumps(self.to_dict(**extra), indent=1) + "\n")


def resumed(path: str | os.PathLike[str], setup: dict[str, Any]) -> tuple[list[Cell], dict[str, Any]]:
    """The runs in a result file, to go on from, and ``setup`` with the methods and seeds that the file has besides.

    Raises:
        ValueError: the file is of another set-up, or is no result; the message names what differs.
    """
    file = Path(path)
    if not file.exists():
        return [], setup
    try:
        values = read_json(file)
        if values["schema"] != SCHEMA:
            raise ValueError(f"expected the schema {SCHEMA}, got {values['schema']}")
        found, cells = values["setup"], [Cell(**cell) for cell in values["cells"]]
        now = json.loads(json.dumps(setup))
        # more methods or seeds may be added to a result; the first seed chose the settings
        free = ("methods", "seeds")
        differ = sorted(k for k in now.keys() | found.keys() if k not in free and now.get(k) != found.get(k))
        if now["seeds"][0] != found["seeds"][0]:
            differ.append("the first seed")
        both = now["methods"].keys() & found["methods"].keys()
        differ += [m for m in sorted(both) if now["methods"][m] != found["methods"][m]]
        seeds = [*setup["seeds"], *(s for s in found["seeds"] if s not in setup["seeds"])]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a result of this recipe to go on from: {error!r}; delete it to start anew, or choose another "
            "folder"
        ) from None
    if differ:
        raise ValueError(
            f"{file} is the result of another set-up (different: {', '.join(differ)}); choose another folder"
        )
    return cells, {**setup, "methods": {**found["methods"], **setup["methods"]}, "seeds": seeds}


def _cell(metric: Mapping[str, Any]) -> str:
    if metric["deviation"] is None:
        return f"{metric['mean']:.1f}"
    return f"{metric['mean']:.1f} ± {metric['deviation']:.1f}"


def _more_versions() -> dict[str, str]:
    found = {}
    for package in ("transformers", "peft", "accelerate", "sacrebleu", "rouge-score", "bert-score"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
