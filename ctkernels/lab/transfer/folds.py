"""Cross-validation of a run: its epochs are compared by their answers on all folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ..experiment import TrainingLog
from ..stats import accuracy, marks

F = TypeVar("F")


@dataclass
class FoldLog(TrainingLog):
    """The log of one fold, with metrics over this fold and ``others``.

    The best epoch is therefore the best over all folds; ``state`` is this fold's state at that epoch.

    Attributes:
        others: finished logs of the other folds.
        scored: metrics and :func:`marks` on this fold, of every epoch.
        all_marks: marks on all folds, of every epoch.
    """

    others: Sequence[FoldLog] = ()
    scored: list[tuple[Mapping[str, float], str]] = field(default_factory=list)
    all_marks: list[str] = field(default_factory=list)

    def add_scored(
        self, metrics: Mapping[str, float], right: Sequence[bool], state: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Adds an epoch: metrics other than the accuracy, and the answers. See :meth:`TrainingLog.add`."""
        epoch = len(self.scored)
        self.scored.append((metrics, marks(right)))
        # a run that diverged on another fold ended there: its last epoch counts from then on
        folds = [self.scored[-1], *(log.scored[min(epoch, len(log.scored) - 1)] for log in self.others)]
        answers = "".join(fold_marks for _, fold_marks in folds)
        if self.others:
            metrics = {name: sum(m[name] * len(a) for m, a in folds) / len(answers) for name in metrics}
        self.all_marks.append(answers)
        self.add({**metrics, "accuracy": accuracy(answers)}, state)

    @property
    def validated(self) -> str:
        """The marks on all folds at the best epoch."""
        return self.all_marks[self.best - 1]


def on_folds(folds: Sequence[F], run: Callable[[F, Sequence[FoldLog]], FoldLog]) -> FoldLog:
    """Runs every fold. The first, which is kept, runs last, with the logs of the others."""
    first, *others = folds
    return run(first, [run(fold, ()) for fold in others])
