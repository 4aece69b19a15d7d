"""Statistics of scores: paired comparisons on the same examples, choices by validation, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

SIGNIFICANT = 0.05
ENOUGH = 200  # validation examples for which one fold suffices
MOST_FOLDS = 5
DIFFERING = 0.1  # assumed share of the answers in which two networks differ, for predicted standard errors


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test: the probability of a split at least as uneven among ``wins + losses`` fair coin tosses."""
    n = wins + losses
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * math.fsum(math.exp(x - n * math.log(2)) for x in logs))


def standard_error(differences: Sequence[float]) -> float:
    """Standard error of the mean of paired differences in [-1, 1]; 1 for a single one."""
    return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 1.0


def share_error(share: float, count: int) -> float:
    """Binomial standard error of a share of ``count`` examples, for example an accuracy."""
    return math.sqrt(max(0.0, share * (1 - share)) / count) if count else 0.0


def exceeds(difference: float, error: float, margin: float) -> bool:
    """Whether a difference is more than ``margin`` standard errors, with a tolerance for rounding.

    A difference of a single example is one standard error exactly.
    """
    return difference > margin * error * (1 + 1e-9)


def preferred(scores: Sequence[Sequence[float]], margin: float = 1.0) -> int:
    """The first candidate that no other beats by more than ``margin`` standard errors.

    Candidates are listed with the simplest first, so that the plain network or the linear probe is kept unless another is
    better by more than the error of validation. With a margin of 0, the best is chosen, the first among equals.

    Args:
        scores: for each candidate, its scores on the same validation examples, in [0, 1].
        margin: in standard errors of the mean of the paired differences from the best candidate.

    Examples:
        >>> preferred([[1, 1, 0, 0], [1, 1, 1, 0]])  # one more example of four: no more than one standard error
        0
        >>> preferred([[1, 1, 0, 0], [1, 1, 1, 0]], margin=0.0)
        1
    """
    best = max(scores, key=mean)
    for number, candidate in enumerate(scores):
        differences = [b - c for b, c in zip(best, candidate)]
        if not exceeds(mean(differences), standard_error(differences), margin):
            return number
    raise AssertionError("the best candidate is not worse than itself")


def nearest_plain(beta: float | None) -> float:
    """A sort key that orders betas by distance from the plain network, which is None or 1."""
    return -2.0 if beta is None else -beta


def best_beta(scores: Mapping[float | None, Sequence[float]], plain: float | None, margin: float) -> float | None:
    """The beta with the best scores, the one nearest the plain network among equals; ``plain`` if :func:`preferred`.

    Examples:
        >>> best_beta({1.0: [1, 0, 0, 0], 0.8: [1, 1, 0, 0], 0.9: [1, 1, 0, 0]}, 1.0, margin=0.5)
        0.9
    """
    best = max(sorted(scores, key=nearest_plain), key=lambda beta: mean(scores[beta]))
    return (plain, best)[preferred([scores[plain], scores[best]], margin)]


def folds_for(validation: int, training: int) -> int:
    """The number of folds, at most five, that together validate on at least ``ENOUGH`` examples.

    Examples:
        >>> folds_for(48, 192), folds_for(150, 600), folds_for(200, 800), folds_for(50, 50)
        (5, 2, 1, 2)
    """
    if not validation or validation >= ENOUGH:
        return 1
    return max(1, min(-(-ENOUGH // validation), MOST_FOLDS, (validation + training) // validation))


def beyond(margin: float) -> str:
    """The margin in words: ``" by more than one standard error"``; empty for 0."""
    number = "one standard error" if margin == 1 else f"{margin:g} standard errors"
    return f" by more than {number}" if margin else ""


def what_counts(
    validation: int, test: int, folds: int = 1, margin: float = 1.0, simplest: str = "plain network"
) -> str:
    """Predicts the smallest differences that will count, from the numbers of validation (over all folds) and test examples."""
    val_error, test_error = (100 * math.sqrt(DIFFERING / count) for count in (validation, test))
    rounds = f" in {folds} folds" if folds > 1 else ""
    chosen = f"the {simplest} is kept unless another is better{beyond(margin)}"
    size = f" ({margin * val_error:.1f} points where a tenth of the answers differ)" if margin else ""
    return (
        f"{validation} validation examples{rounds}: {chosen}{size}. On {test} test examples a difference counts from about "
        f"{2 * test_error:.1f} points on, two standard errors."
    )


def marks(right: Iterable[bool]) -> str:
    """The form in which result files store answers: a string with "1" for every right and "0" for every wrong one."""
    return "".join("1" if r else "0" for r in right)


def accuracy(marks: str) -> float:
    """The share of right answers in a string of :func:`marks`."""
    return marks.count("1") / len(marks)


def scores_of(marks: str) -> list[int]:
    """The answers of a string of :func:`marks` as numbers, 1 for every right one."""
    return list(map(int, marks))


def mean_over_seeds(scores: Sequence[Sequence[float]]) -> list[float]:
    """The score of every test example, averaged over seeds. ``scores``: one sequence per seed, in the same order."""
    return [mean(values) for values in zip(*scores)]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """``mean``, ``deviation`` (None for a single value) and ``values``, for JSON."""
    return {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else None, "values": list(values)}


def spread(statistics: Mapping[str, Any], scale: float = 1.0) -> str:
    """Formats a :func:`summary`: ``"71.2 ± 0.4"``."""
    deviation = statistics["deviation"]
    return f"{scale * statistics['mean']:.1f}" + ("" if deviation is None else f" ± {scale * deviation:.1f}")
