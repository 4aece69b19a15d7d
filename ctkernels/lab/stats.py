"""Statistics of scores: means over seeds, and paired comparisons on the same test examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

SIGNIFICANT = 0.05


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test: the chance of a split at least as uneven among ``wins + losses`` fair coin tosses."""
    n = wins + losses
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * math.fsum(math.exp(x - n * math.log(2)) for x in logs))


def standard_error(differences: Sequence[float]) -> float:
    """Standard error of the mean of paired differences in [-1, 1]; 1 for a single one."""
    return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 1.0


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
