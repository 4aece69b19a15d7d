"""The result of a robustness evaluation: accuracies image by image, tables, and a sentence per condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
class Trial:
    """A beta (None: the plain network) on the validation images: accuracy under a condition, and without it."""

    beta: float | None
    accuracy: float
    clean: float


@dataclass(frozen=True)
class Outcome:
    """A classifier on the test images under a condition.

    Attributes:
        right: of every image, in [0, 1]: whether it was right under the condition (its share of the corruptions).
        clean: accuracy on the images as they are.
        steps: of an attack, the accuracy left after each attack of the ensemble; of corruptions, the accuracy on each.
    """

    right: tuple[float, ...]
    clean: float
    steps: dict[str, float]

    @property
    def accuracy(self) -> float:
        return mean(self.right)

    @property
    def masked(self) -> bool:
        """True if the attack without gradients fooled more images than those with: their gradients mislead."""
        before = [a for name, a in self.steps.items() if name != "square"]
        return bool(before) and "square" in self.steps and self.steps["square"] < before[-1] - MASKED


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
        conditions: ``name``, ``kind`` ("attack" or "corruption") and what defines each.
        validation: per condition every beta that was tried.
        chosen: per condition the beta that validation chose; None is a plain network that is not beta = 1.
        test: per condition and method ("plain", "s-ct", and those given as trained) the outcome. "s-ct" is absent where
            validation kept the plain network.
        plain_is_beta_1: whether the network at beta = 1 is the plain one.
        seconds: ``validation``, ``test`` and ``total``.
        sites, missed, sizes, arguments: as of :class:`SteeringResult`.
    """

    SCHEMA: ClassVar[str] = "ctkernels.robust/1"
    PACKAGES: ClassVar[tuple[str, ...]] = ("pyautoattack", "imagecorruptions-imaug")

    conditions: tuple[dict[str, Any], ...]
    validation: dict[str, tuple[Trial, ...]]
    chosen: dict[str, float | None]
    test: dict[str, dict[str, Outcome]]
    plain_is_beta_1: bool
    seconds: dict[str, float]

    def gain(self, condition: str, method: str) -> Gain:
        """Gain of ``method`` over the plain network, paired by image; the p-value is that of a two-sided sign test."""
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
        """Test accuracies as text: a row per condition and method."""
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
        # a sentence is "condition, method: what was shown: numbers"
        not_helped = [": ".join(line.split(": ")[:2]) + "." for line in lines if ": it helped: " not in line]
        title = f"Accuracy under attack and corruption{subject(values)}"
        return Section("robust", title, lines, facts, parts, not_helped=not_helped)


def _test_table(conditions: Sequence[Mapping[str, Any]]) -> Table:
    header = ["condition", "method", "β", "clean", "under it", "gain, points", "worst step", "images"]
    rows = []
    for condition in conditions:
        for row in condition["test"]:
            steps = row["steps"]
            worst = min(steps, key=lambda name: steps[name]) if steps else None
            rows.append(
                [
                    condition["name"],
                    METHODS.get(row["method"], row["method"]),
                    beta_name(condition["chosen"]) if row["method"] == "s-ct" else "–",
                    percent(row["clean"]),
                    percent(row["accuracy"]),
                    "–" if row["method"] == "plain" else gain_text(row),
                    "–" if worst is None else f"{worst} {percent(steps[worst])}",
                    str(row["images"]),
                ]
            )
    return Table("Test accuracy", header, rows, (1, 6))


def _validated(condition: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """How many validation images a condition was tried on; only so many are attacked."""
    count, most = values["sizes"]["val"], values["arguments"].get("max_attacked")
    return min(count, most) if most and condition["kind"] == "attack" else count


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
