"""Figures for the report and for files, from the plain values of saved results."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..._extras import require
from ..stats import share_error

# Okabe and Ito's colours, which can be distinguished with any kind of colour vision, with a contrast to white of 3:1
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#007D5A", "#B0548B", "#595959"
COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY, "#8A6D00", "#3B4BA3")
MARKERS = "osD^vPX"
POINT: dict[str, Any] = {"marker": "o", "markersize": 4, "elinewidth": 1, "capsize": 2}  # for errorbar


def data_uri(figure: Any, kind: str = "svg") -> str:
    """The figure as a data URI with reproducible bytes. ``kind``: "svg", or "png" for figures of many cells."""
    matplotlib = require("matplotlib", "lab", "pictures")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ctkernels"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{encoded}"


def text(value: object, most: int = 40) -> str:
    """A name for a figure: long names lose their middle, and dollar signs, which start formulas, are escaped."""
    name = str(value)
    if len(name) > most:
        name = f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
    return name.replace("$", r"\$")


def new(width: float = 5.2, height: float = 3.4, dpi: int = 110, **subplots: Any) -> tuple[Any, Any]:
    """A figure and its axes."""
    figure_module = require("matplotlib.figure", "lab", "pictures")
    figure = figure_module.Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    return figure, figure.subplots(**subplots)


def tidy(axes: Any, x: str = "", y: str = "", grid: str = "y") -> None:
    """Sets the labels of both axes, and draws a light grid and no frame."""
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis=grid, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def percentages(shares: Sequence[float], count: int) -> dict[str, list[float]]:
    """Arguments of an error bar for shares of ``count`` examples: ``y`` in percent, and ``yerr``, one standard error."""
    return {"y": [100 * s for s in shares], "yerr": [100 * share_error(s, count) for s in shares]}


def validation_line(rows: Sequence[Mapping[str, Any]], chosen: float | None, count: int) -> Any:
    """Validation accuracy on ``count`` examples against beta, with a ring around the choice."""
    figure, axes = new(height=3.0)
    points = [row for row in rows if row["beta"] is not None]
    accuracies = percentages([r["accuracy"] for r in points], count)
    axes.errorbar([r["beta"] for r in points], **accuracies, color=BLUE, **POINT, label="± 1 standard error")
    return _validation(figure, axes, rows, chosen)


def legend(figure: Any, columns: int = 2) -> None:
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _validation(figure: Any, axes: Any, rows: Sequence[Mapping[str, Any]], chosen: float | None) -> Any:
    _mark(axes, rows, chosen)
    axes.margins(x=0.06, y=0.14)
    tidy(axes, "β", "validation accuracy, %")
    legend(figure)
    return figure


def _mark(axes: Any, rows: Sequence[Mapping[str, Any]], chosen: float | None) -> None:
    """Draws a ring around the chosen beta, and a line for a plain network that is none of the betas."""
    for row in rows:
        if row["beta"] is None:
            axes.axhline(100 * row["accuracy"], color=GREY, linestyle=":", label="plain network")
        elif row["beta"] == chosen:
            style = {"facecolors": "none", "edgecolors": ORANGE, "linewidths": 2, "zorder": 4}
            axes.scatter([row["beta"]], [100 * row["accuracy"]], s=150, **style, label="chosen by validation")


def robust_choice(condition: Mapping[str, Any], count: int) -> Any:
    """Accuracy on ``count`` validation images, clean and under a condition, against beta, with a ring around the choice."""
    figure, axes = new(height=3.4)
    rows = [row for row in condition["validation"] if row["beta"] is not None]
    betas = [row["beta"] for row in rows]
    plain = {**POINT, "marker": "s", "linestyle": "--"}
    axes.errorbar(betas, **percentages([r["clean"] for r in rows], count), color=GREY, **plain, label="as they are")
    name = text(condition["name"])
    accuracies = percentages([r["accuracy"] for r in rows], count)
    axes.errorbar(betas, **accuracies, color=BLUE, **POINT, label=f"under {name}, ± 1 standard error")
    return _validation(figure, axes, condition["validation"], condition["chosen"])


def robust_test(conditions: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Any:
    """Test accuracies with two standard errors: a row per condition, a colour and marker per method."""
    figure, axes = new(height=1.5 + 0.55 * len(conditions))
    methods = list(dict.fromkeys(row["method"] for c in conditions for row in c["test"]))
    for k, method in enumerate(methods):
        xs, ys, errors = [], [], []
        for i, condition in enumerate(conditions):
            for row in condition["test"]:
                if row["method"] == method:
                    xs.append(100 * row["accuracy"])
                    ys.append(i + 0.16 * (k - (len(methods) - 1) / 2))
                    errors.append(200 * row.get("standard_error", 0.0))
        style = {"color": COLOURS[k % 7], "marker": MARKERS[k % 7], "linestyle": "none", "markersize": 7}
        axes.errorbar(xs, ys, xerr=errors, elinewidth=1, capsize=2, label=text(names.get(method, method)), **style)
    axes.set_yticks(range(len(conditions)), [text(c["name"]) for c in conditions])
    axes.set_ylim(len(conditions) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    tidy(axes, "test accuracy, %", grid="x")
    legend(figure, 3)
    return figure


def search_history(history: Sequence[Mapping[str, Any]], reached: int, count: int) -> Any:
    """The accuracy of every evaluation on ``count`` validation images, and the best so far."""
    figure, axes = new(height=3.2)
    values = [100 * row["val_accuracy"] for row in history]
    numbers = list(range(1, len(values) + 1))
    best = [max(values[:i]) for i in numbers]
    accuracies = percentages([row["val_accuracy"] for row in history], count)
    axes.errorbar(
        numbers, **accuracies, color=BLUE, alpha=0.6, linestyle="none", **POINT, label="each ± 1 standard error"
    )
    axes.step(numbers, best, where="post", color=ORANGE, linewidth=2, label="best so far")
    axes.axhline(values[0], color=GREY, linestyle="--", linewidth=1.2, label="plain network")
    axes.axvline(reached, color=GREY, linestyle=":", linewidth=1.2, label="chosen here")
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes, "evaluation", "validation accuracy, %")
    legend(figure)
    return figure


def chosen_betas(groups: Mapping[str, Sequence[str]], chosen: Mapping[str, float]) -> Any:
    """The beta of every activation, from the input to the output."""
    figure, axes = new(height=2.6)
    values = [chosen[name] for name, sites in groups.items() for _ in sites]
    axes.step(range(len(values) + 1), [*values, values[-1]], where="post", color=BLUE, linewidth=2)
    axes.set_ylim(min(*values, 0.98) - 0.02, 1.01)
    tidy(axes, "activation, from input to output", "chosen β")
    return figure


def method_dots(rows: Sequence[Mapping[str, Any]], scale: float, label: str) -> Any:
    """Scores by method: a large marker for the mean over seeds with two standard errors, small ones for each seed."""
    figure, axes = new(height=1.2 + 0.42 * len(rows))
    for i, row in enumerate(rows):
        colour = COLOURS[i % 7]
        values = [scale * v for v in row["values"]]
        axes.scatter(values, [i] * len(values), s=22, color=colour, alpha=0.55, linewidths=0)
        axes.scatter([scale * row["mean"]], [i], s=80, color=colour, marker=MARKERS[i % 7], zorder=3)
        error = [2 * scale * row.get("standard_error", 0.0)]
        axes.errorbar([scale * row["mean"]], [i], xerr=error, color=colour, linestyle="none", elinewidth=1, capsize=3)
    axes.set_yticks(range(len(rows)), [text(row["method"]) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.08)
    tidy(axes, label, grid="both")
    return figure


def learned_values(curvature: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Any:
    """The distributions of learned beta and c in every layer: shares of the channels as colours, means as dots."""
    matplotlib = require("matplotlib", "lab", "pictures")
    sites = list(curvature)
    figure, (left, right) = new(5.8, max(2.6, min(10.0, 1.6 + 0.19 * len(sites))), ncols=2, sharey=True)
    image: Any = None
    for axes, kind, name in ((left, "beta", "β"), (right, "coeff", "c")):
        shares = []
        for site in sites:
            counts = [float(n) for n in curvature[site][kind]["histogram"]]
            shares.append([n / (sum(counts) or 1.0) for n in counts])
        image = axes.imshow(
            shares,
            extent=(0, 1, len(sites) - 0.5, -0.5),
            aspect="auto",
            cmap=matplotlib.colormaps["Blues"],
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        means = [curvature[site][kind]["mean"] for site in sites]
        axes.plot(
            means, range(len(sites)), "o", color=ORANGE, markersize=4, markeredgecolor="white", markeredgewidth=0.5
        )
        axes.set_xlabel(f"learned {name}")
    step = max(1, -(-len(sites) // 40))
    left.set_yticks(range(0, len(sites), step), [text(s, 26) for s in sites[::step]], fontsize=7)
    bar = figure.colorbar(image, ax=(left, right), shrink=0.6)
    bar.set_label("share of the layer's channels", fontsize=8)
    return figure


def curvature_lines(rows: Sequence[Mapping[str, Any]], count: int, scored: str) -> Any:
    """Curvature along data and random directions, slope, and accuracy on ``count`` images, against beta.

    Bands are interquartile ranges. ``scored``: the name of the accuracy.
    """
    figure, (curvature, slope, accuracy) = new(8.4, 3.0, ncols=3)
    points = [row for row in rows if row["beta"] is not None]
    betas = [row["beta"] for row in points]
    for axes, kinds in ((curvature, ("data", "random")), (slope, ("lipschitz",))):
        for kind in kinds:
            colour, marker = {"data": (BLUE, "o"), "random": (ORANGE, "s"), "lipschitz": (GREEN, "D")}[kind]
            label = {"data": "towards other images", "random": "random", "lipschitz": "Lipschitz constant"}[kind]
            axes.fill_between(
                betas,
                [r[kind]["low"] for r in points],
                [r[kind]["high"] for r in points],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(betas, [r[kind]["mean"] for r in points], f"{marker}-", color=colour, markersize=5, label=label)
        axes.legend(frameon=False, fontsize=8)
    accuracy.errorbar(betas, **percentages([r["accuracy"] for r in points], count), color=BLUE, **POINT)
    tidy(curvature, "β", "mean absolute second derivative")
    tidy(slope, "β", "local Lipschitz constant")
    tidy(accuracy, "β", f"{scored}, %")
    return figure


def boundaries(toy: Mapping[str, Any]) -> Any:
    """Decision functions on the plane, the boundaries between the classes, and the training points."""
    networks = toy["networks"]
    figure, axes = new(1.9 * len(networks), 2.25, ncols=len(networks), squeeze=False)
    extent, (x, y, labels) = toy["extent"], toy["points"]
    side = len(next(iter(networks.values()))["grid"])
    line = [extent * (2 * i / (side - 1) - 1) for i in range(side)]
    for ax, (name, network) in zip(axes[0], networks.items()):
        grid = network["grid"]
        ax.imshow(
            grid,
            origin="lower",
            extent=(-extent, extent, -extent, extent),
            cmap="PuOr",
            vmin=-0.5,
            vmax=1.5,
            interpolation="bilinear",
        )
        ax.contour(line, line, grid, levels=[0.5], colors="black", linewidths=1.2)
        for label, marker, colour in ((0, "o", "#8a3d00"), (1, "s", "#40107a")):
            points = [(a, b) for a, b, c in zip(x, y, labels) if c == label]
            size = 14 if len(labels) < 300 else 4
            ax.scatter(
                *zip(*points), s=size, marker=marker, color=colour, edgecolors="white", linewidths=0.25, zorder=3
            )
        ax.set_title(text(name), fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def curves(toy: Mapping[str, Any]) -> Any:
    """Regression curves, the noisy training points, and the true curve."""
    figure, axes = new(height=3.2)
    axes.plot(toy["line"], toy["truth"], color=GREY, linestyle="--", linewidth=1.2, label="truth")
    axes.plot(*toy["points"], "o", color="black", markersize=4, label="training points")
    for k, (name, network) in enumerate(toy["networks"].items()):
        style = ("-", "-.", ":")[k % 3]
        axes.plot(toy["line"], network["values"], linestyle=style, color=COLOURS[k % 7], linewidth=2, label=text(name))
    tidy(axes)
    legend(figure, 3)
    return figure


def kernel_bars(rows: Sequence[tuple[str, Mapping[str, float]]], baseline: str) -> Any:
    """Times relative to those of ``baseline``, on a logarithmic scale, with a group of bars per case."""
    names = [n for n in rows[0][1] if n != baseline]
    figure, axes = new(height=1.6 + 0.2 * len(rows) * len(names))
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        positions = [i + height * (k - (len(names) - 1) / 2) for i in range(len(rows))]
        ratios = [times[name] / times[baseline] for _, times in rows]
        axes.barh(positions, ratios, height=height * 0.9, color=COLOURS[k % 7], label=text(name))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [text(case, 34) for case, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    tidy(axes, f"time relative to {text(baseline)} (logarithmic; shorter is faster)", grid="x")
    legend(figure, 3)
    return figure
