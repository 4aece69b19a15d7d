"""The results of a comparison of methods on texts: runs, a table over seeds, and a verdict in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isclose
from statistics import mean
from typing import Any, ClassVar

from .. import experiment
from ..experiment import BY_ACCURACY, BetterBy, ComparisonResult
from ..report import figures
from ..report.section import Picture, Section, Table, duration
from ..result import describe
from ..stats import mean_over_seeds, spread, standard_error, summary

NAMES = {"exact_match": "exact match", "bleu": "BLEU", "rouge_l": "ROUGE-L", "bertscore": "BERTScore"}


@dataclass(frozen=True, kw_only=True)
class RunResult(experiment.RunResult):
    """One run: a method with a setting, on the examples of one seed.

    Attributes:
        gates: JoLA's gates before training and after each epoch (see :class:`ctkernels.adapters.GateMap`).
        test: metrics on the test examples, in [0, 100].
        each: the primary metric of every test example, in [0, 1].
    """

    gates: list[dict[str, Any]] = field(default_factory=list)
    test: dict[str, float] | None = None
    each: list[float] = field(default_factory=list)

    @property
    def filename(self) -> str:
        setting = "".join(f"-{name}={_number(value)}" for name, value in self.setting.items())
        return f"{self.method}-{self.seed}{setting}.safetensors"

    def untested(self) -> RunResult:
        return replace(self, test=None, each=[])


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)  # six digits may not distinguish two settings


def better_by(primary: str) -> BetterBy:
    """The metrics by which validations are compared, for a primary metric."""
    return BY_ACCURACY if primary == "accuracy" else (("loss", -1.0),)


@dataclass(frozen=True)
class MethodComparison(ComparisonResult[RunResult]):
    """The outcome of :func:`compare_methods`.

    Attributes:
        runs, setup, seconds: as of every comparison.
        primary: the metric of the verdict; settings are chosen by it if it is the accuracy, else by the loss.
    """

    primary: str = "accuracy"

    SCHEMA: ClassVar[str] = "ctkernels.compare_methods/1"
    PACKAGES: ClassVar[tuple[str, ...]] = (
        *("transformers", "peft", "accelerate"),
        *("sacrebleu", "rouge-score", "bert-score"),
    )
    RUN: ClassVar[type[Any]] = RunResult
    FIELDS: ClassVar[tuple[str, ...]] = ("primary",)

    @property
    def better_by(self) -> BetterBy:
        return better_by(self.primary)

    @property
    def methods(self) -> list[str]:
        return [name for name in self.setup["methods"] if self.tested(name)]

    def wrong_scores(self, run: RunResult) -> str | None:
        if run.test is not None:
            tests, score = self.setup["sizes"]["test"], run.test[self.primary]
            if len(run.each) != tests or not isclose(score, 100 * sum(run.each) / tests, rel_tol=1e-9, abs_tol=1e-9):
                return f"its {self.primary}, {score}, is not that of its {tests} test examples"
        return None

    def rows(self) -> list[dict[str, Any]]:
        """The table as plain values: for each method, the mean and deviation of every metric over seeds."""
        return [
            {
                "method": name,
                "setting": runs[0].setting,
                "parameters": runs[0].parameters,
                "seeds": [run.seed for run in runs],
                "seconds": mean(run.seconds for run in runs),
                "metrics": {m: summary([(run.test or {})[m] for run in runs]) for m in runs[0].test or {}},
                "standard_error": 100 * standard_error(mean_over_seeds([run.each for run in runs])),
            }
            for name in self.methods
            if (runs := self.tested(name))
        ]

    def table(self) -> str:
        """The scores as text, with the best method of the primary metric marked."""
        rows = self.rows()
        return _scores(rows, self.primary).text() if rows else "no method has been tested yet"

    def tuning(self) -> str:
        """The settings that were tried and their validation scores, as text."""
        lines = []
        for run in (run for name in self.methods for run in self.tried(name) if run.setting):
            mark = "  ← chosen" if run.test is not None else ""
            values = ", ".join(f"{k} {v:.3g}" for k, v in run.validation.items())
            setting = describe(run.setting) + (f", seed {run.seed}" if self.setup.get("choose_on", 1) > 1 else "")
            lines.append(f"{run.method:<10}{setting:<28}{values}  (epoch {run.best} of {len(run.epochs)}){mark}")
        return "\n".join(lines)

    def verdict(self, method: str = "jola") -> str:
        """A sentence that compares ``method`` with the best other one, with the uncertainty from the test examples.

        Both were scored on the same examples, so the standard error is that of the paired differences, averaged over seeds.
        It does not include the choice of training examples, which the deviation over seeds shows.
        """
        others = [name for name in self.methods if name != method]
        if not self.tested(method) or not others:
            return "Nothing to compare: " + (f"only {method} was tested." if others == [] else f"no run of {method}.")
        scores = {name: mean_over_seeds([run.each for run in self.tested(name)]) for name in (method, *others)}
        best = max(others, key=lambda name: mean(scores[name]))
        differences = [a - b for a, b in zip(scores[method], scores[best])]
        gain, error = 100 * mean(differences), 100 * standard_error(differences)
        seeds = len(self.tested(method))
        numbers = (
            f"{100 * mean(scores[method]):.1f} against {100 * mean(scores[best]):.1f} for {best} "
            f"({_metric(self.primary)}, {gain:+.1f} ± {error:.1f} points, standard error over "
            f"{len(differences)} test examples, {seeds} seed{'s' if seeds > 1 else ''})"
        )
        candidates = self.setup.get("zero-shot chooses among")
        if candidates and best == "zero-shot":
            numbers += f"; zero-shot chose among the {len(candidates)} answers of the training examples"
        if abs(gain) < 2 * error or gain == 0:
            return f"No difference beyond chance between {method} and the best other method was shown: {numbers}."
        outcome = "better than every other method" if gain > 0 else f"worse than {best}"
        return f"{method} was {outcome} here: {numbers}."

    def entries(self) -> dict[str, Any]:
        return {"verdict": self.verdict(), "primary": self.primary, **super().entries(), "table": self.rows()}

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        primary, table, verdict = values["primary"], values["table"], str(values["verdict"])
        section = Section(
            "trained",
            "Editing attention heads (JoLA) beside other methods",
            [verdict],
            [
                ("Seeds", ", ".join(map(str, values["setup"]["seeds"]))),
                ("Time", duration(sum(run["seconds"] for run in values["cells"]))),
            ],
            [_scores(table, primary)] if table else [],
            not_helped=[] if "better than every other method" in verdict else [f"JoLA: {verdict.partition(':')[0]}."],
        )
        if table:
            dots, name = [{**row, **row["metrics"][primary]} for row in table], _metric(primary)
            section.parts.append(
                Picture(
                    figures.data_uri(figures.method_dots(dots, 1, f"test {name}")),
                    f"Test {name} of each method; the table above has the numbers.",
                    "Large: mean over seeds, ± two standard errors over the test examples; small: each seed.",
                )
            )
        gated = next((run for run in values["cells"] if run["gates"] and run["test"] is not None), None)
        if gated is not None:
            section.parts.append(_gates(gated))
        return section


def _metric(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _scores(rows: Sequence[Mapping[str, Any]], primary: str) -> Table:
    """A row per method, with the primary metric first."""
    best = max(row["metrics"][primary]["mean"] for row in rows)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "method": lambda row: row["method"],
        **{
            _metric(name): lambda row, name=name: spread(row["metrics"][name])  # type: ignore[misc]
            for name in sorted(rows[0]["metrics"], key=lambda name: (name != primary, name))
        },
        "trained": lambda row: f"{row['parameters']:,}",
        "seeds": lambda row: str(len(row["seeds"])),
        "time per run": lambda row: duration(row["seconds"]),
        "chosen setting": lambda row: describe(row["setting"]),
        "": lambda row: "← best" if row["metrics"][primary]["mean"] == best else "",
    }
    words = (len(columns) - 2, len(columns) - 1)
    return Table.of("Test scores: mean ± deviation over seeds", rows, columns, words)


def _gates(run: Mapping[str, Any]) -> Picture:
    from ...adapters.jola.gate_map import GateMap, draw_gates

    last = len(run["gates"]) - 1
    frames = [run["gates"][i] for i in sorted({0, last // 2, last})]
    kept = GateMap.from_dict(run["gates"][min(run["best"], last)]).text()
    figure = draw_gates([GateMap.from_dict(frame) for frame in frames], [f"step {frame['step']}" for frame in frames])
    return Picture(
        figures.data_uri(figure, "png"),
        f"Heat maps of JoLA's gates over training, layers by heads. Kept: {kept}.",
        f"JoLA's gates over training, seed {run['seed']}. Kept: {kept}.",
    )
