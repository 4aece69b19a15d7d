"""The report's section about kernel benchmarks, from the files of ``python -m benchmarks``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figures
from .section import SECTIONS, Picture, Section, Table


def benchmarks(values: Mapping[str, Any]) -> Section:
    provenance, records = values["provenance"], values["records"]
    parts: list[Table | Picture] = []
    lines: list[str] = []
    for op in dict.fromkeys(r["op"] for r in records):
        of_op = [r for r in records if r["op"] == op]
        for key, title in (("forward_ms", "forward"), ("forward_backward_ms", "forward + backward")):
            parts.append(_times(f"{op}, {title}, milliseconds", of_op, key))
            if "official" in of_op[0][key]:
                ratios = sorted(r[key]["official"] / r[key]["ours"] for r in of_op)
                lines.append(
                    f"{op}, {title}: {ratios[0]:.1f} to {ratios[-1]:.1f} times the speed of the official code "
                    f"(median {ratios[len(ratios) // 2]:.1f})."
                )
        parts.append(_bars(op, of_op))
    not_helped = []
    if bars := values.get("bars"):
        rows = [[b["what"], b["dtype"], f"{b['value']:.2f}", b["bound"], "yes" if b["met"] else "no"] for b in bars]
        header = ["bound", "dtype", "measured", "must be", "met"]
        parts.append(Table("Bounds that the kernels are held to", header, rows, (1,)))
        if unmet := sum(not b["met"] for b in bars):
            not_helped = [f"Kernels: {unmet} of the {len(bars)} bounds they are held to were not met in this run."]
    machine = str(provenance.get("device", "unknown"))
    if "cpu" in provenance:
        machine = f"{provenance['cpu']}, {provenance['cpu_capability']}, {provenance['threads']} threads"
    versions = f"torch {provenance['torch']}, Python {provenance['python']}, commit {provenance['commit']}"
    facts = [("Machine", machine), ("Versions", versions)]
    return Section("speed", "Kernel benchmarks", lines, facts, parts, not_helped=not_helped)


def _times(caption: str, records: Sequence[Mapping[str, Any]], key: str) -> Table:
    names = list(records[0][key])
    baseline = next(n for n in ("copy" if key == "forward_ms" else "relu", "relu", "mul", names[0]) if n in names)
    rows = [
        [
            r["case"],
            r["dtype"],
            r["parameters"],
            *(f"{r[key][n]:.3g}" for n in names),
            f"{r[key]['ours'] / r[key][baseline]:.2f}",
        ]
        for r in records
    ]
    return Table(caption, ["case", "dtype", "parameters", *names, f"ours / {baseline}"], rows, (1, 2))


def _bars(op: str, records: Sequence[Mapping[str, Any]]) -> Picture:
    dtype, parameters = records[0]["dtype"], records[-1]["parameters"]
    shown = [r for r in records if (r["dtype"], r["parameters"]) == (dtype, parameters)]
    cases = [(r["case"], r["forward_backward_ms"]) for r in shown][:8]
    baseline = next(n for n in ("relu", "mul", *cases[0][1]) if n in cases[0][1])
    return Picture(
        figures.data_uri(figures.kernel_bars(cases, baseline)),
        f"Time of {op}, forward and backward, relative to {baseline}; the table above has the numbers.",
        f"{op}, forward + backward, {shown[0]['dtype']}, parameters: {shown[0]['parameters']}.",
    )


SECTIONS["benchmarks"] = benchmarks
