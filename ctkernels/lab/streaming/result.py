"""The result of a stream of tasks: scores of each adapter, forgetting, and the choices of the router."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any, ClassVar

from ..report.section import Section, Table, duration
from ..result import Result, describe


@dataclass
class TaskResult:
    """The results of one task of a stream; scores are of its test examples, in [0, 100].

    Attributes:
        name: of the task.
        primary: the metric of the scores.
        zero_shot: the score of the model without adapters.
        own: the score with the task's own adapter.
        routed: the score with the adapters that the router chose.
        sequence: scores with the adapter trained in sequence, after this task and after each later one.
        router: the share of its test prompts that the router assigned to this task, in [0, 1].
        seconds: duration of the training of the adapter, with all settings that were tried.
        parameters: number of values of the adapter.
        setting: the chosen setting.
        outputs: number of answers in the regression suite.
        changed: how many of their logits were not bitwise the same, after this task and after each later one.
        weights: size and digest of the file of the adapter trained in sequence, after this task.
    """

    name: str
    primary: str
    zero_shot: float
    own: float
    seconds: float
    parameters: int
    setting: dict[str, float]
    outputs: int
    routed: float | None = None
    router: float | None = None
    sequence: list[float] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    weights: dict[str, Any] | None = None

    @property
    def forgotten(self) -> float:
        """The points that the adapter trained in sequence lost on this task by the end."""
        return self.sequence[0] - self.sequence[-1]


@dataclass(frozen=True)
class StreamResult(Result):
    """The outcome of :func:`stream`.

    Attributes:
        tasks: in the order of arrival.
        setup: everything that determines the numbers.
        seconds: total duration.
    """

    tasks: tuple[TaskResult, ...]
    setup: dict[str, Any]
    seconds: float = 0.0

    SCHEMA: ClassVar[str] = "ctkernels.stream/1"
    PACKAGES: ClassVar[tuple[str, ...]] = ("transformers", "peft", "accelerate")

    def entries(self) -> dict[str, Any]:
        tasks = [asdict(task) for task in self.tasks]
        return {"verdict": self.verdict(), "setup": self.setup, "seconds": self.seconds, "tasks": tasks}

    def table(self) -> str:
        """The table, with a row for each task, as text."""
        return _table(self.tasks).text()

    def verdict(self) -> str:
        """A sentence about forgetting, with and without adapters of their own, and about the router."""
        changed = sum(sum(t.changed) for t in self.tasks)
        outputs = sum(t.outputs * len(t.changed) for t in self.tasks)
        earlier = self.tasks[:-1]
        parts = [
            f"{outputs - changed} of {outputs} outputs of the tasks' own adapters stayed bitwise the same"
            if changed
            else f"Nothing was forgotten by adapters of their own: all {outputs} outputs stayed bitwise the same"
        ]
        if earlier:
            parts.append(
                f"one adapter trained in sequence lost {mean(t.forgotten for t in earlier):.1f} points on average on the "
                f"{len(earlier)} earlier task{'s' if len(earlier) > 1 else ''}"
            )
        if all(t.router is not None for t in self.tasks):
            share = mean(t.router or 0.0 for t in self.tasks)
            parts.append(f"the router found the task of {100 * share:.1f} % of the inputs")
        return "; ".join(parts) + "."

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        tasks = [TaskResult(**task) for task in values["tasks"]]
        return Section(
            "trained",
            "Tasks one after the other, an adapter for each",
            [str(values["verdict"])],
            [("Method", str(values["setup"]["method"])), ("Time", duration(values["seconds"]))],
            [_table(tasks)],
            not_helped=[
                f"{t.name}: the adapter, {t.own:.1f}, is not above zero-shot, {t.zero_shot:.1f}."
                for t in tasks
                if t.own <= t.zero_shot
            ],
        )


def _table(tasks: Sequence[TaskResult]) -> Table:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    columns: dict[str, Callable[[TaskResult], str]] = {
        "task": lambda t: t.name,
        "zero-shot": lambda t: number(t.zero_shot),
        "own adapter": lambda t: number(t.own),
        "routed": lambda t: number(t.routed),
        "router right, %": lambda t: number(None if t.router is None else 100 * t.router),
        "in sequence": lambda t: number(t.sequence[0] if t.sequence else None),
        "at the end": lambda t: number(t.sequence[-1] if t.sequence else None),
        "changed outputs": lambda t: f"{sum(t.changed)} of {t.outputs * len(t.changed)}",
        "time": lambda t: duration(t.seconds),
        "setting": lambda t: describe(t.setting),
    }
    return Table.of("Test scores by task, in the order of arrival", tasks, columns, (len(columns) - 1,))
