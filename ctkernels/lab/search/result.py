"""The results of searches over beta: numbers, their uncertainty, and a verdict in one sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, ClassVar

from torch import Tensor

from ..._files import replacing
from ..report import figures
from ..report.section import SECTIONS, Picture, Section, Table, beta_name, duration, gain, images, subject
from ..result import SteeringResult, percent
from ..stats import SIGNIFICANT, beyond, share_error, sign_test
from .plot import draw


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two classifiers: numbers of test images that both, neither, or only one classified correctly."""

    both: int
    only_plain: int
    only_steered: int
    neither: int

    @classmethod
    def of(cls, plain: Tensor, steered: Tensor) -> Comparison:
        """Counts, from whether the plain and the steered network classified each test image correctly, bool (n,)."""
        both, neither = int((plain & steered).sum()), int((~plain & ~steered).sum())
        return cls(both, int((plain & ~steered).sum()), int((~plain & steered).sum()), neither)

    @property
    def samples(self) -> int:
        return self.both + self.only_plain + self.only_steered + self.neither

    @property
    def plain(self) -> float:
        """Accuracy of the plain network, in [0, 1]."""
        return (self.both + self.only_plain) / self.samples

    @property
    def steered(self) -> float:
        """Accuracy of the steered network, in [0, 1]."""
        return (self.both + self.only_steered) / self.samples

    @property
    def gain(self) -> float:
        return (self.only_steered - self.only_plain) / self.samples

    @property
    def standard_error(self) -> float:
        """Standard error of ``gain`` for paired counts, which is smaller than for two independent test sets."""
        n, changed = self.samples, self.only_steered + self.only_plain
        return math.sqrt(max(0.0, changed - (self.only_steered - self.only_plain) ** 2 / n)) / n

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: the probability of so uneven a split if each changed answer were a coin toss."""
        return sign_test(self.only_steered, self.only_plain)

    @property
    def effect(self) -> str:
        """The effect of steering, as the beginning of a sentence."""
        if self.p_value >= SIGNIFICANT:
            return "No difference beyond chance was shown"
        return f"Steering {'helped' if self.gain > 0 else 'hurt'}"

    def scores(self) -> str:
        """Both accuracies, the gain and its uncertainty, as text."""
        return (
            f"{percent(self.steered)} against {percent(self.plain)} for the plain network, "
            f"{100 * self.gain:+.1f} ± {100 * self.standard_error:.1f} points (standard error) "
            f"on {self.samples} test images, p = {self.p_value:.2g}"
        )

    def to_dict(self) -> dict[str, Any]:
        names = ("samples", "both", "only_plain", "only_steered", "neither")
        accuracies = {"accuracy_plain": self.plain, "accuracy_chosen": self.steered}
        gain = {name: getattr(self, name) for name in ("gain", "standard_error", "p_value")}
        return {**{name: getattr(self, name) for name in names}, **accuracies, **gain}


@dataclass(frozen=True, kw_only=True)
class FeatureSearch(SteeringResult):
    """The outcome of a search on a network's features.

    Attributes:
        test: the chosen beta or betas against the plain network; the only use of the test images.
        feature_layer: where features were extracted, in words.
        sites, missed, sizes, arguments: as of :class:`SteeringResult`; ``sizes`` also has the number of ``features``.
    """

    test: Comparison
    feature_layer: str

    @property
    def kept_plain(self) -> bool:
        """Whether validation chose the plain network."""
        raise NotImplementedError

    @property
    def validated(self) -> int:
        """The number of validation images of every setting, over all folds."""
        return validated(self.sizes)

    @property
    def margin(self) -> str:
        """The margin by which others had to beat the plain network, as text."""
        return beyond(self.arguments.get("margin", 0.0))

    def verdict(self) -> str:
        """A sentence with the effect on the test images and its uncertainty."""
        raise NotImplementedError

    def entries(self) -> dict[str, Any]:
        test, layer = self.test.to_dict(), self.feature_layer
        return {"verdict": self.verdict(), "test": test, "feature_layer": layer, **super().entries()}


@dataclass(frozen=True, kw_only=True)
class BetaSearch(FeatureSearch):
    """The outcome of :func:`search_beta`. Accuracies are in [0, 1].

    Attributes:
        betas: the grid, ascending; includes 1 if beta = 1 is the plain network.
        val_accuracy: of each beta.
        plain_val_accuracy: of the plain network.
        plain_is_beta_1: whether the network at beta = 1 is the plain one: true for the ReLU family, false for SiLU and
            GELU, where the plain network is a candidate of its own.
        chosen: the beta with the best validation accuracy (the one nearest 1 among equals) if it beat the plain network
            by more than the margin; else the plain network: 1, or ``None`` if that is not beta = 1.
        converged: whether each beta's probe reached its optimum.
        seconds: ``features``, ``probes``, ``test`` and ``total``.
        test, feature_layer, sites, missed, sizes, arguments: as of :class:`FeatureSearch`.
    """

    SCHEMA: ClassVar[str] = "ctkernels.search_beta/1"

    betas: tuple[float, ...]
    val_accuracy: tuple[float, ...]
    plain_val_accuracy: float
    plain_is_beta_1: bool
    chosen: float | None
    converged: tuple[bool, ...]
    seconds: dict[str, float]

    @property
    def kept_plain(self) -> bool:
        return self.chosen is None or (self.plain_is_beta_1 and self.chosen == 1.0)

    @property
    def chosen_val_accuracy(self) -> float:
        if self.chosen is None:
            return self.plain_val_accuracy
        return self.val_accuracy[self.betas.index(self.chosen)]

    def verdict(self) -> str:
        return verdict([self])

    def table(self) -> str:
        """Validation accuracies as text with bars, with the chosen beta marked."""
        return table([self])

    def entries(self) -> dict[str, Any]:
        return {
            **super().entries(),
            "chosen": {"beta": self.chosen, "val_accuracy": self.chosen_val_accuracy, "kept_plain": self.kept_plain},
            "plain": {"val_accuracy": self.plain_val_accuracy, "is_beta_1": self.plain_is_beta_1},
            "grid": [
                {"beta": b, "val_accuracy": a, "converged": c}
                for b, a, c in zip(self.betas, self.val_accuracy, self.converged)
            ],
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BetaSearch:
        """Restores a result from :meth:`to_dict`. KeyError or TypeError for other values."""
        grid, test = values["grid"], values["test"]
        return cls(
            betas=tuple(float(row["beta"]) for row in grid),
            val_accuracy=tuple(float(row["val_accuracy"]) for row in grid),
            plain_val_accuracy=float(values["plain"]["val_accuracy"]),
            plain_is_beta_1=bool(values["plain"]["is_beta_1"]),
            chosen=values["chosen"]["beta"],
            test=Comparison(*(int(test[name]) for name in ("both", "only_plain", "only_steered", "neither"))),
            sites=tuple(values["sites"]),
            missed=tuple(values["missed"]),
            arguments=dict(values["arguments"]),
            sizes=dict(values["sizes"]),
            feature_layer=values["feature_layer"],
            converged=tuple(bool(row["converged"]) for row in grid),
            seconds=dict(values["seconds"]),
        )

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        results = [cls.from_dict(values)]
        section = _section(results, f"One β for all activations{subject(values)}")
        section.parts.append(_grid_table(results))
        return section


def verdict(results: Sequence[BetaSearch]) -> str:
    """A sentence about one search, or about several on separate draws of one data set, with pooled test counts."""
    tests = [r.test for r in results]
    wins, losses = sum(t.only_steered for t in tests), sum(t.only_plain for t in tests)
    pooled = Comparison(sum(t.both for t in tests), losses, wins, sum(t.neither for t in tests))
    kept, several = sum(r.kept_plain for r in results), len(results) > 1
    if kept == len(results):
        draws = f" in each of {len(results)} draws" if several else ""
        reason = f"no beta did better than the plain network in validation{results[0].margin}{draws}"
        return _nothing_better(reason, pooled)
    numbers = pooled.scores()
    if several:
        each = ", ".join(f"{100 * t.gain:+.1f}" for t in tests)
        numbers += f"; the {len(results)} draws gave {each}"
        if kept:
            numbers += f", {kept} of them keeping the plain network"
    at = "the beta that validation chose" if several else f"beta = {results[0].chosen:g}"
    where = ""
    if pooled.p_value < SIGNIFICANT:
        everywhere = all(t.gain * pooled.gain > 0 for t in tests)
        where = " here" if everywhere else " on average, but not in every draw"
    return f"{pooled.effect}{where}: {at} scored {numbers}."


def validated(sizes: Mapping[str, int]) -> int:
    """The number of validation images over all folds; older results have no folds."""
    return sizes.get("validated", sizes["val"])


def _nothing_better(reason: str, test: Comparison) -> str:
    return f"Steering did not help here: {reason}; it scored {percent(test.plain)} on {test.samples} test images."


def _validations(results: Sequence[BetaSearch]) -> list[tuple[str, float, int, bool]]:
    """The candidates: beta, mean validation accuracy, number of times it was chosen, and whether it is the plain network."""
    plain_is_1 = results[0].plain_is_beta_1
    rows = [
        (
            f"{b:.4g}",
            mean(r.val_accuracy[i] for r in results),
            sum(r.chosen == b for r in results),
            plain_is_1 and b == 1,
        )
        for i, b in enumerate(results[0].betas)
    ]
    if not plain_is_1:
        accuracy = mean(r.plain_val_accuracy for r in results)
        rows.append(("plain", accuracy, sum(r.chosen is None for r in results), True))
    return rows


def table(results: Sequence[BetaSearch], width: int = 40) -> str:
    """Mean validation accuracies of searches over one grid, as text with bars."""
    rows = _validations(results)
    low, high = min(a for _, a, *_ in rows), max(a for _, a, *_ in rows)
    lines = [f"{'beta':>6}  {'validation':>10}"]
    for name, accuracy, times, plain in rows:
        bar = "█" * round(width * (0.1 + 0.9 * (accuracy - low) / (high - low or 1)))
        draws = f" in {times} of {len(results)} draws" if len(results) > 1 else ""
        mark = f"  ← chosen{draws}" if times else ""
        mark += "  (plain network)" if plain and name != "plain" else ""
        lines.append(f"{name:>6}  {100 * accuracy:>8.1f} %  {bar}{mark}")
    error = max(share_error(a, sum(r.validated for r in results)) for _, a, *_ in rows)
    lines.append(
        f"bars start below the lowest value, {100 * low:.1f} %; standard errors up to {100 * error:.1f} points"
    )
    return "\n".join(lines)


def plot(results: BetaSearch | Sequence[BetaSearch], path: str | os.PathLike[str], title: str = "") -> None:
    """Plots the mean of one or several searches over one grid to a file.

    Error bars of validation accuracies are binomial standard errors for one search, and the range over several; those of
    test accuracies, shown as diamonds, are standard errors. The dashed line is the plain network's validation accuracy.

    Args:
        results: one :class:`BetaSearch`, or several with equal ``betas``.
        path: the file; its suffix determines the format (``.png``, ``.svg``, ``.pdf``).
        title: above the plot. Default: none.

    Raises:
        ValueError: there are no results, or their grids differ.
        ImportError: matplotlib is missing; the message names the extra.

    Examples:
        >>> from ctkernels.lab import search_beta
        >>> result = search_beta(model, train, test=test, betas=[0.8, 0.9, 1.0], progress=False)
        >>> plot(result, "accuracy_vs_beta.png", title="A small network on small images")
    """
    runs = [results] if isinstance(results, BetaSearch) else list(results)
    with replacing(path) as temporary:
        draw(runs, title).savefig(temporary)


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one point, a beta per group: its validation accuracy in [0, 1], and its duration."""

    betas: tuple[float, ...]
    val_accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StrategySearch(FeatureSearch):
    """The outcome of :func:`search_betas`. Accuracies are in [0, 1].

    Attributes:
        strategy: "grid", "coordinate" or "bayesian".
        groups: name -> the sites that share a beta.
        history: all evaluations in order; the first is the plain network's.
        best: index of the chosen one in ``history``.
        seconds: total duration.
        test, feature_layer, sites, missed, sizes, arguments: as of :class:`FeatureSearch`.
    """

    SCHEMA: ClassVar[str] = "ctkernels.search_betas/1"
    PACKAGES: ClassVar[tuple[str, ...]] = ("optuna",)

    strategy: str
    groups: dict[str, tuple[str, ...]]
    history: tuple[Evaluation, ...]
    best: int
    seconds: float

    @property
    def chosen(self) -> dict[str, float]:
        """The beta of every group."""
        return dict(zip(self.groups, self.history[self.best].betas))

    @property
    def betas(self) -> dict[str, float]:
        """The beta of every site, an argument for :func:`ctkernels.steer`."""
        return {site: beta for name, beta in self.chosen.items() for site in self.groups[name]}

    @property
    def kept_plain(self) -> bool:
        return all(beta == 1.0 for beta in self.chosen.values())

    @property
    def reached(self) -> int:
        """The number of evaluations until the chosen one, from 1."""
        return self.best + 1

    def verdict(self) -> str:
        """A sentence with the effect on the test images, its uncertainty and its cost."""
        cost = (
            f"{self.strategy} search over {len(self.groups)} beta{'s' if len(self.groups) > 1 else ''} "
            f"made {len(self.history)} evaluations"
        )
        if self.kept_plain:
            return _nothing_better(f"{cost}, none better than the plain network in validation{self.margin}", self.test)
        here = " here" if self.test.p_value < SIGNIFICANT else ""
        return f"{self.test.effect}{here}: {self.test.scores()}. The {cost} and found its best after {self.reached}."

    def table(self) -> str:
        """The chosen beta of every group as text."""
        best, plain = self.history[self.best].val_accuracy, self.history[0].val_accuracy
        chosen = _groups_table(self.groups, self.chosen).text()
        return f"{chosen}\nvalidation: {percent(best)}, plain network {percent(plain)}"

    def entries(self) -> dict[str, Any]:
        best, plain = self.history[self.best], self.history[0]
        return {
            **super().entries(),
            "strategy": self.strategy,
            "chosen": self.chosen,
            "kept_plain": self.kept_plain,
            "evaluations": {"made": len(self.history), "reached": self.reached},
            "val_accuracy": {"chosen": best.val_accuracy, "plain": plain.val_accuracy},
            "groups": {name: list(sites) for name, sites in self.groups.items()},
            "history": [asdict(evaluation) for evaluation in self.history],
            "seconds": {"total": self.seconds},
        }

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        title = f"{len(values['groups'])} β, {values['strategy']} search{subject(values)}"
        made, reached = values["evaluations"]["made"], values["evaluations"]["reached"]
        val, test = values["val_accuracy"], values["test"]
        scores = f"{percent(test['accuracy_chosen'])}, plain network {percent(test['accuracy_plain'])}"
        facts = [
            images(values["sizes"]),
            ("Evaluations", f"{made}; the chosen betas were found by number {reached}"),
            ("Validation", f"{percent(val['chosen'])}, plain network {percent(val['plain'])}"),
            ("Test", f"{scores} ({gain(test)} points)"),
            ("Time", duration(values["seconds"]["total"])),
        ]
        parts: list[Table | Picture] = [
            Picture(
                figures.data_uri(figures.search_history(values["history"], reached, validated(values["sizes"]))),
                f"Validation accuracy of {made} evaluations; the chosen one was number {reached}.",
                "What every evaluation gave, and the best so far; bars are one standard error.",
            ),
            Picture(
                figures.data_uri(figures.chosen_betas(values["groups"], values["chosen"])),
                "The chosen beta of every activation, from the input to the output; the table below has the numbers.",
            ),
            _groups_table(values["groups"], values["chosen"]),
        ]
        verdict = str(values["verdict"])
        return Section("pilot", title, [verdict], facts, parts, not_helped=_unless_helped(title, verdict))


# --- in the report ----------------------------------------------------------------------------------------------------


def _groups_table(groups: Mapping[str, Sequence[str]], chosen: Mapping[str, float]) -> Table:
    rows = [[name, f"{chosen[name]:.4g}", str(len(sites))] for name, sites in groups.items()]
    return Table("Chosen β by group", ["activations", "β", "how many"], rows)


def draws_section(values: Mapping[str, Any]) -> Section:
    """The section for several searches on separate draws of one data set, ``{"draws": [...]}``."""
    results = [BetaSearch.from_dict(draw) for draw in values["draws"]]
    section = _section(results, f"One β for all activations, {len(results)} draws of images")
    rows = [
        [str(i + 1), beta_name(r.chosen), percent(r.test.plain), percent(r.test.steered), gain(r.test.to_dict())]
        for i, r in enumerate(results)
    ]
    header = ["draw", "chosen β", "plain", "steered", "gain, points"]
    section.parts += [Table("Each draw, test accuracy", header, rows), _grid_table(results)]
    return section


SECTIONS["draws"] = draws_section


def _section(results: Sequence[BetaSearch], title: str) -> Section:
    first, sentence = results[0], verdict(results)
    chosen = ", ".join(beta_name(r.chosen) for r in results)
    missed = f"; {len(first.missed)} could not be" if first.missed else ""
    facts = [
        images(first.sizes),
        ("Steered", f"{len(first.sites)} activations{missed}"),
        ("Chosen β", chosen),
        ("Trained numbers", "0 (a linear probe reads the features)"),
        ("Time", duration(sum(r.seconds["total"] for r in results))),
    ]
    figure = draw(results)
    figure.set_size_inches(5.6, 4.2)
    picture = Picture(
        figures.data_uri(figure),
        f"Line chart of validation accuracy against beta; chosen: {chosen}. The table below has the numbers.",
        "Validation accuracy for every β, the choice ringed; diamonds are what the test said; bars are one standard error"
        f"{', or the range over the draws' if len(results) > 1 else ''}.",
    )
    return Section("pilot", title, [sentence], facts, [picture], not_helped=_unless_helped(title, sentence))


def _unless_helped(title: str, verdict: str) -> list[str]:
    """The verdict, without its numbers, for the summary of what did not help; empty if steering helped."""
    return [] if verdict.startswith("Steering helped here") else [f"{title}: {verdict.partition(':')[0]}."]


def _grid_table(results: Sequence[BetaSearch]) -> Table:
    several, rows = len(results) > 1, []
    for name, accuracy, times, plain in _validations(results):
        mark = "" if not times else f"chosen in {times}" if several else "chosen"
        suffix = "" if not plain else " network" if name == "plain" else " (plain network)"
        rows.append([name + suffix, percent(accuracy), mark])
    return Table(f"Validation accuracy{', mean of the draws' if several else ''}", ["β", "validation", ""], rows, (2,))
