"""Cross-validation of a run: its epochs are compared by what it gets right on all folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ..experiment import TrainingLog

F = TypeVar("F")


@dataclass
class FoldLog(TrainingLog):
    """The log of one fold, whose epochs count what the same run got right on ``others`` as well.

    So the best epoch is the best over all folds, and ``state`` is this fold's at it.

    Attributes:
        others: finished logs of the other folds.
        scored: metrics of every epoch on this fold, and a "1" or "0" for each of its validation images.
        rights: of every epoch, the same of all folds.
    """

    others: Sequence[FoldLog] = ()
    scored: list[tuple[Mapping[str, float], str]] = field(default_factory=list)
    rights: list[str] = field(default_factory=list)

    def add_scored(
        self, metrics: Mapping[str, float], right: Sequence[bool], state: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Note an epoch: metrics besides the accuracy, and what was right. See :meth:`TrainingLog.add`."""
        epoch = len(self.scored)
        self.scored.append((metrics, "".join("1" if r else "0" for r in right)))
        # a run that diverged on another fold stopped there, and stays what it was
        parts = [self.scored[-1], *(log.scored[min(epoch, len(log.scored) - 1)] for log in self.others)]
        digits = "".join(each for _, each in parts)
        if self.others:
            metrics = {name: sum(m[name] * len(d) for m, d in parts) / len(digits) for name in metrics}
        self.rights.append(digits)
        self.add({**metrics, "accuracy": digits.count("1") / len(digits)}, state)

    @property
    def validated(self) -> str:
        """A "1" or "0" for every validation image of all folds, at the best epoch."""
        return self.rights[self.best - 1]


def on_folds(folds: Sequence[F], run: Callable[[F, Sequence[FoldLog]], FoldLog]) -> FoldLog:
    """Run on every fold, the first one last, with the logs of the others: it is the one that is kept."""
    first, *others = folds
    return run(first, [run(fold, ()) for fold in others])
