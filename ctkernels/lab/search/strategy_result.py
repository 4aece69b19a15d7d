"""What a search over several betas found, and how many evaluations it needed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from ..._files import write_text
from .result import SIGNIFICANT, Comparison, versions

SCHEMA = "ctkernels.search_betas/1"


@dataclass(frozen=True)
class Evaluation:
    """One setting, a beta per group; its accuracy on the validation images, in [0, 1]; and the time it took."""

    betas: tuple[float, ...]
    val_accuracy: float
    seconds: float


@dataclass(frozen=True)
class StrategySearch:
    """The outcome of :func:`search_betas`. Accuracies are in [0, 1].

    Attributes:
        strategy: "grid", "coordinate" or "bayesian".
        groups: name -> the sites that share a beta.
        history: every evaluation in order; the first is the plain network's.
        best: number of the chosen one in ``history``.
        test: the chosen betas against the plain network, the test images' only use.
        sites, missed, feature_layer, arguments, sizes: as in :class:`BetaSearch`.
        seconds: in all.
    """

    strategy: str
    groups: dict[str, tuple[str, ...]]
    history: tuple[Evaluation, ...]
    best: int
    test: Comparison
    sites: tuple[str, ...]
    missed: tuple[str, ...]
    feature_layer: str
    arguments: dict[str, Any]
    sizes: dict[str, int]
    seconds: float

    @property
    def chosen(self) -> dict[str, float]:
        """The beta of every group."""
        return dict(zip(self.groups, self.history[self.best].betas))

    @property
    def betas(self) -> dict[str, float]:
        """The beta of every site, as :func:`ctkernels.steer` takes it."""
        return {site: beta for name, beta in self.chosen.items() for site in self.groups[name]}

    @property
    def kept_plain(self) -> bool:
        return all(beta == 1.0 for beta in self.chosen.values())

    @property
    def reached(self) -> int:
        """How many evaluations it took until the chosen betas were found, from 1."""
        return self.best + 1

    def verdict(self) -> str:
        """One sentence: what was shown on the test images, how sure it is, and what it took."""
        cost = (
            f"{self.strategy} search over {len(self.groups)} beta{'s' if len(self.groups) > 1 else ''} "
            f"made {len(self.history)} evaluations"
        )
        if self.kept_plain:
            return (
                f"Steering did not help here: {cost}, none better than the plain network in validation; "
                f"it scored {100 * self.test.plain:.1f} % on {self.test.samples} test images."
            )
        numbers = (
            f"{100 * self.test.steered:.1f} % against {100 * self.test.plain:.1f} % for the plain network, "
            f"{100 * self.test.gain:+.1f} ± {100 * self.test.standard_error:.1f} points (standard error) "
            f"on {self.test.samples} test images, p = {self.test.p_value:.2g}"
        )
        if self.test.p_value >= SIGNIFICANT:
            start = "No difference beyond chance was shown"
        else:
            start = f"Steering {'helped' if self.test.gain > 0 else 'hurt'} here"
        return f"{start}: {numbers}. The {cost} and found its best after {self.reached}."

    def table(self) -> str:
        """The chosen beta of every group as text."""
        width = max(map(len, self.groups))
        lines = [
            f"{name:<{width}}  {beta:.4g}  ({len(self.groups[name])} activation{'s' * (len(self.groups[name]) > 1)})"
            for name, beta in self.chosen.items()
        ]
        best, plain = self.history[self.best].val_accuracy, self.history[0].val_accuracy
        return "\n".join([*lines, f"validation: {100 * best:.1f} %, plain network {100 * plain:.1f} %"])

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Everything as plain values for JSON, with ``extra`` entries (a command line, say) at the end."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict(),
            "strategy": self.strategy,
            "chosen": self.chosen,
            "kept_plain": self.kept_plain,
            "evaluations": {"made": len(self.history), "reached": self.reached},
            "val_accuracy": {
                "chosen": self.history[self.best].val_accuracy,
                "plain": self.history[0].val_accuracy,
            },
            "test": self.test.to_dict(),
            "groups": {name: list(sites) for name, sites in self.groups.items()},
            "history": [
                {"betas": list(e.betas), "val_accuracy": e.val_accuracy, "seconds": e.seconds} for e in self.history
            ],
            "sites": list(self.sites),
            "missed": list(self.missed),
            "feature_layer": self.feature_layer,
            "sizes": self.sizes,
            "arguments": self.arguments,
            "seconds": {"total": self.seconds},
            "versions": versions("optuna"),
            **extra,
        }

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write :meth:`to_dict` as JSON, through a temporary name."""
        write_text(path, json.dumps(self.to_dict(**extra), indent=1) + "\n")
