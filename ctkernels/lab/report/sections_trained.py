"""How the report shows results of training: the transfer comparison, and JoLA beside other methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import figures
from .page import Picture, Reader, Section, Table
from .sections import seconds

NAMES = {"linear": "linear probe", "sct": "S-CT", "sct-mean-free": "S-CT, c*(β)", "tct": "T-CT"}


def display(method: str) -> str:
    """``"tct+lora-r4"`` is "T-CT + LoRA, rank 4"."""
    return " + ".join(NAMES.get(part, part.replace("lora-r", "LoRA, rank ")) for part in method.split("+"))


def _summary(found: Mapping[str, Any], scale: float) -> str:
    deviation = found["deviation"]
    return f"{scale * found['mean']:.1f}" + ("" if deviation is None else f" ± {scale * deviation:.1f}")


# --- curvature tuning beside other methods ----------------------------------------------------------------------------


def compare(values: Mapping[str, Any]) -> Section:
    setup, table = values["setup"], values["table"]
    models, sets = list(setup["models"]), list(setup["data"])
    section = Section(
        "trained",
        f"{'Training' if values.get('kind') == 'tune' else 'Comparison of methods'}: {', '.join(models)}",
        [line for line in str(values["verdict"]).splitlines() if line],
        [
            ("Data", ", ".join(f"{name} ({_sizes(about)})" for name, about in setup["data"].items())),
            ("Seeds", ", ".join(map(str, setup["seeds"]))),
            ("Time", seconds(sum(cell["seconds"] for cell in values["cells"]))),
        ],
    )
    for model in models:
        for data in sets:
            rows = [row for row in table if row["model"] == model and row["data"] == data]
            if not rows:
                continue
            cells = [
                [
                    display(row["method"]),
                    _summary(row["test"], 100),
                    _summary(row["val"], 100),
                    f"{row['parameters']:,}",
                    seconds(row["seconds"]),
                    ", ".join(f"{k} {v}" for k, v in row["setting"].items()) or "–",
                ]
                for row in rows
            ]
            header = ["method", "test, %", "validation, %", "trained, without head", "time per run", "chosen setting"]
            section.parts.append(Table(f"{model} on {data}: mean ± deviation over seeds", header, cells, (5,)))
            dots = [{"method": display(row["method"]), **row["test"]} for row in rows]
            section.parts.append(
                Picture(
                    figures.data_uri(figures.method_dots(dots, {}, 100, "test accuracy, %")),
                    f"Test accuracy of each method with {model} on {data}; the table above has the numbers.",
                    "Large: mean over seeds; small: each seed.",
                )
            )
    section.parts += _gains(values)
    section.parts += [part for cell in _shown(values) for part in _learned(cell)]
    section.not_helped = _not_helped(values["gains"])
    return section


def _sizes(about: Mapping[str, Any]) -> str:
    sizes = about.get("sizes") or {}
    return ", ".join(f"{v} {k}" for k, v in sizes.items()) or "sizes not recorded"


def _gains(values: Mapping[str, Any]) -> list[Table | Picture]:
    rows = [
        [
            gain["model"],
            display(gain["method"]),
            display(gain["baseline"]),
            f"{100 * gain['points']:+.1f}",
            f"{100 * gain['relative']:+.1f} %",
            f"{gain['better']} of {gain['sets']}",
        ]
        for gain in values["gains"]
    ]
    header = ["network", "method", "against", "points", "relative", "better on"]
    return [Table("Gains, mean over data sets", header, rows, (1, 2))] if rows else []


def _not_helped(gains: list[Mapping[str, Any]]) -> list[str]:
    """Every method and data set that was worse than the baseline, or no better beyond two standard errors."""
    lines = []
    for gain in gains:
        for each in gain["each"]:
            against = (
                f"{gain['model']} on {each['data']}, {display(gain['method'])} against {display(gain['baseline'])}"
            )
            numbers = f"{100 * each['points']:+.1f} ± {100 * each['standard_error']:.1f} points"
            if each["points"] < -2 * each["standard_error"]:
                lines.append(f"{against}: worse, {numbers}.")
            elif each["points"] <= 2 * each["standard_error"]:
                lines.append(f"{against}: no difference beyond chance, {numbers}.")
    return lines


def _shown(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tested runs of the first seed that have something to show: a search, or learned curvature."""
    first = values["setup"]["seeds"][0]
    return [
        cell
        for cell in values["cells"]
        if cell["seed"] == first
        and cell["test"] is not None
        and ("search" in cell["detail"] or "curvature" in cell["detail"])
    ]


def _learned(cell: Mapping[str, Any]) -> list[Table | Picture]:
    where = f"{cell['model']} on {cell['data']}, {display(cell['method'])}, seed {cell['seed']}"
    detail = cell["detail"]
    parts: list[Table | Picture] = []
    if "search" in detail:
        rows = [{"beta": row["beta"], "accuracy": row["val_accuracy"]} for row in detail["search"]]
        chosen = detail["beta"]
        parts.append(
            Picture(
                figures.data_uri(figures.validation_line(rows, chosen)),
                f"Validation accuracy against beta, {where}; chosen: {'the plain network' if chosen is None else f'{chosen:g}'}.",
                f"{where}: validation accuracy against β, the choice ringed.",
            )
        )
    if "curvature" in detail:  # peft's wrappers are no part of a layer's name
        learned = {site.removeprefix("base_model.model."): found for site, found in detail["curvature"].items()}
        parts.append(
            Picture(
                figures.data_uri(figures.learned_values(learned), "png"),
                f"Learned beta and c in every layer, {where}; the table below has the numbers.",
                f"{where}: how the learned β and c are distributed in every layer; dots are means.",
            )
        )
        rows_of = [
            [
                site,
                *(
                    f"{found[kind][name]:.3f}"
                    for kind in ("beta", "coeff")
                    for name in ("mean", "deviation", "low", "high")
                ),
            ]
            for site, found in learned.items()
        ]
        header = [
            "layer",
            *(f"{kind} {name}" for kind in ("β", "c") for name in ("mean", "deviation", "least", "most")),
        ]
        parts.append(Table(f"{where}: learned values by layer", header, rows_of, folded=True))
    return parts


# --- JoLA -------------------------------------------------------------------------------------------------------------


def jola(values: Mapping[str, Any]) -> Section:
    primary, table = values["primary"], values["table"]
    metrics = sorted(table[0]["metrics"], key=lambda name: (name != primary, name)) if table else []
    rows = [
        [
            row["method"],
            *(_summary(row["metrics"][m], 1) for m in metrics),
            f"{row['parameters']:,}",
            seconds(row["seconds"]),
            ", ".join(f"{k} {v:g}" for k, v in row["setting"].items()) or "–",
        ]
        for row in table
    ]
    header = ["method", *(m.replace("_", " ") for m in metrics), "trained", "time per run", "chosen setting"]
    says = str(values["verdict"])
    section = Section(
        "trained",
        "Editing attention heads (JoLA) beside other methods",
        [says],
        [
            ("Seeds", ", ".join(map(str, values["setup"]["seeds"]))),
            ("Time", seconds(sum(c["seconds"] for c in values["cells"]))),
        ],
        [Table("Test scores: mean ± deviation over seeds", header, rows, (len(header) - 1,))],
        not_helped=[] if "better than every other method" in says else [f"JoLA: {says.partition(':')[0]}."],
    )
    if rows:
        dots = [{"method": row["method"], **row["metrics"][primary]} for row in table]
        section.parts.append(
            Picture(
                figures.data_uri(figures.method_dots(dots, {}, 1, f"test {primary.replace('_', ' ')}")),
                f"Test {primary.replace('_', ' ')} of each method; the table above has the numbers.",
                "Large: mean over seeds; small: each seed.",
            )
        )
    for cell in values["cells"]:
        if cell["gates"] and cell["test"] is not None:
            section.parts.append(_gates(cell))
            break
    return section


def _gates(cell: Mapping[str, Any]) -> Picture:
    from ...adapters.jola.gate_map import GateMap, draw_gates

    last = len(cell["gates"]) - 1
    picked = sorted({0, last // 2, last})
    maps = [GateMap.from_dict(cell["gates"][i]) for i in picked]
    labels = [f"step {cell['gates'][i]['step']}" for i in picked]
    kept = GateMap.from_dict(cell["gates"][cell["best"]]) if cell["best"] <= last else maps[-1]
    return Picture(
        figures.data_uri(draw_gates(maps, labels), "png"),
        f"Heat maps of JoLA's gates over training, layers by heads. Kept: {kept.text()}.",
        f"JoLA's gates over training, seed {cell['seed']}. Kept: {kept.text()}.",
    )


READERS: dict[str, Reader] = {"ctkernels.compare/1": compare, "ctkernels.compare_methods/1": jola}
