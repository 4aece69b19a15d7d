"""JoLA adapters that are linear combinations of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..._marks import BLOCK_OUTPUT
from .config import JolaConfig
from .layer import KINDS, JolaLayer
from .sites import unwrapped


def weighted_config(model: nn.Module, adapters: Sequence[str]) -> JolaConfig:
    """The configuration of an adapter that edits every head that `adapters` edit, with frozen open gates.

    Raises:
        ValueError: they edit different kinds of sites.
    """
    layers = {
        name: layer
        for name, layer in unwrapped(model)
        if isinstance(layer, JolaLayer) and any(adapter in layer.jola_config for adapter in adapters)
    }
    kinds = sorted({layer.edits for layer in layers.values()})
    if len(kinds) > 1:
        raise ValueError(
            f"adapters: expected adapters with one site, got {list(adapters)} with site {' and '.join(kinds)}"
        )
    sites = {name.removesuffix(f".{BLOCK_OUTPUT}"): layer for name, layer in layers.items()}
    sizes = {name: layer.head_dim for name, layer in sites.items()}
    size = next(iter(sizes.values())) if len(set(sizes.values())) == 1 else None
    return JolaConfig(site=kinds[0], target_modules=list(sites), head_dim=size, init_std=0.0, freeze_gates=True)


@torch.no_grad()
def fill_weighted(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Set the parameters of an adapter with a :func:`weighted_config`.

    An edit is linear in g_m*m and g_a*a, so the weighted sums of these, with gates of 1, give the weighted sum of the
    edits with deterministic gates.
    """
    for layer in (module for module in model.modules() if isinstance(module, JolaLayer)):
        if adapter_name not in layer.jola_config:
            continue
        for kind in KINDS:
            layer._of(kind)[adapter_name].zero_()
        for name, weight in zip(adapters, weights):
            if name in layer.jola_config:
                vectors, gates = layer._operands(name, layer.gates(name, training=False))
                for kind, gate in gates.items():
                    layer._of(kind)[adapter_name].add_(vectors[kind] * gate.unsqueeze(-1), alpha=weight)
