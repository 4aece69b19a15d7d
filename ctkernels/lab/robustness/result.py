"""The result of a robustness evaluation: accuracies, tables, and a sentence per condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, ClassVar

from ..report import figures
from ..report.section import Picture, Section, Table, beta_name, duration, images, subject
from ..report.section import gain as gain_text
from ..result import SteeringResult, percent
from ..stats import SIGNIFICANT, beyond, sign_test, standard_error

METHODS = {"plain": "plain network", "s-ct": "S-CT", "t-ct": "T-CT"}
MASKED = 0.002  # AutoAttack's own threshold for calling its result unreliable


@dataclass(frozen=True)
class ValidationScore:
    """The validation accuracy of a beta (None: the plain network) under a condition, and on clean images."""

    beta: float | None
    accuracy: float
    clean: float


@dataclass(frozen=True)
class Outcome:
    """The answers of a classifier under a condition.

    Attributes:
        right: for every image, whether the answer under the condition is right (of corruptions, the share), in [0, 1].
        clean: accuracy on clean images.
        steps: of an attack, the remaining accuracy after each attack of the ensemble; of corruptions, that under each.
    """

    right: tuple[float, ...]
    clean: float
    steps: dict[str, float]

    @property
    def accuracy(self) -> float:
        return mean(self.right)

    @property
    def masked(self) -> bool:
        """Whether the attack without gradients fooled images that those with gradients did not: gradients are masked."""
        with_gradients = [a for name, a in self.steps.items() if name != "square"]
        return bool(with_gradients) and "square" in self.steps and self.steps["square"] < with_gradients[-1] - MASKED


@dataclass(frozen=True)
class Gain:
    """A difference of accuracy between two classifiers on the same images."""

    points: float
    standard_error: float
    p_value: float

    def to_dict(self) -> dict[str, float]:
        return {"gain": self.points, "standard_error": self.standard_error, "p_value": self.p_value}


@dataclass(frozen=True, kw_only=True)
class Robustness(SteeringResult):
    """The outcome of :func:`robustness`. Accuracies are in [0, 1].

    Attributes:
        conditions: ``name``, ``kind`` ("attack" or "corruption") and parameters of each condition.
        validation: for each condition, the scores of all betas.
        chosen: for each condition, the beta that validation chose; None is a plain network that is not beta = 1.
        test: for each condition and method ("plain", "s-ct", and further networks), the outcome. "s-ct" is missing if
            validation chose the plain network.
        plain_is_beta_1: whether the network at beta = 1 is the plain one.
        seconds: ``validation``, ``test`` and ``total``.
        sites, missed, sizes, arguments: as of :class:`SteeringResult`.
    """

    SCHEMA: ClassVar[str] = "ctkernels.robust/1"
    PACKAGES: ClassVar[tuple[str, ...]] = ("pyautoattack", "imagecorruptions-imaug")

    conditions: tuple[dict[str, Any], ...]
    validation: dict[str, tuple[ValidationScore, ...]]
    chosen: dict[str, float | None]
    test: dict[str, dict[str, Outcome]]
    plain_is_beta_1: bool
    seconds: dict[str, float]

    def gain(self, condition: str, method: str) -> Gain:
        """The gain of ``method`` over the plain network, paired by image, with the p-value of a two-sided sign test."""
        plain, other = self.test[condition]["plain"].right, self.test[condition][method].right
        differences = [b - a for a, b in zip(plain, other)]
        wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        return Gain(mean(differences), standard_error(differences), sign_test(wins, losses))

    def verdict(self) -> str:
        """One sentence per condition and method."""
        lines = []
        for condition in self.test:
            rows = self.test[condition]
            plain = rows["plain"]
            n = len(plain.right)
            if "s-ct" not in rows:
                lines.append(
                    f"{condition}, S-CT: steering did not help: no beta did better than the plain network in "
                    f"validation{beyond(self.arguments.get('margin', 0.0))}; it scored {percent(plain.accuracy)} "
                    f"({percent(plain.clean)} clean) on {n} test images."
                )
            for method in rows:
                if method != "plain":
                    lines.append(self._sentence(condition, method))
            for method, outcome in rows.items():
                if outcome.masked:
                    lines.append(
                        f"{condition}, {METHODS.get(method, method)}: do not trust this number: the attack without "
                        "gradients fooled images that those with gradients did not, so the gradients mislead."
                    )
        return "\n".join(lines)

    def _sentence(self, condition: str, method: str) -> str:
        rows, gain = self.test[condition], self.gain(condition, method)
        plain, other = rows["plain"], rows[method]
        beta = self.chosen[condition]
        name = METHODS.get(method, method) + (f" at beta = {beta:g}" if method == "s-ct" and beta is not None else "")
        numbers = (
            f"{percent(other.accuracy)} against {percent(plain.accuracy)} for the plain network, "
            f"{100 * gain.points:+.1f} ± {100 * gain.standard_error:.1f} points (standard error) on {len(other.right)} "
            f"test images, p = {gain.p_value:.2g}; clean {percent(other.clean)} against {percent(plain.clean)}"
        )
        if gain.p_value >= SIGNIFICANT:
            return f"{condition}, {name}: no difference beyond chance was shown: {numbers}."
        return f"{condition}, {name}: it {'helped' if gain.points > 0 else 'hurt'}: {numbers}."

    def table(self) -> str:
        """Test accuracies as text, with a row per condition and method."""
        return _test_table(self.entries()["conditions"]).text()

    def entries(self) -> dict[str, Any]:
        return {
            **super().entries(),
            "verdict": self.verdict(),
            "conditions": [
                {
                    **condition,
                    "chosen": self.chosen[condition["name"]],
                    "validation": [asdict(trial) for trial in self.validation[condition["name"]]],
                    "test": [self._row(condition["name"], method) for method in self.test[condition["name"]]],
                }
                for condition in self.conditions
            ],
            "plain_is_beta_1": self.plain_is_beta_1,
            "seconds": self.seconds,
        }

    def _row(self, condition: str, method: str) -> dict[str, Any]:
        outcome = self.test[condition][method]
        return {
            "method": method,
            "accuracy": outcome.accuracy,
            "clean": outcome.clean,
            "steps": outcome.steps,
            "masked": outcome.masked,
            "images": len(outcome.right),
            **({} if method == "plain" else self.gain(condition, method).to_dict()),
        }

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        conditions, arguments = values["conditions"], values["arguments"]
        lines = str(values["verdict"]).splitlines()
        parts: list[Table | Picture] = [
            _test_table(conditions),
            Picture(
                figures.data_uri(figures.robust_test(conditions, METHODS)),
                "Test accuracy of each method under each condition; the table above has the numbers.",
                "Lines are two standard errors of the difference to the plain network.",
            ),
        ]
        for condition in conditions:
            parts += _condition_parts(condition, _validated(condition, values))
        attacks = f"{', '.join(arguments['attacks'])}; β chosen with {', '.join(arguments['val_attacks'])}"
        probe = arguments["head"] == "probe"
        facts = [
            images(values["sizes"]),
            ("Attacks", f"{attacks}; {arguments['iterations']} iterations, {arguments['queries']} queries"),
            ("Classifier", "a linear probe on frozen features" if probe else "the network's own output"),
            ("Time", duration(values["seconds"]["total"])),
        ]
        # sentences have the form "condition, method: effect: numbers"
        not_helped = [": ".join(line.split(": ")[:2]) + "." for line in lines if ": it helped: " not in line]
        title = f"Accuracy under attack and corruption{subject(values)}"
        return Section("robust", title, lines, facts, parts, not_helped=not_helped)


def _test_table(conditions: Sequence[Mapping[str, Any]]) -> Table:
    def worst(steps: Mapping[str, float]) -> str:
        name = min(steps, key=lambda step: steps[step], default=None)
        return "–" if name is None else f"{name} {percent(steps[name])}"

    columns: dict[str, Callable[[tuple[Mapping[str, Any], Mapping[str, Any]]], str]] = {
        "condition": lambda pair: pair[0]["name"],
        "method": lambda pair: METHODS.get(pair[1]["method"], pair[1]["method"]),
        "β": lambda pair: beta_name(pair[0]["chosen"]) if pair[1]["method"] == "s-ct" else "–",
        "clean": lambda pair: percent(pair[1]["clean"]),
        "under it": lambda pair: percent(pair[1]["accuracy"]),
        "gain, points": lambda pair: "–" if pair[1]["method"] == "plain" else gain_text(pair[1]),
        "worst step": lambda pair: worst(pair[1]["steps"]),
        "images": lambda pair: str(pair[1]["images"]),
    }
    pairs = [(condition, row) for condition in conditions for row in condition["test"]]
    return Table.of("Test accuracy", pairs, columns, (1, 6))


def _validated(condition: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """The number of validation images for a condition; only a sample is attacked."""
    count, limit = values["sizes"]["val"], values["arguments"].get("max_attacked")
    return min(count, limit) if limit and condition["kind"] == "attack" else count


def _condition_parts(condition: Mapping[str, Any], count: int) -> list[Table | Picture]:
    name, rows = condition["name"], condition["test"]
    parts: list[Table | Picture] = [
        Picture(
            figures.data_uri(figures.robust_choice(condition, count)),
            f"Validation accuracy under {name} against beta; chosen: {beta_name(condition['chosen'])}.",
            f"How β was chosen for {name}, on validation images.",
        )
    ]
    if steps := list(dict.fromkeys(step for row in rows for step in row["steps"])):
        attack = condition["kind"] == "attack"
        cells = [
            [step.replace("_", " "), *(percent(r["steps"][step]) if step in r["steps"] else "–" for r in rows)]
            for step in steps
        ]
        header = ["attack" if attack else "corruption", *(METHODS.get(r["method"], r["method"]) for r in rows)]
        caption = f"{name}: accuracy {'left after each attack in turn' if attack else 'under each corruption'}"
        parts.append(Table(caption, header, cells))
    return parts
