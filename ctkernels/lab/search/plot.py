"""The plot of a search: validation accuracies against beta, the choice, and test accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.figures import BLUE, GREY, ORANGE, POINT, new, tidy
from ..stats import share_error


def draw(runs: Sequence[Any], title: str = "") -> Any:
    """The plot of :func:`plot`, as a matplotlib figure. ``runs``: one or more :class:`BetaSearch`."""
    if not runs or any(r.betas != runs[0].betas for r in runs):
        raise ValueError(
            f"results must be one or more searches over one grid, got {[len(r.betas) for r in runs]} betas"
        )
    figure, axes = new(7.2, 4.4, dpi=150)
    betas, n = runs[0].betas, len(runs)
    mean = [100 * sum(r.val_accuracy[i] for r in runs) / n for i in range(len(betas))]
    plain = 100 * sum(r.plain_val_accuracy for r in runs) / n
    if n == 1:
        low = high = [100 * share_error(a, runs[0].validated) for a in runs[0].val_accuracy]
        line = "validation ± 1 standard error"
    else:
        columns = list(zip(*(r.val_accuracy for r in runs)))
        low = [
            max(0.0, m - 100 * min(c)) for m, c in zip(mean, columns)
        ]  # rounding may make a mean less than its least
        high = [max(0.0, 100 * max(c) - m) for m, c in zip(mean, columns)]
        line = f"validation, mean and range over {n} draws"
    axes.fill_between(
        betas,
        [m - e for m, e in zip(mean, low)],
        [m + e for m, e in zip(mean, high)],
        color=BLUE,
        alpha=0.1,
        linewidth=0,
    )
    axes.errorbar(betas, mean, yerr=(low, high), color=BLUE, linewidth=2, **POINT, label=line)
    axes.axhline(plain, color=GREY, linestyle="--", linewidth=1.2, label="plain network, validation")
    _choices(axes, runs)
    _tests(axes, runs)
    axes.set_title(title, loc="left", fontsize=11)
    tidy(axes, "β   (1 = the network's own activation)" if runs[0].plain_is_beta_1 else "β", "accuracy, %")
    axes.margins(x=0.06, y=0.12)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _choices(axes: Any, runs: Sequence[Any]) -> None:
    """A ring around the chosen point of each run."""
    chosen = [(r.chosen, 100 * r.chosen_val_accuracy) for r in runs if r.chosen is not None]
    if chosen:
        style = {"facecolors": "none", "edgecolors": ORANGE, "linewidths": 2, "zorder": 4}
        axes.scatter(*zip(*chosen), s=130 if len(runs) == 1 else 70, **style, label="chosen by validation")


def _tests(axes: Any, runs: Sequence[Any]) -> None:
    """Diamonds, with values, for the mean test accuracies of the plain network and at the mean chosen beta."""
    n = len(runs)
    chosen = [r.chosen for r in runs if r.chosen is not None]
    plain = 100 * sum(r.test.plain for r in runs) / n
    steered = 100 * sum(r.test.steered for r in runs) / n
    points = [(1.0, plain, GREY, "plain network, test")]
    if not all(r.kept_plain for r in runs):
        points.append((sum(chosen) / len(chosen), steered, ORANGE, "chosen β, test"))
    samples = sum(r.test.samples for r in runs)
    for beta, accuracy, colour, label in points:
        error = 100 * share_error(accuracy / 100, samples)
        axes.errorbar([beta], [accuracy], yerr=[error], color=colour, linestyle="none", capsize=3, zorder=4)
        axes.scatter([beta], [accuracy], marker="D", s=55, color=colour, edgecolors="white", zorder=5, label=label)
        axes.annotate(
            f"test {accuracy:.1f} %",
            (beta, accuracy),
            xytext=(9, 5) if beta == 1 else (34, 26),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8} if beta != 1 else None,
            zorder=6,
            annotation_clip=False,
            fontsize=9,
            fontweight="bold",
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
