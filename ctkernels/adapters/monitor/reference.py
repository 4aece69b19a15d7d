"""Reference statistics of edits from calibration: the range and the distribution of every head.

Drift is the Kolmogorov-Smirnov distance, at the deciles, between a head's edits in the last ``window`` inputs and in the
calibration, maximised over heads. An input counts once per head, with its mean over tokens, since tokens of one text are not
independent. The threshold is a quantile of this statistic over random windows of the calibration inputs, each compared with
the remaining inputs. It is valid for any distribution and any dependence between heads, if inputs are independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DECILES = torch.arange(1, 10) / 10
SPLITS = 10  # random windows per expected false alarm: a relative standard error of about a third
CHUNK = 256  # random windows per batch


@dataclass(frozen=True)
class Drift:
    """The distribution of edits in calibration.

    Attributes:
        edges: deciles of each head, (9, heads), plus a tolerance for rounding.
        shares: fraction of the calibration inputs at or below each edge, (9, heads).
        window: inputs per window.
        false_alarms: expected fraction of windows above the threshold for inputs like those of the calibration.
        threshold: alarm threshold for the largest of :meth:`distances`.
    """

    edges: Tensor
    shares: Tensor
    window: int
    false_alarms: float
    threshold: float

    @classmethod
    def of(cls, means: Tensor, window: int, false_alarms: float, tolerance: float) -> Drift:
        """Estimate the distribution from each input's mean edits, (inputs, heads); at least ``2 * window`` inputs."""
        means = means.double()
        edges = torch.quantile(means, DECILES.to(means), dim=0)
        edges = edges + tolerance * edges.abs()
        below = (means.unsqueeze(1) <= edges).double()  # (inputs, 9, heads)
        threshold = _threshold(below.flatten(1), window, false_alarms)
        return cls(edges, below.mean(0), window, false_alarms, threshold)

    def below(self, means: Tensor) -> Tensor:
        """The number of inputs at or below each edge, (9, heads), for ``means`` (inputs, heads)."""
        return (means <= self.edges.unsqueeze(1)).sum(1)

    def distances(self, below: Tensor) -> Tensor:
        """The distance of each head, (heads,), from a window's :meth:`below`."""
        return (below / self.window - self.shares).abs().amax(0)

    def to(self, device: torch.device) -> Drift:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        edges, shares = (value.to(device, dtype) for value in (self.edges, self.shares))
        return Drift(edges, shares, self.window, self.false_alarms, self.threshold)


class Window:
    """The current window of inputs compared with a calibration; everything but its size is on the device.

    Attributes:
        number: number of full windows.
        distances: distance of each head in the last full window.
        alarms: number of full windows above the threshold.
    """

    def __init__(self, drift: Drift) -> None:
        self.drift, self.number, self._filled = drift, 0, 0
        self._below = torch.zeros_like(drift.edges, dtype=torch.long)
        self.distances = torch.zeros_like(drift.edges[0])
        self.alarms = torch.zeros((), dtype=torch.long, device=drift.edges.device)

    def add(self, means: Tensor) -> None:
        """Add inputs, (inputs, heads), and start the next window when one is full."""
        while len(means):
            fits = self.drift.window - self._filled
            some, means = means[:fits], means[fits:]
            self._below += self.drift.below(some)
            self._filled += len(some)
            if self._filled == self.drift.window:
                self.distances.copy_(self.drift.distances(self._below))
                self.alarms += self.distances.amax() > self.drift.threshold
                self._below.zero_()
                self._filled, self.number = 0, self.number + 1


def _threshold(below: Tensor, window: int, false_alarms: float) -> float:
    """The distance that a fraction ``false_alarms`` of random windows exceeds, for ``below`` (inputs, values)."""
    splits, inputs = round(SPLITS / false_alarms), len(below)
    generator = torch.Generator().manual_seed(0)
    below, total = below.float(), below.sum(0).float()  # counts are exact in float32
    largest = []
    for start in range(0, splits, CHUNK):
        keys = torch.rand(min(CHUNK, splits - start), inputs, generator=generator)
        chosen = torch.zeros_like(keys).scatter_(1, keys.topk(window, 1).indices, 1).to(below)
        inside = chosen @ below
        largest.append((inside / window - (total - inside) / (inputs - window)).abs().amax(1).cpu())
    # The new value and the splits are exchangeable, so it exceeds their k-th largest with probability k / (splits + 1).
    rank = max(1, int(false_alarms * (splits + 1)))
    return float(torch.cat(largest).topk(rank).values[-1])


@dataclass(frozen=True)
class Reference:
    """The result of calibration.

    Attributes:
        low, high: the range of every head, (heads,), in the order of the sites.
        margin: tolerated excess beyond the range, as a fraction of its width.
        inputs: number of inputs; 0 if unknown.
        outside: estimated fraction of inputs outside the range, (k + 1) / (inputs + 1) if k inputs were outside the range of
            the others; None if unknown.
        drift: the distribution; None if there were too few inputs.
    """

    low: Tensor
    high: Tensor
    margin: float
    inputs: int = 0
    outside: float | None = None
    drift: Drift | None = None

    @classmethod
    def of(
        cls, means: Tensor, lows: Tensor, highs: Tensor, margin: float, window: int | None, false_alarms: float,
        tolerance: float,
    ) -> Reference:  # fmt: skip
        """Compute the reference from each input's mean, smallest and largest edits, all (inputs, heads)."""
        inputs = len(means)
        reference = cls(lows.amin(0), highs.amax(0), margin, inputs)
        drift = None
        if window is not None and inputs >= 2 * window:
            drift = Drift.of(means, window, false_alarms, tolerance)
        others = 0 if inputs < 2 else int(_outside_the_others(lows, highs, margin, tolerance).sum())
        share = 1.0 if inputs < 2 else (others + 1) / (inputs + 1)
        return cls(reference.low, reference.high, margin, inputs, share, drift)

    def beyond(self, low: Tensor, high: Tensor, tolerance: float) -> Tensor:
        """Whether each head of each input is outside the range, from the smallest and largest edits, (inputs, heads)."""
        return _beyond(low, high, self.low, self.high, self.margin, tolerance)

    def to(self, device: torch.device) -> Reference:
        drift = None if self.drift is None else self.drift.to(device)
        return Reference(self.low.to(device), self.high.to(device), self.margin, self.inputs, self.outside, drift)

    def to_dict(self, sites: Mapping[str, int]) -> dict[str, Any]:
        """Values for JSON; ``sites`` maps site names to head counts."""
        widths = list(sites.values())
        parts = zip(sites, self.low.split(widths), self.high.split(widths))
        values: dict[str, Any] = {
            "margin": self.margin,
            "inputs": self.inputs,
            "outside": self.outside,
            "sites": {site: {"low": low.tolist(), "high": high.tolist()} for site, low, high in parts},
            "drift": None,
        }
        if (drift := self.drift) is not None:
            values["drift"] = {
                "window": drift.window,
                "false_alarms": drift.false_alarms,
                "threshold": drift.threshold,
                "edges": dict(zip(sites, (part.tolist() for part in drift.edges.split(widths, 1)))),
                "shares": dict(zip(sites, (part.tolist() for part in drift.shares.split(widths, 1)))),
            }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], sites: Mapping[str, int]) -> Reference:
        """A reference from the result of :meth:`to_dict`; KeyError, TypeError or ValueError if it is malformed."""
        if set(values["sites"]) != set(sites):
            raise ValueError(f"expected the sites {sorted(sites)[:2]}..., got {sorted(values['sites'])[:2]}...")
        low, high = (
            _joined([values["sites"][s][bound] for s in sites], sites, 1)[0].float() for bound in ("low", "high")
        )
        drift = None
        if (saved := values.get("drift")) is not None:
            edges, shares = (
                _joined([saved[part][s] for s in sites], sites, len(DECILES)) for part in ("edges", "shares")
            )
            drift = Drift(edges, shares, int(saved["window"]), float(saved["false_alarms"]), float(saved["threshold"]))
        outside = values.get("outside")
        return cls(
            low,
            high,
            float(values["margin"]),
            int(values.get("inputs", 0)),
            None if outside is None else float(outside),
            drift,
        )


def _joined(parts: Sequence[Any], sites: Mapping[str, int], rows: int) -> Tensor:
    tensors = [torch.tensor(part, dtype=torch.float64) for part in parts]
    tensors = [tensor.unsqueeze(0) if tensor.dim() == 1 else tensor for tensor in tensors]
    for tensor, (site, heads) in zip(tensors, sites.items()):
        if tensor.shape != (rows, heads):
            raise ValueError(f"{site}: expected {rows} x {heads} numbers, got {tuple(tensor.shape)}")
    return torch.cat(tensors, 1)


def _beyond(low: Tensor, high: Tensor, least: Tensor, most: Tensor, margin: float, tolerance: float) -> Tensor:
    slack = margin * (most - least) + tolerance * most
    return (low < least - slack) | (high > most + slack)


def _outside_the_others(lows: Tensor, highs: Tensor, margin: float, tolerance: float) -> Tensor:
    """Whether each input is outside the range of all others, (inputs,)."""
    smallest, largest = lows.topk(2, 0, largest=False), highs.topk(2, 0)
    numbers = torch.arange(len(lows), device=lows.device).unsqueeze(1)
    least = torch.where(smallest.indices[0] == numbers, smallest.values[1], smallest.values[0])
    most = torch.where(largest.indices[0] == numbers, largest.values[1], largest.values[0])
    return _beyond(lows, highs, least, most, margin, tolerance).any(1)
