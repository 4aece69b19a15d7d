"""One adapter per sample of a batch: the names in effect during a forward pass.

They are in a context variable, not on the layers, so that forward passes in other threads have their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...steering.activations import ACTIVATIONS

_NAMES: ContextVar[dict[Any, list[str]] | None] = ContextVar("ctkernels_adapter_names", default=None)


@contextmanager
def adapters_by_sample(layers: Sequence[Any], names: list[str]) -> Iterator[None]:
    """Context in which the samples of `layers` have the adapters `names`."""
    token = _NAMES.set({**(_NAMES.get() or {}), **dict.fromkeys(layers, names)})
    try:
        yield
    finally:
        _NAMES.reset(token)


def names_for(layer: Any) -> list[str] | None:
    """The adapters of `layer`'s samples; None outside `adapters_by_sample`."""
    names = _NAMES.get()
    return None if names is None else names.get(layer)


def index_of(names: list[str], used: list[str], x: Tensor, site: str, samples_first: bool | None) -> Tensor:
    """The row of each sample of `x`: 1 + its adapter's index in `used`, or 0 for the original activation.

    `samples_first`: whether dimension 0 holds the samples, possibly several adjacent rows each (beams, tokens, windows). None:
    unknown; then it must have exactly one row per sample.
    """
    size = x.shape[0] if x.dim() else 0
    fits = size % len(names) == 0 if samples_first else size == len(names)
    if samples_first is False or not fits:
        raise ValueError(
            f"{site}: adapter_names gives {len(names)} samples an adapter each, so dimension 0 of what the activation "
            f"gets must be those samples, got shape {tuple(x.shape)}"
            + (", where it does not grow with the batch" if samples_first is False else "")
            + "; call the model once for each adapter"
        )
    rows = [used.index(name) + 1 if name in used else 0 for name in names]
    return torch.tensor(rows, device=x.device).repeat_interleave(size // len(rows))


def neutral_logits(activation: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """raw beta and raw coeff of the neutral point, one value each."""
    point = ACTIVATIONS[activation]
    return like.new_tensor([logit(point.beta)]), like.new_tensor([logit(point.coeff)])


def combined(neutral: float, raw: Sequence[Tensor], weights: Sequence[float | Tensor]) -> tuple[Tensor, Tensor]:
    """x and 1 - x, where x is as far from `neutral` as the weighted sum of the distances of sigmoids.

    Both are sums of their own distances: near 1 only the second has digits.
    """
    value: Any = neutral + sum(w * (torch.sigmoid(r) - neutral) for w, r in zip(weights, raw))
    rest: Any = (1 - neutral) + sum(w * (torch.sigmoid(-r) - (1 - neutral)) for w, r in zip(weights, raw))
    return value, rest


def combined_logit(neutral: float, raw: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """The logit of what :func:`combined` gives, also where that is 0 or 1."""
    value, rest = combined(neutral, raw, weights)
    return _log(value) - _log(rest)


def _log(value: Tensor) -> Tensor:
    """The logarithm, without a NaN in the gradient where it is infinite."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).log(), -math.inf)


def logit(p: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(p) - math.log1p(-p) if p < 1 else math.inf
