"""Heat maps of numbers by layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from ..._extras import require

Grid = Sequence[Sequence[float]]  # (layers, heads); NaN for no value
_LIGHT = "#e6e9ed"
_INK = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
_DARK = dict.fromkeys(_INK, _LIGHT) | {"figure.facecolor": "none", "savefig.facecolor": "none"}


def heat_maps(
    columns: Sequence[Mapping[str, Grid]],
    labels: Sequence[str],
    title: str,
    scale: str,
    most: float,
    crossed: float | None = None,
    dark: bool = False,
) -> Any:
    """Draw grids as a matplotlib figure, layers downwards and heads to the right, with one colour scale.

    Args:
        columns: the columns, each a mapping from the same row names to grids.
        labels: titles of the columns.
        title: title of the picture.
        scale: label of the colour bar.
        most: upper end of the colour scale, which starts at 0.
        crossed: the value to mark with a cross.
        dark: use light ink on a transparent background.
    """
    figure_module = require("matplotlib.figure", "lab", "the picture")
    matplotlib = require("matplotlib", "lab", "the picture")
    rows = list(columns[0])
    layers = max(len(grid) for column in columns for grid in column.values())
    heads = max(len(row) for column in columns for grid in column.values() for row in grid)
    size = (
        max(4.0, 1.6 + len(columns) * max(1.1, 0.16 * heads)),
        max(1.8 * len(rows), 1.5 + len(rows) * max(1.0, 0.1 * layers)),
    )
    with matplotlib.rc_context(_DARK) if dark else nullcontext():
        figure = figure_module.Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="#5b6066" if dark else "#d9d9d9")
        image = None
        for j, (column, label) in enumerate(zip(columns, labels)):
            for i, (name, values) in enumerate(column.items()):
                grid = axes[i][j]
                image = grid.imshow(values, vmin=0, vmax=most, cmap=colours, aspect="auto", interpolation="nearest")
                marks = [
                    (head, layer) for layer, row in enumerate(values) for head, v in enumerate(row) if v == crossed
                ]
                if marks:
                    grid.scatter(*zip(*marks), marker="x", s=9, linewidths=0.7, color="white")
                if i == 0:
                    grid.set_title(label, fontsize=8)
                if i == len(rows) - 1:
                    grid.set_xlabel("head", fontsize=8)
                if j == 0:
                    grid.set_ylabel(f"{name}\nlayer" if name else "layer", fontsize=8)
                grid.tick_params(labelsize=7)
                for axis in (grid.xaxis, grid.yaxis):
                    axis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(image, ax=axes, shrink=0.6 if len(rows) > 1 else 0.9)
        bar.set_label(scale, fontsize=8)
        bar.ax.tick_params(labelsize=7)
        if title:
            figure.suptitle(title, fontsize=10)
    return figure
