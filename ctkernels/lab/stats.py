"""Statistics of scores: paired comparisons on the same examples, what a choice by validation goes by, means over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

SIGNIFICANT = 0.05
ENOUGH = 200  # validation examples from which on one fold is enough to choose by
MOST_FOLDS = 5
DIFFERING = (
    0.1  # share of the answers in which two networks typically differ, to say beforehand what a difference must be
)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test: the chance of a split at least as uneven among ``wins + losses`` fair coin tosses."""
    n = wins + losses
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * math.fsum(math.exp(x - n * math.log(2)) for x in logs))


def standard_error(differences: Sequence[float]) -> float:
    """Standard error of the mean of paired differences in [-1, 1]; 1 for a single one."""
    return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 1.0


def share_error(share: float, count: int) -> float:
    """Standard error of a share of ``count`` examples, an accuracy say: one binomial deviation."""
    return math.sqrt(max(0.0, share * (1 - share)) / count) if count else 0.0


def exceeds(difference: float, error: float, margin: float) -> bool:
    """Whether a difference is more than ``margin`` standard errors.

    One example more of many is one standard error exactly, which rounding must not decide.
    """
    return difference > margin * error * (1 + 1e-9)


def preferred(scores: Sequence[Sequence[float]], margin: float = 1.0) -> int:
    """The first of some candidates that no other beats by more than ``margin`` standard errors.

    It is what all choices by validation go by: candidates are given from the simplest on, so that the plain network, or
    the linear probe, is kept unless another is better by more than validation can be wrong. With 0 the best is chosen,
    of equals the first.

    Args:
        scores: of each candidate the scores of the same validation examples, in [0, 1].
        margin: in standard errors of the mean of the paired differences to the best candidate.

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


def folds_for(validation: int, training: int) -> int:
    """How many folds validate on at least ``ENOUGH`` examples, with validation parts of this size: at most five.

    Examples:
        >>> folds_for(48, 192), folds_for(150, 600), folds_for(200, 800), folds_for(50, 50)
        (5, 2, 1, 2)
    """
    if not validation or validation >= ENOUGH:
        return 1
    return max(1, min(-(-ENOUGH // validation), MOST_FOLDS, (validation + training) // validation))


def beyond(margin: float) -> str:
    """``" by more than one standard error"``, or nothing for a margin of 0."""
    number = "one standard error" if margin == 1 else f"{margin:g} standard errors"
    return f" by more than {number}" if margin else ""


def what_counts(
    validation: int, test: int, folds: int = 1, margin: float = 1.0, simplest: str = "plain network"
) -> str:
    """Say, before anything is run, how large a difference has to be to count.

    Args:
        validation: examples that are validated on, over all folds.
        test: examples to test on.
        folds: how many.
        margin: as of :func:`preferred`.
        simplest: what is kept otherwise.
    """
    error, tested = (100 * math.sqrt(DIFFERING / count) for count in (validation, test))
    rounds = f" in {folds} folds" if folds > 1 else ""
    chosen = f"the {simplest} is kept unless another is better{beyond(margin)}"
    size = f" ({margin * error:.1f} points where a tenth of the answers differ)" if margin else ""
    return (
        f"{validation} validation examples{rounds}: {chosen}{size}. On {test} test examples a difference counts from about "
        f"{2 * tested:.1f} points on, two standard errors."
    )


def mean_over_seeds(scores: Sequence[Sequence[float]]) -> list[float]:
    """The score of every test example, averaged over seeds; one sequence per seed, in the same order."""
    return [mean(values) for values in zip(*scores)]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """``mean``, ``deviation`` (None for a single value) and ``values``, for JSON."""
    return {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else None, "values": list(values)}


def spread(statistics: Mapping[str, Any], scale: float = 1.0) -> str:
    """A :func:`summary` as text: ``"71.2 ± 0.4"``."""
    deviation = statistics["deviation"]
    return f"{scale * statistics['mean']:.1f}" + ("" if deviation is None else f" ± {scale * deviation:.1f}")
