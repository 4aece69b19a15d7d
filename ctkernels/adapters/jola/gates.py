"""Gates during and after training: listing open heads, freezing gates, removing closed heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .layer import KINDS, JolaLayer
from .model import jola_layers


def named_adapters(model: Any, adapter: str | None) -> list[str]:
    """The named adapter, or the active ones."""
    adapters = {name for layer in jola_layers(model) for name in layer.jola_config}
    if not adapters:
        raise ValueError("expected a model with a JoLA adapter, got one without")
    if adapter is not None:
        if adapter not in adapters:
            raise ValueError(f"adapter must be one of {sorted(adapters)}, got {adapter!r}")
        return [adapter]
    active: list[str] = []
    for layer in jola_layers(model):
        active += [name for name in layer.active_adapters if name in adapters and name not in active]
    return active


def log_alphas(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[JolaLayer, str, str, nn.Parameter]]:
    """The log alpha parameters of the named adapter (None: the active ones), as (layer, adapter, "m" or "a", parameter)."""
    names = named_adapters(model, adapter)
    for layer in jola_layers(model):
        for name in names:
            for kind in KINDS:
                if name in layer._log_alpha(kind):
                    yield layer, name, kind, layer._log_alpha(kind)[name]


@torch.no_grad()
def open_heads(model: nn.Module, adapter: str | None = None) -> dict[str, dict[str, list[int]]]:
    """List the heads whose deterministic gate is not zero.

    Args:
        model: a model with a JoLA adapter.
        adapter: its name; None takes the active one.

    Returns:
        module name -> {"m": heads, "a": heads}.

    Raises:
        ValueError: the model has no JoLA adapter, or none of this name.

    Examples:
        >>> open_heads(model)["model.layers.0.self_attn.o_proj"]["a"]
        [0, 1, 2, 3]
    """
    heads: dict[str, dict[str, list[int]]] = {}
    for layer, name, kind, _ in log_alphas(model, adapter):
        gate = layer.gates(name, training=False)[kind]
        parts = heads.setdefault(layer.site, {"m": [], "a": []})
        parts[kind] = [head for head, is_open in zip(layer.heads(kind, name), (gate != 0).tolist()) if is_open]
    return heads


def freeze_gates(model: nn.Module, adapter: str | None = None) -> None:
    """Make the gates of an adapter deterministic in training too, and stop training log alpha.

    Args:
        model: a model with a JoLA adapter.
        adapter: its name; None takes the active ones.

    Raises:
        ValueError: the model has no JoLA adapter, or none of this name.

    Examples:
        >>> freeze_gates(model)
        >>> output = Trainer(model, arguments, train_dataset=data).train()  # m and a only
        {'train_runtime': ...}
    """
    for layer, name, _, parameter in log_alphas(model, adapter):
        layer.jola_config[name].freeze_gates = True
        parameter.requires_grad_(False)


def drop_closed_heads(model: nn.Module, adapter: str | None = None) -> int:
    """Remove the heads whose gate is zero from an adapter: a smaller file that computes the same function.

    Gates are frozen first, since a removed head cannot open again. Create the optimizer after this call: the parameters
    are new.

    Args:
        model: a model with a JoLA adapter, unmerged.
        adapter: its name; None takes the active one.

    Returns:
        the number of removed gates.

    Raises:
        ValueError: every gate is closed (nothing would be left to save), or the adapter is merged.

    Examples:
        >>> drop_closed_heads(model)  # all gates are open
        0
        >>> model.save_pretrained("small")
    """
    names = named_adapters(model, adapter)
    open_by_name = {name: open_heads(model, name) for name in names}
    for name, kept in open_by_name.items():
        if not any(heads for parts in kept.values() for heads in parts.values()):
            raise ValueError(f"adapter {name!r}: every gate is closed, so nothing would be left; unload it instead")
        for layer in jola_layers(model):
            if name in layer.merged_adapters:
                raise ValueError(f"adapter {name!r}: dropping heads needs it unmerged, but {layer.site} has it merged")
    removed = 0
    for name, kept in open_by_name.items():
        freeze_gates(model, name)
        for layer, _, kind, parameter in list(log_alphas(model, name)):
            heads = kept[layer.site][kind]
            if len(heads) < len(layer.heads(kind, name)):
                layer.keep_heads(name, kind, heads)
                removed += len(parameter) - len(heads) // layer.shared(kind, name)
        config = next(layer.jola_config[name] for layer in jola_layers(model) if name in layer.jola_config)
        config.heads = {site: parts for site, parts in kept.items() if parts["m"] or parts["a"]}
    return removed
