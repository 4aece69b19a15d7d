"""What a search over beta found: the numbers, how sure they are, and one honest sentence."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from statistics import mean
from typing import Any

from torch import Tensor

from ... import __version__
from ..._files import write_text

SCHEMA = "ctkernels.search_beta/1"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same test images: how many both, neither, or only one of them got right."""

    both: int
    only_plain: int
    only_steered: int
    neither: int

    @classmethod
    def of(cls, plain: Tensor, steered: Tensor) -> Comparison:
        """From whether each test image was classified rightly, bool (n,), by the plain and by the steered network."""
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
        """Of ``gain``, from the paired counts: smaller than for two separate test sets, as the images are the same."""
        n, changed = self.samples, self.only_steered + self.only_plain
        return math.sqrt(max(0.0, changed - (self.only_steered - self.only_plain) ** 2 / n)) / n

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: a split this uneven by chance, if each changed answer were a coin toss."""
        return sign_test(self.only_steered, self.only_plain)

    def to_dict(self) -> dict[str, Any]:
        counts = {k: getattr(self, k) for k in ("samples", "both", "only_plain", "only_steered", "neither")}
        return {
            **counts,
            "accuracy_plain": self.plain,
            "accuracy_chosen": self.steered,
            "gain": self.gain,
            "standard_error": self.standard_error,
            "p_value": self.p_value,
        }


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test: the chance of a split at least as uneven among ``wins + losses`` fair coin tosses."""
    n = wins + losses
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * math.fsum(math.exp(x - n * math.log(2)) for x in logs))


@dataclass(frozen=True)
class BetaSearch:
    """The outcome of :func:`search_beta`. Accuracies are in [0, 1].

    Attributes:
        betas: the grid, ascending. It holds 1 if beta = 1 is the plain network, asked for or not.
        val_accuracy: of each, on the validation images.
        plain_val_accuracy: of the plain network.
        plain_is_beta_1: whether the network at beta = 1 is the plain one: so for ReLU and its kin, not for SiLU or
            GELU, where the untouched network takes part as a candidate of its own.
        chosen: the beta with the best validation accuracy, the one nearest 1 among equals; ``None`` if the plain
            network was best and is not beta = 1.
        test: the chosen beta against the plain network, the test images' only use.
        sites: names of the activations that were steered.
        missed: selected activations that could not be, with the reason.
        arguments: what the search was called with.
        sizes: images in ``train``, ``val`` and ``test``, and ``classes``, ``features``, ``passes``.
        feature_layer: where the features were taken, in words.
        converged: whether each beta's probe reached its optimum.
        seconds: ``features``, ``probes``, ``test`` and ``total``.
    """

    betas: tuple[float, ...]
    val_accuracy: tuple[float, ...]
    plain_val_accuracy: float
    plain_is_beta_1: bool
    chosen: float | None
    test: Comparison
    sites: tuple[str, ...]
    missed: tuple[str, ...]
    arguments: dict[str, Any]
    sizes: dict[str, int]
    feature_layer: str
    converged: tuple[bool, ...]
    seconds: dict[str, float]

    @property
    def kept_plain(self) -> bool:
        """Whether validation preferred the plain network to every other beta."""
        return self.chosen is None or (self.plain_is_beta_1 and self.chosen == 1.0)

    @property
    def chosen_val_accuracy(self) -> float:
        if self.chosen is None:
            return self.plain_val_accuracy
        return self.val_accuracy[self.betas.index(self.chosen)]

    def verdict(self) -> str:
        """One sentence: what was shown on the test images, and how sure it is."""
        return verdict([self])

    def table(self) -> str:
        """Validation accuracy for every beta as text with bars, the chosen one marked."""
        return table([self])

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Everything as plain values for JSON, with ``extra`` entries (a command line, say) at the end."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict(),
            "chosen": {"beta": self.chosen, "val_accuracy": self.chosen_val_accuracy, "kept_plain": self.kept_plain},
            "plain": {"val_accuracy": self.plain_val_accuracy, "is_beta_1": self.plain_is_beta_1},
            "test": self.test.to_dict(),
            "grid": [
                {"beta": b, "val_accuracy": a, "converged": c}
                for b, a, c in zip(self.betas, self.val_accuracy, self.converged)
            ],
            "sites": list(self.sites),
            "missed": list(self.missed),
            "feature_layer": self.feature_layer,
            "sizes": self.sizes,
            "arguments": self.arguments,
            "seconds": self.seconds,
            "versions": versions(),
            **extra,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BetaSearch:
        """Back from :meth:`to_dict`. KeyError or TypeError for values that are not from there."""
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

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write :meth:`to_dict` as JSON, through a temporary name."""
        write_text(path, json.dumps(self.to_dict(**extra), indent=2) + "\n")


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, and of ``more``, where they are installed."""
    found = {"python": platform.python_version(), "ctkernels": __version__}
    for package in ("torch", "numpy", "scikit-learn", "torchvision", "timm", *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def verdict(results: Sequence[BetaSearch]) -> str:
    """One sentence for one search, or for several on separate draws of one data set, their test counts pooled."""
    tests = [r.test for r in results]
    wins, losses = sum(t.only_steered for t in tests), sum(t.only_plain for t in tests)
    samples = sum(t.samples for t in tests)
    pooled = Comparison(sum(t.both for t in tests), losses, wins, sum(t.neither for t in tests))
    kept = sum(r.kept_plain for r in results)
    draws = f" in each of {len(results)} draws" if len(results) > 1 else ""
    if kept == len(results):
        return (
            f"Steering did not help here: no beta did better than the plain network in validation{draws}; "
            f"it scored {100 * pooled.plain:.1f} % on {samples} test images."
        )
    numbers = (
        f"{100 * pooled.steered:.1f} % against {100 * pooled.plain:.1f} % for the plain network, "
        f"{100 * pooled.gain:+.1f} ± {100 * pooled.standard_error:.1f} points (standard error) "
        f"on {samples} test images, p = {pooled.p_value:.2g}"
    )
    if len(results) > 1:
        each = ", ".join(f"{100 * t.gain:+.1f}" for t in tests)
        numbers += f"; the {len(results)} draws gave {each}"
        if kept:
            numbers += f", {kept} of them keeping the plain network"
    at = f"beta = {results[0].chosen:g}" if len(results) == 1 else "the beta that validation chose"
    if pooled.p_value >= SIGNIFICANT:
        return f"No difference beyond chance was shown: {at} scored {numbers}."
    effect = f"Steering {'helped' if pooled.gain > 0 else 'hurt'}"
    everywhere = all(t.gain * pooled.gain > 0 for t in tests)
    return f"{effect} {'here' if everywhere else 'on average, but not in every draw'}: {at} scored {numbers}."


def table(results: Sequence[BetaSearch], width: int = 40) -> str:
    """Mean validation accuracy for every beta of searches over one grid, as text with bars."""
    rows = [(f"{b:.4g}", mean(r.val_accuracy[i] for r in results)) for i, b in enumerate(results[0].betas)]
    chosen = [results[0].betas.index(r.chosen) for r in results if r.chosen is not None]
    if not results[0].plain_is_beta_1:
        chosen += [len(rows)] * sum(r.chosen is None for r in results)
        rows.append(("plain", mean(r.plain_val_accuracy for r in results)))
    low, high = min(a for _, a in rows), max(a for _, a in rows)
    lines = [f"{'beta':>6}  {'validation':>10}"]
    for i, (name, accuracy) in enumerate(rows):
        bar = "█" * round(width * (0.1 + 0.9 * (accuracy - low) / (high - low or 1)))
        times = chosen.count(i)
        mark = (
            "" if not times else "  ← chosen" if len(results) == 1 else f"  ← chosen in {times} of {len(results)} draws"
        )
        plain = "  (plain network)" if results[0].plain_is_beta_1 and results[0].betas[i : i + 1] == (1.0,) else ""
        lines.append(f"{name:>6}  {100 * accuracy:>8.1f} %  {bar}{mark}{plain}")
    lines.append(f"bars start below the lowest value, {100 * low:.1f} %")
    return "\n".join(lines)
