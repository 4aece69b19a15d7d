"""Linear combinations of curvature adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...steering.activations import ACTIVATIONS
from .config import CurvatureConfig
from .layer import CurvatureLayer
from .per_sample import combined


def weighted_config(layers: Mapping[str, CurvatureLayer], adapters: Sequence[str]) -> CurvatureConfig:
    """The configuration of an adapter with its own parameters at all sites of `adapters`. `layers`: by site.

    Raises:
        ValueError: adapters differ in the channel dimension of a site.
    """
    layout: dict[str, list[int] | None] = {}
    for site, layer in layers.items():
        names = [name for name in adapters if name in layer.curvature_config]
        channels = {place for name in names if (place := layer.curvature_channels[name]) is not None}
        if len(channels) > 1:
            raise ValueError(f"{site}: adapters to combine must have their channels in one place, got {channels}")
        if names:
            layout[site] = [*channels.pop()] if channels else None
    return CurvatureConfig(share="site", layout=layout)


@torch.no_grad()
def weighted_values(
    layers: Mapping[str, CurvatureLayer], adapters: Sequence[str], weights: Sequence[float]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The logits of beta and coeff by site.

    Combines the distances of beta and coeff from the neutral point. At a site that an adapter does not have, its distance is 0.

    Raises:
        ValueError: a beta or coeff would not be strictly between 0 and 1.
    """
    values = {}
    for site, layer in layers.items():
        present = [(name, weight) for name, weight in zip(adapters, weights) if name in layer.curvature_config]
        if present:
            neutral = ACTIVATIONS[layer.activation]
            pairs = zip(*(layer.logits_of(name) for name, _ in present))
            shares = [weight for _, weight in present]
            beta, coeff = (
                _combined(f"{site}: {knob}", start, raw, shares)
                for knob, start, raw in zip(("beta", "coeff"), (neutral.beta, neutral.coeff), pairs)
            )
            values[site] = beta, coeff
    return values


@torch.no_grad()
def fill_weighted(
    layers: Mapping[str, CurvatureLayer], values: Mapping[str, tuple[Tensor, Tensor]], adapter_name: str
) -> None:
    """Copies the values of :func:`weighted_values` into an adapter of :func:`weighted_config`."""
    for site, pair in values.items():
        for parameter, value in zip(layers[site].parameters_of(adapter_name), pair):
            parameter.copy_(value)


def _combined(what: str, neutral: float, raw: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The logit of a combination."""
    value, rest = combined(neutral, [r.double() for r in raw], weights)
    if not bool(((value > 0) & (rest > 0)).all()):
        raise ValueError(
            f"{what}: the weighted sum must lie strictly between 0 and 1, got {float(value.min()):.4g} to "
            f"{float(value.max()):.4g} for weights {list(weights)}; weights that are positive and sum to at most 1 do that"
        )
    return value.log() - rest.log()
