"""The gates of a JoLA adapter by layer and head, as numbers and as a picture, and the adapter's size."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..._files import replacing
from .heat_map import heat_maps

KINDS = {"a": "additive gate", "m": "multiplicative gate"}


@dataclass(frozen=True)
class GateMap:
    """The deterministic gates of an adapter, in [0, 1]; NaN where a head has no such edit.

    Attributes:
        sites: names of the edited projections, in the model's order.
        m, a: multiplicative and additive gates, each (sites, heads).
        parameters: number of parameters in the adapter's file.
    """

    sites: tuple[str, ...]
    m: tuple[tuple[float, ...], ...]
    a: tuple[tuple[float, ...], ...]
    parameters: int

    def kept(self) -> list[tuple[str, int]]:
        """The (site, head) pairs with at least one open gate."""
        return [
            (site, head)
            for site, *rows in zip(self.sites, self.m, self.a)
            for head, gates in enumerate(zip(*rows))
            if any(gate > 0 for gate in gates)
        ]

    @property
    def sparsity(self) -> float:
        """The fraction of gates that are closed, in [0, 1]."""
        gates = [g for kind in (self.m, self.a) for row in kind for g in row if not math.isnan(g)]
        return sum(g == 0 for g in gates) / len(gates)

    def text(self) -> str:
        """One line with the number of edited heads, the sparsity and the size."""
        heads = sum(len(row) for row in self.m)
        return (
            f"{len(self.kept())} of {heads} heads edited, {100 * self.sparsity:.1f} % of the gates closed, "
            f"{self.parameters} parameters ({self.parameters * 4 / 1024:.0f} KiB in float32)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, NaN as None, gates rounded to five digits."""
        rounded = {
            kind: [[None if math.isnan(g) else round(g, 5) for g in row] for row in getattr(self, kind)]
            for kind in KINDS
        }
        return {"sites": list(self.sites), "parameters": self.parameters, **rounded}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateMap:
        """A map from the result of :meth:`to_dict`."""
        rows = {
            kind: tuple(tuple(math.nan if g is None else float(g) for g in row) for row in values[kind])
            for kind in KINDS
        }
        return cls(tuple(values["sites"]), rows["m"], rows["a"], int(values["parameters"]))


@torch.no_grad()
def gate_map(model: nn.Module, adapter: str | None = None) -> GateMap:
    """Read the gates of a JoLA adapter.

    Args:
        model: a model with a JoLA adapter.
        adapter: its name; None takes the active one.

    Returns:
        a :class:`GateMap` of the deterministic gates.

    Raises:
        ValueError: the model has no JoLA adapter, or several are active and none is named.

    Examples:
        >>> print(gate_map(model).text())
        8 of 8 heads edited, 0.0 % of the gates closed, 144 parameters (1 KiB in float32)
    """
    from .gates import log_alphas

    entries = list(log_alphas(model, adapter))
    names = sorted({name for _, name, *_ in entries})
    if len(names) > 1:
        raise ValueError(f"adapter must name one of the active adapters {names}, got None")
    width = max((layer.num_heads for layer, *_ in entries), default=0)
    rows: dict[str, dict[str, list[float]]] = {}
    parameters = 0
    for layer, name, kind, log_alpha in entries:
        gates = layer.gates(name, training=False)[kind].tolist()
        row = rows.setdefault(layer.site, {k: [math.nan] * width for k in KINDS})[kind]
        for head, gate in zip(layer.heads(kind, name), gates):
            row[head] = gate
        parameters += log_alpha.numel() + layer._of(kind)[name].numel()
    sites = tuple(rows)
    m, a = (tuple(tuple(rows[site][kind]) for site in sites) for kind in ("m", "a"))
    return GateMap(sites, m, a, parameters)


def plot_gates(
    frames: GateMap | Sequence[GateMap],
    path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Save heat maps of gates, layers by heads: additive above, multiplicative below, one column per frame.

    Crosses mark closed gates; grey heads have no such edit.

    Args:
        frames: one map, or several maps of one adapter over training.
        path: file to write; its suffix selects the format (``.png``, ``.svg``, ``.pdf``).
        labels: titles of the columns. Default: none for one frame, "frame 1" and so on for more.
        title: title of the picture. Default: none.

    Raises:
        ValueError: there are no frames, their sites differ, or the number of labels is wrong.
        ImportError: matplotlib is missing; the message names the extra.

    Examples:
        >>> before = gate_map(model)
        >>> loss = model(**batch).loss  # and training
        >>> plot_gates([before, gate_map(model)], "gates.png", ["start", "end"])
    """
    with replacing(path) as temporary:
        draw_gates(frames, labels, title).savefig(temporary)


def draw_gates(frames: GateMap | Sequence[GateMap], labels: Sequence[str] | None = None, title: str = "") -> Any:
    """The matplotlib figure that :func:`plot_gates` saves."""
    maps = [frames] if isinstance(frames, GateMap) else list(frames)
    if not maps or any(m.sites != maps[0].sites for m in maps):
        raise ValueError(f"frames must be one or more maps of the same sites, got {[len(m.sites) for m in maps]} sites")
    if labels is None:
        labels = [""] if len(maps) == 1 else [f"frame {i + 1}" for i in range(len(maps))]
    if len(labels) != len(maps):
        raise ValueError(f"labels must be one per frame, {len(maps)}, got {len(labels)}")
    columns = [{KINDS[kind]: getattr(frame, kind) for kind in KINDS} for frame in maps]
    return heat_maps(columns, labels, title, "gate: 0 closed (×), 1 open", most=1.0, crossed=0.0)
