"""How the report shows results on frozen networks: searches over beta, robustness, curvature, kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from ..robustness.result import METHODS
from . import figures
from .page import Picture, Reader, Section, Table


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(gain: Mapping[str, Any]) -> str:
    return f"{100 * gain['gain']:+.1f} ± {100 * gain['standard_error']:.1f}"


def what(values: Mapping[str, Any]) -> str:
    """The network and the data of a result of the command line, for a title."""
    options = values.get("options") or {}
    model, data = options.get("model"), options.get("data")
    named = f"{model} on {Path(str(data)).name}" if model and isinstance(data, (str, Path)) else ""
    return f": {named}" if named else ""


def images(values: Mapping[str, Any]) -> tuple[str, str]:
    sizes = values["sizes"]
    shown = ", ".join(
        f"{sizes[name]} {word}"
        for name, word in (("train", "to train the probe"), ("val", "validation"), ("test", "test"))
        if name in sizes
    )
    return "Images", f"{shown}; {sizes['classes']} classes"


def seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


# --- searches over beta -----------------------------------------------------------------------------------------------


def search_beta(values: Mapping[str, Any]) -> Section:
    from ..search.result import BetaSearch

    section = _searches([BetaSearch.from_dict(values)], f"One β for all activations{what(values)}")
    section.parts.append(_grid_table([BetaSearch.from_dict(values)]))
    return section


def draws(values: Mapping[str, Any]) -> Section:
    from ..search.result import BetaSearch

    results = [BetaSearch.from_dict(draw) for draw in values["draws"]]
    section = _searches(results, f"One β for all activations, {len(results)} draws of images")
    rows = [
        [str(i + 1), _beta(r.chosen), percent(r.test.plain), percent(r.test.steered), points(r.test.to_dict())]
        for i, r in enumerate(results)
    ]
    section.parts.append(
        Table("Each draw, test accuracy", ["draw", "chosen β", "plain", "steered", "gain, points"], rows)
    )
    section.parts.append(_grid_table(results))
    return section


def _searches(results: list[Any], title: str) -> Section:
    from ..search.plot import draw
    from ..search.result import verdict

    first = results[0]
    says = verdict(results)
    chosen = ", ".join(_beta(r.chosen) for r in results)
    facts = [
        images({"sizes": first.sizes}),
        (
            "Steered",
            f"{len(first.sites)} activations" + (f"; {len(first.missed)} could not be" if first.missed else ""),
        ),
        ("Chosen β", chosen),
        ("Trained numbers", "0 (a linear probe reads the features)"),
        ("Time", seconds(sum(r.seconds["total"] for r in results))),
    ]
    figure = draw(results)
    figure.set_size_inches(5.6, 4.2)
    picture = Picture(
        figures.data_uri(figure),
        f"Line chart of validation accuracy against beta; chosen: {chosen}. The table below has the numbers.",
        "Validation accuracy for every β, the choice ringed; diamonds are what the test said.",
    )
    return Section("pilot", title, [says], facts, [picture], not_helped=_unless_helped(title, says))


def _unless_helped(title: str, says: str) -> list[str]:
    """For the summary: what a verdict says before its numbers, unless it says that steering helped."""
    return [] if says.startswith("Steering helped here") else [f"{title}: {says.partition(':')[0]}."]


def _grid_table(results: list[Any]) -> Table:
    rows = []
    for i, beta in enumerate(results[0].betas):
        times = sum(r.chosen == beta for r in results)
        mark = "" if not times else "chosen" if len(results) == 1 else f"chosen in {times}"
        name = f"{beta:g}" + (" (plain network)" if beta == 1 and results[0].plain_is_beta_1 else "")
        rows.append([name, percent(mean(r.val_accuracy[i] for r in results)), mark])
    if not results[0].plain_is_beta_1:
        times = sum(r.chosen is None for r in results)
        rows.append(["plain network", percent(mean(r.plain_val_accuracy for r in results)), "chosen" if times else ""])
    return Table(
        "Validation accuracy" + (", mean of the draws" if len(results) > 1 else ""), ["β", "validation", ""], rows, (2,)
    )


def _beta(beta: float | None) -> str:
    return "plain" if beta is None else f"{beta:g}"


def search_betas(values: Mapping[str, Any]) -> Section:
    title = f"{len(values['groups'])} β, {values['strategy']} search{what(values)}"
    made, reached = values["evaluations"]["made"], values["evaluations"]["reached"]
    rows = [[name, f"{values['chosen'][name]:.4g}", str(len(sites))] for name, sites in values["groups"].items()]
    test = values["test"]
    facts = [
        images(values),
        ("Evaluations", f"{made}; the chosen betas were found by number {reached}"),
        (
            "Validation",
            f"{percent(values['val_accuracy']['chosen'])}, plain network {percent(values['val_accuracy']['plain'])}",
        ),
        (
            "Test",
            f"{percent(test['accuracy_chosen'])}, plain network {percent(test['accuracy_plain'])} ({points(test)} points)",
        ),
        ("Time", seconds(values["seconds"]["total"])),
    ]
    parts: list[Table | Picture] = [
        Picture(
            figures.data_uri(figures.search_history(values["history"], reached)),
            f"Validation accuracy of {made} evaluations; the best was found by number {reached}.",
            "What every evaluation gave, and the best so far.",
        ),
        Picture(
            figures.data_uri(figures.chosen_betas(values["groups"], values["chosen"])),
            "The chosen beta of every activation, from the input to the output; the table below has the numbers.",
        ),
        Table("Chosen β by group", ["activations", "β", "how many"], rows),
    ]
    says = str(values["verdict"])
    return Section("pilot", title, [says], facts, parts, not_helped=_unless_helped(title, says))


# --- robustness -------------------------------------------------------------------------------------------------------


def robust(values: Mapping[str, Any]) -> Section:
    conditions = values["conditions"]
    title = f"Accuracy under attack and corruption{what(values)}"
    lines = str(values["verdict"]).splitlines()
    rows = []
    for condition in conditions:
        for row in condition["test"]:
            beta = _beta(condition["chosen"]) if row["method"] == "s-ct" else "–"
            rows.append(
                [
                    condition["name"],
                    METHODS.get(row["method"], row["method"]),
                    beta,
                    percent(row["clean"]),
                    percent(row["accuracy"]),
                    "–" if row["method"] == "plain" else points(row),
                    str(row["images"]),
                ]
            )
    header = ["condition", "method", "β", "clean", "under it", "gain, points", "images"]
    parts: list[Table | Picture] = [
        Table("Test accuracy", header, rows, (1,)),
        Picture(
            figures.data_uri(figures.robust_test(conditions, METHODS)),
            "Test accuracy of each method under each condition; the table above has the numbers.",
            "Lines are two standard errors of the difference to the plain network.",
        ),
    ]
    for condition in conditions:
        parts.append(
            Picture(
                figures.data_uri(figures.robust_choice(condition)),
                f"Validation accuracy under {condition['name']} against beta; chosen: {_beta(condition['chosen'])}.",
                f"How β was chosen for {condition['name']}, on validation images.",
            )
        )
        steps = list(dict.fromkeys(name for row in condition["test"] for name in row["steps"]))
        if steps:
            names = [METHODS.get(row["method"], row["method"]) for row in condition["test"]]
            attack = condition["kind"] == "attack"
            caption = f"{condition['name']}: accuracy {'left after each attack in turn' if attack else 'under each corruption'}"
            cells = [
                [s.replace("_", " "), *(percent(r["steps"][s]) if s in r["steps"] else "–" for r in condition["test"])]
                for s in steps
            ]
            parts.append(Table(caption, ["attack" if attack else "corruption", *names], cells))
    arguments = values["arguments"]
    facts = [
        images(values),
        (
            "Attacks",
            f"{', '.join(arguments['attacks'])}; β chosen with {', '.join(arguments['val_attacks'])}; "
            f"{arguments['iterations']} iterations, {arguments['queries']} queries",
        ),
        (
            "Classifier",
            "a linear probe on frozen features" if arguments["head"] == "probe" else "the network's own output",
        ),
        ("Time", seconds(values["seconds"]["total"])),
    ]
    # a sentence is "condition, method: what was found: numbers"
    found = [": ".join(line.split(": ")[:2]) + "." for line in lines if ": it helped: " not in line]
    return Section("robust", title, lines, facts, parts, not_helped=found)


def _start(line: str, found: str) -> str:
    """A sentence up to the end of what was found in it, without its numbers."""
    return f"{line[: line.index(found) + len(found)]}."


# --- curvature and toys -----------------------------------------------------------------------------------------------


def curvature(values: Mapping[str, Any]) -> Section:
    rows = [
        [
            _beta(row["beta"]),
            *(f"{row[kind]['mean']:.4g}" for kind in ("data", "random", "lipschitz")),
            percent(row["accuracy"]),
        ]
        for row in values["rows"]
    ]
    plain, soft = values["rows"][0], values["rows"][1]
    facts = [
        (
            "Measured",
            f"second derivatives of the {values['quantity']}, {values['samples']} images, "
            f"{values['directions']} directions of each kind",
        ),
        ("Time", seconds(values["seconds"]["total"])),
    ]
    says = (
        f"From the plain network to β = {soft['beta']:g}, curvature towards other images went from "
        f"{plain['data']['mean']:.3g} to {soft['data']['mean']:.3g}, and the Lipschitz constant from "
        f"{plain['lipschitz']['mean']:.3g} to {soft['lipschitz']['mean']:.3g}."
    )
    parts: list[Table | Picture] = [
        Picture(
            figures.data_uri(figures.curvature_lines(values["rows"])),
            "Curvature and Lipschitz constant against beta; the table below has the numbers.",
            "Means over images; bands go from the first to the third quartile.",
        ),
        Table("Means over images", ["β", "towards other images", "random directions", "Lipschitz", "accuracy"], rows),
    ]
    return Section("understand", f"Curvature and slope{what(values)}", [says], facts, parts)


def toys(values: Mapping[str, Any]) -> Section:
    from ..analysis.toys import MEASURES

    runs = values["runs"]
    parts: list[Table | Picture] = []
    for run in runs:
        for key, shown, kind, says in (
            (
                "spirals",
                figures.boundaries,
                "png",
                "Two spirals with flipped labels: one trained network at several β.",
            ),
            ("curve", figures.curves, "svg", "A noisy sine: one trained network at several β."),
            (
                "circles",
                figures.boundaries,
                "png",
                "Two circles: a trained network, then trained on with LoRA or T-CT.",
            ),
        ):
            about = ", ".join(run[key]["networks"])
            parts.append(
                Picture(
                    figures.data_uri(shown(run[key]), kind), f"{says} Shown: {about}.", f"{says} Seed {run['seed']}."
                )
            )
    lines = []
    for title, key, measure, scale, better in MEASURES:
        found = {
            name: mean(scale * run[key]["networks"][name][measure] for run in runs) for name in runs[0][key]["networks"]
        }
        rows = [
            [name, f"{found[name]:.3g}", *(f"{scale * run[key]['networks'][name][measure]:.3g}" for run in runs)]
            for name in found
        ]
        parts.append(
            Table(f"{title}; {better} is better", ["network", "mean", *(f"seed {run['seed']}" for run in runs)], rows)
        )
        best = (max if better == "higher" else min)(found, key=lambda name: found[name])
        lines.append(f"{title[0].upper()}{title[1:]}: best on average {best} ({found[best]:.3g}).")
    facts = [
        ("Seeds", f"{', '.join(map(str, values['setup']['seeds']))}; all of them are shown"),
        ("Time", seconds(values["seconds"]["total"])),
    ]
    return Section("understand", "Decision boundaries and regression curves of small networks", lines, facts, parts)


# --- kernels ----------------------------------------------------------------------------------------------------------


def benchmarks(values: Mapping[str, Any]) -> Section:
    about, records = values["provenance"], values["records"]
    parts: list[Table | Picture] = []
    lines = []
    for op in dict.fromkeys(r["op"] for r in records):
        some = [r for r in records if r["op"] == op]
        for key, title in (("forward_ms", "forward"), ("forward_backward_ms", "forward + backward")):
            names = list(some[0][key])
            yardstick = next(
                n for n in ("copy" if key == "forward_ms" else "relu", "relu", "mul", names[0]) if n in names
            )
            rows = [
                [
                    r["case"],
                    r["dtype"],
                    r["parameters"],
                    *(f"{r[key][n]:.3g}" for n in names),
                    f"{r[key]['ours'] / r[key][yardstick]:.2f}",
                ]
                for r in some
            ]
            parts.append(
                Table(
                    f"{op}, {title}, milliseconds",
                    ["case", "dtype", "parameters", *names, f"ours / {yardstick}"],
                    rows,
                    (1, 2),
                )
            )
            if "official" in names:
                ratios = sorted(r[key]["official"] / r[key]["ours"] for r in some)
                lines.append(
                    f"{op}, {title}: {ratios[0]:.1f} to {ratios[-1]:.1f} times the speed of the official code "
                    f"(median {ratios[len(ratios) // 2]:.1f})."
                )
        shown = [r for r in some if r["dtype"] == some[0]["dtype"] and r["parameters"] == some[-1]["parameters"]]
        cases = [(r["case"], r["forward_backward_ms"]) for r in shown][:8]
        yardstick = next(n for n in ("relu", "mul", *cases[0][1]) if n in cases[0][1])
        parts.append(
            Picture(
                figures.data_uri(figures.kernel_bars(cases, yardstick)),
                f"Time of {op}, forward and backward, relative to {yardstick}; the table above has the numbers.",
                f"{op}, forward + backward, {shown[0]['dtype']}, parameters: {shown[0]['parameters']}.",
            )
        )
    missed = []
    if bars := values.get("bars"):
        rows = [[b["what"], b["dtype"], f"{b['value']:.2f}", b["bound"], "yes" if b["met"] else "no"] for b in bars]
        parts.append(
            Table("Bounds that the kernels are held to", ["bound", "dtype", "measured", "must be", "met"], rows, (1,))
        )
        unmet = sum(not b["met"] for b in bars)
        missed = (
            [f"Kernels: {unmet} of the {len(bars)} bounds they are held to were not met in this run."] if unmet else []
        )
    facts = [
        (
            "Machine",
            f"{about['cpu']}, {about['cpu_capability']}, {about['threads']} threads"
            if "cpu" in about
            else str(about.get("device", "unknown")),
        ),
        ("Versions", f"torch {about['torch']}, Python {about['python']}, commit {about['commit']}"),
    ]
    return Section("speed", "Kernel benchmarks", lines, facts, parts, not_helped=missed)


READERS: dict[str, Reader] = {
    "ctkernels.search_beta/1": search_beta,
    "draws": draws,
    "ctkernels.search_betas/1": search_betas,
    "ctkernels.robust/1": robust,
    "ctkernels.curvature/1": curvature,
    "ctkernels.toys/1": toys,
    "benchmarks": benchmarks,
}
