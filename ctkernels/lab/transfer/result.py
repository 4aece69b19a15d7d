"""What a comparison found: every run, tables over data sets and seeds, gains, and honest sentences.

The result file (``result.json``) holds everything needed to read it without this package:

``schema``
    ``"ctkernels.compare/1"``, and ``kind``, ``"compare"`` or ``"tune"``.
``setup``
    what decides the numbers: ``models`` (name -> class, digest of the weights), ``data`` (name -> source,
    classes, sizes, digest), ``methods`` (name -> the settings tried), ``seeds`` (the first chose the settings),
    ``betas``, ``budget``, ``bn``, ``images``, ``precision``, ``processes``.
``cells``
    a list of runs, :class:`Cell` as plain values. Accuracies are in [0, 1]. A run with ``test: null`` only served to
    choose a setting. ``detail`` of ``sct`` has ``beta`` (null: the plain network), ``coeff`` and the ``search`` (one
    ``{beta, coeff, val_accuracy}`` per candidate, beta null for a plain network that is not beta = 1); ``detail`` of
    methods that learn curvature has ``curvature``: site -> ``{beta, coeff}`` -> ``{mean, deviation, low, high,
    histogram}``, the histogram counting 20 equal bins of [0, 1].
``table``
    a list with one entry per model, data set and method: ``{model, data, method, setting, parameters, seeds, test:
    {mean, deviation, values}, val: {...}, seconds}``.
``gains``
    a list with one entry per model, method and baseline, over the data sets: ``{model, method, baseline, relative,
    points, better, sets, each}``; ``relative`` is the mean of per-set relative gains, as in the paper, ``points`` the
    mean of per-set differences of accuracy.
``verdict``, ``seconds``, ``versions``
    a sentence per model; of the last call; of the packages. The command line adds ``command`` and ``options``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..._files import read_json, write_text
from ..search.result import versions

SCHEMA = "ctkernels.compare/1"
BASELINE = "linear"
NAMES = {"linear": "linear probe", "sct": "S-CT", "sct-mean-free": "S-CT, c*(β)", "tct": "T-CT"}
Setting = Mapping[str, float | str]


@dataclass(frozen=True)
class Cell:
    """One run: a method with a setting, on one model, one data set, one seed's training images.

    Attributes:
        model, data, method, seed, setting: what ran.
        parameters: numbers that were trained, without the head.
        head: numbers in the head.
        epochs: ``loss`` and ``accuracy`` on the validation images after each epoch, ``train_loss`` over it.
        best: the epoch that was kept, from 1.
        seconds: that training took, choosing a beta included.
        detail: what the method found besides, see the module.
        diverged: whether the loss stopped being finite; training ended there.
        test: accuracy on the test images; None for a run that only served to choose the setting.
        right: a "1" or "0" for every test image.
        weights: size and digest of the file of what was trained; None in results that are older than this entry.
    """

    model: str
    data: str
    method: str
    seed: int
    setting: dict[str, float | str]
    parameters: int
    head: int
    epochs: list[dict[str, float]]
    best: int
    seconds: float
    detail: dict[str, Any] = field(default_factory=dict)
    diverged: bool = False
    test: float | None = None
    right: str = ""
    weights: dict[str, Any] | None = None

    @property
    def validation(self) -> dict[str, float]:
        """Loss and accuracy of the epoch that was kept."""
        return self.epochs[self.best - 1]

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two runs of a result share."""
        return (self.model, self.data, self.method, self.seed, tuple(sorted(self.setting.items())))


@dataclass(frozen=True)
class TransferComparison:
    """The outcome of :func:`compare_transfer`.

    Attributes:
        cells: all runs so far, those that chose settings included.
        setup: everything that decides the numbers.
        seconds: that this call took.
    """

    cells: tuple[Cell, ...]
    setup: dict[str, Any]
    seconds: float = 0.0

    def tested(self, model: str, data: str, method: str) -> list[Cell]:
        """The runs that were scored on the test images, by seed."""
        found = (c for c in self.cells if (c.model, c.data, c.method) == (model, data, method) and c.test is not None)
        return sorted(found, key=lambda c: c.seed)

    @property
    def models(self) -> list[str]:
        return list(self.setup["models"])

    def sets(self, model: str, *methods: str) -> list[str]:
        """The data sets on which all ``methods`` have been tested with ``model``, every seed of them."""
        seeds = self.setup["seeds"]
        return [d for d in self.setup["data"] if all(len(self.tested(model, d, m)) == len(seeds) for m in methods)]

    def methods(self, model: str) -> list[str]:
        """The methods that have been tested with ``model`` on any data set."""
        return [m for m in self.setup["methods"] if any(self.tested(model, d, m) for d in self.setup["data"])]

    def rows(self) -> list[dict[str, Any]]:
        """Per model, data set and method the mean and the deviation over seeds, as plain values."""
        found = []
        for model in self.models:
            for data in self.setup["data"]:
                for method in self.methods(model):
                    cells = self.tested(model, data, method)
                    if cells:
                        found.append(
                            {
                                "model": model,
                                "data": data,
                                "method": method,
                                "setting": cells[0].setting,
                                "parameters": cells[0].parameters,
                                "seeds": [c.seed for c in cells],
                                "test": _summary([c.test or 0.0 for c in cells]),
                                "val": _summary([c.validation["accuracy"] for c in cells]),
                                "seconds": mean(c.seconds for c in cells),
                            }
                        )
        return found

    def gain(self, model: str, method: str, baseline: str = BASELINE) -> dict[str, Any] | None:
        """``method`` against ``baseline`` over the data sets; None if no set has both, every seed of them."""
        each: list[dict[str, Any]] = []
        for data in self.sets(model, method, baseline):
            ours, theirs = (mean(c.test or 0.0 for c in self.tested(model, data, m)) for m in (method, baseline))
            error = self.standard_error(model, data, method, baseline)
            relative = ours / theirs - 1 if theirs else 0.0
            each.append({"data": data, "relative": relative, "points": ours - theirs, "standard_error": error})
        if not each:
            return None
        return {
            "model": model,
            "method": method,
            "baseline": baseline,
            "relative": mean(e["relative"] for e in each),
            "points": mean(e["points"] for e in each),
            "better": sum(e["points"] > 0 for e in each),
            "sets": len(each),
            "each": each,
        }

    def standard_error(self, model: str, data: str, method: str, baseline: str) -> float:
        """Of the difference of two methods' accuracies on the same test images, each averaged over seeds.

        It does not cover the draw of training images, which the deviation over seeds shows.
        """
        ours, theirs = ([c.right for c in self.tested(model, data, m)] for m in (method, baseline))
        differences = [sum(map(int, a)) / len(a) - sum(map(int, b)) / len(b) for a, b in zip(zip(*ours), zip(*theirs))]
        return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 1.0

    def gains(self) -> list[dict[str, Any]]:
        """Every method against the linear probe, and T-CT against every LoRA."""
        found = []
        for model in self.models:
            methods = self.methods(model)
            pairs = [(m, BASELINE) for m in methods if m != BASELINE]
            pairs += [("tct", m) for m in methods if m.startswith("lora")]
            found += [g for pair in pairs if (g := self.gain(model, *pair))]
        return found

    # --- as text ------------------------------------------------------------------------------------------------------

    def table(self) -> str:
        """One table per model as text: accuracies in percent, mean ± deviation over seeds; then the gains."""
        parts = []
        for model in self.models:
            lines = self._grid(model, bold="{}*")
            if len(lines) > 1:
                parts.append(f"{model}\n" + align(lines))
        note = "accuracy in %, mean ± deviation over seeds; * best of a row; gains over the linear probe"
        return "\n\n".join([*parts, note]) if parts else "no method has been tested yet"

    def markdown(self) -> str:
        """The same as Markdown, the best of a row in bold."""
        parts = []
        for model in self.models:
            head, *rows = self._grid(model, bold="**{}**")
            if rows:
                lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
                lines[0] = [f"{model}", *head[1:]]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return "\n\n".join(parts)

    def _grid(self, model: str, bold: str) -> list[list[str]]:
        methods = self.methods(model)
        lines = [["data", *(display(m) for m in methods)]]
        for data in self.setup["data"]:
            cells = [self.tested(model, data, m) for m in methods]
            means = [mean(c.test or 0.0 for c in found) if found else -1.0 for found in cells]
            texts = [_accuracy(_summary([c.test or 0.0 for c in found])) if found else "–" for found in cells]
            if any(cells):
                lines.append([data, *_marked(texts, means, bold)])
        complete = self.sets(model, *methods) if methods else []
        if complete:
            means = [mean(c.test or 0.0 for d in complete for c in self.tested(model, d, m)) for m in methods]
            if len(complete) > 1:
                lines.append(["mean", *_marked([f"{100 * a:.1f}" for a in means], means, bold)])
            found = [None if m == BASELINE else self.gain(model, m) for m in methods]
            lines.append(["gain, points", *(f"{100 * g['points']:+.1f}" if g else "–" for g in found)])
            lines.append(["gain, relative", *(f"{100 * g['relative']:+.1f} %" if g else "–" for g in found)])
            lines.append(["better on", *(f"{g['better']} of {g['sets']}" if g else "–" for g in found)])
            trained = [self.tested(model, complete[0], m)[0].parameters for m in methods]
            lines.append(["trained, without head", *(f"{n:,}" for n in trained)])
        return lines

    def tuning(self) -> str:
        """The settings that were tried on the first seed, with their validation accuracies, as text."""
        lines = []
        for cell in self.cells:
            tried = [c for c in self.cells if c.key[:4] == cell.key[:4]]
            if cell.seed == self.setup["seeds"][0] and len(tried) > 1:
                setting = describe(cell.setting)
                accuracy = f"{100 * cell.validation['accuracy']:.1f} %"
                mark = "  ← chosen" if cell.test is not None else ""
                where = f"{cell.model}, {cell.data}, {display(cell.method)}: {setting}"
                lines.append(f"{where}: {accuracy} (epoch {cell.best} of {len(cell.epochs)}){mark}")
        return "\n".join(lines)

    def verdict(self) -> str:
        """Sentences per model: each method against the linear probe, and where that is beyond chance.

        A difference counts where it is more than two standard errors over the test images.
        """
        return "\n".join(s for model in self.models for s in self._sentences(model)) or "Nothing to compare yet."

    def _sentences(self, model: str) -> list[str]:
        found = []
        for gain in self.gains():
            if gain["model"] != model:
                continue
            clear = [e for e in gain["each"] if abs(e["points"]) > 2 * e["standard_error"]]
            up, down = sum(e["points"] > 0 for e in clear), sum(e["points"] < 0 for e in clear)
            against = "the linear probe" if gain["baseline"] == BASELINE else display(gain["baseline"])
            numbers = f"{100 * gain['points']:+.1f} points ({100 * gain['relative']:+.1f} % relative) over {against}"
            sets = f"{gain['sets']} data set{'s' if gain['sets'] > 1 else ''}"
            beyond = f"beyond two standard errors better on {up} and worse on {down}"
            found.append(f"{model}, {display(gain['method'])}: {numbers} on {sets}, {beyond}.")
        return found

    # --- as a file ----------------------------------------------------------------------------------------------------

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Everything as plain values for JSON (see the module), with ``extra`` entries at the end."""
        return {
            "schema": SCHEMA,
            "kind": "compare",
            "verdict": self.verdict(),
            "setup": self.setup,
            "table": self.rows(),
            "gains": self.gains(),
            "cells": [asdict(cell) for cell in self.cells],
            "seconds": self.seconds,
            "versions": versions(),
            **extra,
        }

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write :meth:`to_dict` as JSON, one line per run, through a temporary name."""
        values = self.to_dict(**extra)
        cells = ",\n  ".join(json.dumps(cell) for cell in values["cells"])
        text = json.dumps({**values, "cells": []}, indent=1)
        write_text(path, text.replace('\n "cells": []', f'\n "cells": [\n  {cells}\n ]', 1) + "\n")


def read_comparison(path: str | os.PathLike[str]) -> TransferComparison:
    """A result file.

    Raises:
        ValueError: the file is no result of this recipe.
    """
    values = read_json(path)
    try:
        if values["schema"] != SCHEMA:
            raise ValueError(f"expected the schema {SCHEMA}, got {values['schema']}")
        return TransferComparison(
            tuple(Cell(**cell) for cell in values["cells"]), dict(values["setup"]), float(values["seconds"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this recipe: {error!r}") from None


def resumed(path: str | os.PathLike[str], setup: dict[str, Any]) -> TransferComparison:
    """What a result file has, to go on from, with ``setup`` added to its own; nothing but ``setup`` without a file.

    Models, data sets, methods and seeds may be added; those that are there must be what they were.

    Raises:
        ValueError: the file is of another set-up, or is no result; the message names what differs.
    """
    if not Path(path).exists():
        return TransferComparison((), setup)
    try:
        found = read_comparison(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it to start anew, or choose another folder") from error
    now, before = json.loads(json.dumps(setup)), found.setup
    grown = ("models", "data", "methods")
    differ = sorted(k for k in now.keys() | before.keys() if k not in (*grown, "seeds") and now.get(k) != before.get(k))
    try:
        for kind in grown:
            both = now[kind].keys() & before[kind].keys()
            differ += [f"{kind}: {n}" for n in sorted(both) if now[kind][n] != before[kind][n]]
        if now["seeds"][0] != before["seeds"][0]:
            differ.append("the first seed")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of this recipe: {error!r}") from None
    if differ:
        raise ValueError(
            f"{path} is the result of another set-up (different: {', '.join(differ)}); choose another folder"
        )
    merged = {**now, **{kind: {**before[kind], **now[kind]} for kind in grown}}
    merged["seeds"] = [*now["seeds"], *(s for s in before["seeds"] if s not in now["seeds"])]
    return TransferComparison(found.cells, merged)


def display(method: str) -> str:
    """A method's name for people: ``"lora-r4"`` is "LoRA, rank 4"."""
    parts = [NAMES.get(part, part.replace("lora-r", "LoRA, rank ")) for part in method.split("+")]
    return " + ".join(parts)


def describe(setting: Setting) -> str:
    """``{"lr": 0.1}`` gives ``"lr 0.1"``."""
    return ", ".join(f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in setting.items()) or "–"


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": mean(values),
        "deviation": stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def _accuracy(summary: Mapping[str, Any]) -> str:
    if summary["deviation"] is None:
        return f"{100 * summary['mean']:.1f}"
    return f"{100 * summary['mean']:.1f} ± {100 * summary['deviation']:.1f}"


def _marked(texts: Sequence[str], values: Sequence[float], bold: str) -> list[str]:
    return [bold.format(t) if v == max(values) and v >= 0 else t for t, v in zip(texts, values)]
