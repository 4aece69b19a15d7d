"""The results of a transfer comparison: every run, tables over data sets and seeds, gains, and a verdict.

The result file (``result.json``) holds everything needed to read it without this package:

``schema``
    ``"ctkernels.compare/1"``, and ``kind``, ``"compare"`` or ``"tune"``.
``setup``
    everything that determines the numbers: ``models`` (name -> class, digest of the weights), ``data`` (name -> source,
    classes, sizes, folds, digest), ``methods`` (name -> the settings tried), ``seeds`` (the first chose the settings),
    ``betas``, ``budget`` (epochs and batch size), ``bn``, ``images``, ``precision``, ``processes``.
``cells``
    a list of runs, :class:`RunResult` as plain values. Accuracies are in [0, 1]. A run with ``test: null`` was only used to
    choose a setting. ``detail`` of ``sct`` has ``beta`` (null: the plain network), ``coeff``, the ``search`` (one
    ``{beta, coeff, val_accuracy}`` per candidate, beta null for a plain network that is not beta = 1), and the ``best``
    candidate with its gain over the plain network and the standard error; ``detail`` of methods that learn curvature has
    ``curvature``: site -> ``{beta, coeff}`` -> ``{mean, deviation, low, high, histogram}``, the histogram with 20 equal
    bins of [0, 1].
``table``
    a list with one entry per model, data set and method: ``{model, data, method, setting, parameters, seeds, test:
    {mean, deviation, values}, val: {...}, seconds}``.
``gains``
    a list with one entry per model, method and baseline, over the data sets: ``{model, method, baseline, relative,
    points, better, sets, each}``; ``relative`` is the mean of per-set relative gains, as in the paper, ``points`` the
    mean of per-set differences of accuracy.
``verdict``, ``seconds``, ``versions``
    a sentence per model; duration of the last call; versions of packages. The command line adds ``command`` and ``options``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, ClassVar

from .. import experiment
from ..experiment import ComparisonResult
from ..report import figures
from ..report.section import Picture, Section, Table, duration
from ..result import describe
from ..stats import accuracy, exceeds, mean_over_seeds, nearest_plain, scores_of, spread, standard_error, summary

BASELINE = "linear"
NAMES = {"linear": "linear probe", "sct": "S-CT", "sct-mean-free": "S-CT, c*(β)", "tct": "T-CT"}


@dataclass(frozen=True, kw_only=True)
class RunResult(experiment.RunResult):
    """One run: a method with a setting, on one model, one data set and the training examples of one seed.

    Attributes:
        model, data: names of the network and the data set.
        parameters: number of trained values outside the head.
        head: number of values in the head.
        epochs: after each epoch, ``loss`` and ``accuracy`` on the validation examples of all folds, and ``train_loss``.
        validated: a "1" or "0" for every validation example, fold by fold, after the epoch that was kept.
        detail: further results of the method, see the module.
        diverged: whether training ended early because the loss was not finite.
        test: accuracy on the test examples.
        right: a "1" or "0" for every test example.
    """

    model: str
    data: str
    head: int = 0
    validated: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    diverged: bool = False
    test: float | None = None
    right: str = ""

    @property
    def where(self) -> tuple[str, ...]:
        return (self.model, self.data, self.method)

    def untested(self) -> RunResult:
        return replace(self, test=None, right="")


@dataclass(frozen=True)
class TransferComparison(ComparisonResult[RunResult]):
    """The outcome of :func:`compare_transfer`."""

    SCHEMA: ClassVar[str] = "ctkernels.compare/1"
    RUN: ClassVar[type[Any]] = RunResult
    GROWS: ClassVar[tuple[str, ...]] = ("models", "data", "methods")

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

    def wrong_scores(self, run: RunResult) -> str | None:
        if search := run.detail.get("search"):
            chosen = max(search, key=lambda row: (row["val_accuracy"], -nearest_plain(row["beta"])))["beta"]
            if best := run.detail.get("best"):
                plain = None if any(row["beta"] is None for row in search) else 1.0
                enough = exceeds(best["points"], best["standard_error"], self.setup["margin"])
                chosen = chosen if enough and best["beta"] == chosen else plain
            if chosen != run.detail["beta"]:
                return f"it names beta {run.detail['beta']} as its choice, which is {chosen}"
        if run.validated and run.validation["accuracy"] != accuracy(run.validated):
            return f"its validation accuracy, {run.validation['accuracy']}, is not that of its images"
        if run.test is not None:
            count = self.setup["data"][run.data]["sizes"]["test"]
            if len(run.right) != count or set(run.right) - {"0", "1"} or run.test != run.right.count("1") / count:
                return f"its test accuracy, {run.test}, is not that of its {count} test images"
        return None

    def rows(self) -> list[dict[str, Any]]:
        """The table as plain values: for each model, data set and method, the mean and deviation over seeds."""
        return [
            {
                "model": model,
                "data": data,
                "method": method,
                "setting": runs[0].setting,
                "parameters": runs[0].parameters,
                "seeds": [run.seed for run in runs],
                "test": {**summary(_accuracies(runs)), "standard_error": standard_error(_test_scores(runs))},
                "val": summary([run.validation["accuracy"] for run in runs]),
                "seconds": mean(run.seconds for run in runs),
            }
            for model in self.models
            for data in self.setup["data"]
            for method in self.methods(model)
            if (runs := self.tested(model, data, method))
        ]

    def gain(self, model: str, method: str, baseline: str = BASELINE) -> dict[str, Any] | None:
        """The gain of ``method`` over ``baseline``, averaged over the data sets on which all seeds of both were tested.

        None if there is none.
        """
        each: list[dict[str, Any]] = []
        for data in self.sets(model, method, baseline):
            scored, reference = (mean(_accuracies(self.tested(model, data, m))) for m in (method, baseline))
            relative = scored / reference - 1 if reference else 0.0
            error = self.standard_error(model, data, method, baseline)
            each.append({"data": data, "relative": relative, "points": scored - reference, "standard_error": error})
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
        """Standard error of the difference between two methods on the same test examples, averaged over seeds.

        It does not include the choice of training examples, which the deviation over seeds shows.
        """
        pair = (_test_scores(self.tested(model, data, m)) for m in (method, baseline))
        return standard_error([a - b for a, b in zip(*pair)])

    def gains(self) -> list[dict[str, Any]]:
        """The gains of every method over the linear probe, and of T-CT over every LoRA."""
        gains = []
        for model in self.models:
            methods = self.methods(model)
            pairs = [(m, BASELINE) for m in methods if m != BASELINE]
            pairs += [("tct", m) for m in methods if m.startswith("lora")]
            gains += [g for pair in pairs if (g := self.gain(model, *pair))]
        return gains

    def entries(self) -> dict[str, Any]:
        return {
            "kind": "compare",
            "verdict": self.verdict(),
            **super().entries(),
            "table": self.rows(),
            "gains": self.gains(),
        }

    # --- as text ------------------------------------------------------------------------------------------------------

    def table(self) -> str:
        """A table per model as text: accuracies in percent, mean ± deviation over seeds, and gains."""
        parts = [f"{grid.caption}\n{grid.text()}" for grid in self._grids("{}*")]
        note = "accuracy in %, mean ± deviation over seeds; * best of a row; gains over the linear probe"
        return "\n\n".join([*parts, note]) if parts else "no method has been tested yet"

    def markdown(self) -> str:
        """The tables as Markdown, the best of each row in bold."""
        grids = self._grids("**{}**")
        return "\n\n".join(replace(grid, header=[grid.caption, *grid.header[1:]]).markdown() for grid in grids)

    def _grids(self, mark: str) -> list[Table]:
        grids = [self._grid(model, mark) for model in self.models]
        return [grid for grid in grids if grid.rows]

    def _grid(self, model: str, mark: str) -> Table:
        """Accuracies by data set and method, and gains. ``mark`` formats the best of a row."""
        methods = self.methods(model)
        lines: list[list[str]] = []
        for data in self.setup["data"]:
            scores = [_accuracies(self.tested(model, data, m)) for m in methods]
            if any(scores):
                texts = [spread(summary(s), 100) if s else "–" for s in scores]
                lines.append([data, *_marked(texts, [mean(s) if s else -1.0 for s in scores], mark)])
        complete = self.sets(model, *methods) if methods else []
        if complete:
            means = [mean(a for d in complete for a in _accuracies(self.tested(model, d, m))) for m in methods]
            if len(complete) > 1:
                lines.append(["mean", *_marked([f"{100 * a:.1f}" for a in means], means, mark)])
            gains = [None if m == BASELINE else self.gain(model, m) for m in methods]
            lines.append(["gain, points", *(f"{100 * g['points']:+.1f}" if g else "–" for g in gains)])
            lines.append(["gain, relative", *(f"{100 * g['relative']:+.1f} %" if g else "–" for g in gains)])
            lines.append(["better on", *(f"{g['better']} of {g['sets']}" if g else "–" for g in gains)])
            trained = [self.tested(model, complete[0], m)[0].parameters for m in methods]
            lines.append(["trained, without head", *(f"{n:,}" for n in trained)])
        return Table(model, ["data", *map(display, methods)], lines)

    def tuning(self) -> str:
        """The settings that were tried on the first seed, with their validation accuracies, as text."""
        lines = []
        for run in self.runs:
            if run.seed == self.setup["seeds"][0] and len(self.tried(*run.where)) > 1:
                accuracy = f"{100 * run.validation['accuracy']:.1f} %"
                mark = "  ← chosen" if run.test is not None else ""
                title = f"{run.model}, {run.data}, {display(run.method)}: {describe(run.setting)}"
                lines.append(f"{title}: {accuracy} (epoch {run.best} of {len(run.epochs)}){mark}")
        return "\n".join(lines)

    def verdict(self) -> str:
        """A sentence per model and method: its gain over the linear probe, and on how many data sets it is significant.

        A difference is significant if it is more than two standard errors over the test examples.
        """
        return "\n".join(map(_sentence, self.gains())) or "Nothing to compare yet."

    # --- in the report ------------------------------------------------------------------------------------------------

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        setup = values["setup"]
        section = Section(
            "trained",
            f"{'Training' if values.get('kind') == 'tune' else 'Comparison of methods'}: {', '.join(setup['models'])}",
            [line for line in str(values["verdict"]).splitlines() if line],
            [
                ("Data", ", ".join(f"{name} ({_sizes(data)})" for name, data in setup["data"].items())),
                ("Seeds", ", ".join(map(str, setup["seeds"]))),
                ("Time", duration(sum(run["seconds"] for run in values["cells"]))),
            ],
        )
        for model in setup["models"]:
            for data in setup["data"]:
                rows = [row for row in values["table"] if row["model"] == model and row["data"] == data]
                section.parts += _table(f"{model} on {data}", rows) if rows else []
        section.parts += _gains_table(values["gains"])
        for run in values["cells"]:
            if run["seed"] == setup["seeds"][0] and run["test"] is not None:
                section.parts += _learned(run, setup["data"][run["data"]])
        section.not_helped = list(_not_helped(values["gains"]))
        return section


def display(method: str) -> str:
    """The displayed name of a method: ``"tct+lora-r4"`` is "T-CT + LoRA, rank 4"."""
    return " + ".join(NAMES.get(part, part.replace("lora-r", "LoRA, rank ")) for part in method.split("+"))


def _accuracies(runs: Sequence[RunResult]) -> list[float]:
    return [run.test or 0.0 for run in runs]


def _test_scores(runs: Sequence[RunResult]) -> list[float]:
    """The score of every test example, averaged over seeds."""
    return mean_over_seeds([scores_of(run.right) for run in runs])


def _marked(texts: Sequence[str], values: Sequence[float], mark: str) -> list[str]:
    return [mark.format(t) if v == max(values) and v >= 0 else t for t, v in zip(texts, values)]


def _sentence(gain: Mapping[str, Any]) -> str:
    clear = [e for e in gain["each"] if abs(e["points"]) > 2 * e["standard_error"]]
    up, down = sum(e["points"] > 0 for e in clear), sum(e["points"] < 0 for e in clear)
    against = "the linear probe" if gain["baseline"] == BASELINE else display(gain["baseline"])
    numbers = f"{100 * gain['points']:+.1f} points ({100 * gain['relative']:+.1f} % relative) over {against}"
    sets = f"{gain['sets']} data set{'s' if gain['sets'] > 1 else ''}"
    beyond = f"beyond two standard errors better on {up} and worse on {down}"
    return f"{gain['model']}, {display(gain['method'])}: {numbers} on {sets}, {beyond}."


def _sizes(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{v} {k}" for k, v in (data.get("sizes") or {}).items()) or "sizes not recorded"


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> list[Table | Picture]:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "method": lambda row: display(row["method"]),
        "test, %": lambda row: spread(row["test"], 100),
        "validation, %": lambda row: spread(row["val"], 100),
        "trained, without head": lambda row: f"{row['parameters']:,}",
        "time per run": lambda row: duration(row["seconds"]),
        "chosen setting": lambda row: describe(row["setting"]),
    }
    dots = [{"method": display(row["method"]), **row["test"]} for row in rows]
    return [
        Table.of(f"{title}: mean ± deviation over seeds", rows, columns, (5,)),
        Picture(
            figures.data_uri(figures.method_dots(dots, 100, "test accuracy, %")),
            f"Test accuracy of each method with {title}; the table above has the numbers.",
            "Large: mean over seeds, ± two standard errors over the test images; small: each seed.",
        ),
    ]


def _gains_table(gains: Sequence[Mapping[str, Any]]) -> list[Table]:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "network": lambda gain: gain["model"],
        "method": lambda gain: display(gain["method"]),
        "against": lambda gain: display(gain["baseline"]),
        "points": lambda gain: f"{100 * gain['points']:+.1f}",
        "relative": lambda gain: f"{100 * gain['relative']:+.1f} %",
        "better on": lambda gain: f"{gain['better']} of {gain['sets']}",
    }
    return [Table.of("Gains, mean over data sets", gains, columns, (1, 2))] if gains else []


def _not_helped(gains: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Sentences about methods that are worse than their baseline, or not better beyond two standard errors."""
    for gain in gains:
        for each in gain["each"]:
            title = f"{gain['model']} on {each['data']}, {display(gain['method'])} against {display(gain['baseline'])}"
            numbers = f"{100 * each['points']:+.1f} ± {100 * each['standard_error']:.1f} points"
            if each["points"] < -2 * each["standard_error"]:
                yield f"{title}: worse, {numbers}."
            elif each["points"] <= 2 * each["standard_error"]:
                yield f"{title}: no difference beyond chance, {numbers}."


def _learned(run: Mapping[str, Any], data: Mapping[str, Any]) -> list[Table | Picture]:
    """Parts for the ``detail`` of a run: the search of S-CT, the learned curvature of T-CT. ``data``: of the setup."""
    title = f"{run['model']} on {run['data']}, {display(run['method'])}, seed {run['seed']}"
    detail = run["detail"]
    parts: list[Table | Picture] = []
    if "search" in detail:
        rows = [{"beta": row["beta"], "accuracy": row["val_accuracy"]} for row in detail["search"]]
        chosen = "the plain network" if detail["beta"] is None else f"{detail['beta']:g}"
        count = len(run.get("validated", "")) or (data.get("sizes") or {}).get("val", 0)
        parts.append(
            Picture(
                figures.data_uri(figures.validation_line(rows, detail["beta"], count)),
                f"Validation accuracy against beta, {title}; chosen: {chosen}.",
                f"{title}: validation accuracy against β with one standard error, the choice ringed.",
            )
        )
    if "curvature" in detail:  # without the names of peft's wrappers
        learned = {site.removeprefix("base_model.model."): values for site, values in detail["curvature"].items()}
        parts.append(
            Picture(
                figures.data_uri(figures.learned_values(learned), "png"),
                f"Learned beta and c in every layer, {title}; the table below has the numbers.",
                f"{title}: how the learned β and c are distributed in every layer; dots are means.",
            )
        )
        columns = [(kind, name) for kind in ("beta", "coeff") for name in ("mean", "deviation", "low", "high")]
        names = {"beta": "β", "coeff": "c", "low": "least", "high": "most"}
        header = ["layer", *(f"{names[kind]} {names.get(name, name)}" for kind, name in columns)]
        cells = [[site, *(f"{values[k][n]:.3f}" for k, n in columns)] for site, values in learned.items()]
        parts.append(Table(f"{title}: learned values by layer", header, cells, folded=True))
    return parts
