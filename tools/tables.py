"""Writes the figures of the documentation from benchmarks/results: ``python tools/tables.py [--check]``.

A table is between ``<!-- table NAME -->`` and ``<!-- end -->``; a figure in a sentence stands before ``<!-- = NAME -->``. With
``--check`` nothing is written, and an outdated table or figure is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ctkernels.lab.stats import spread, summary
from ctkernels.lab.transfer import TransferComparison
from ctkernels.lab.transfer.result import display
from ctkernels.lab.transfer.tune import STAGES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n\n).*?(\n<!-- end -->)", re.S)

FIGURE = re.compile(r"(?P<value>[-+]?\d(?:[\d.,]*\d)?)(?P<name><!-- = (\S+) -->)")

Record = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say which pages are out of date, and write nothing")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        before = page.read_text()
        after = MARKED.sub(lambda match: match[1] + TABLES[match["name"]]() + match[3], before)
        after = FIGURE.sub(lambda match: figure(match[3]) + match["name"], after)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after)
    if check and stale:
        print(f"{', '.join(stale)}: not what benchmarks/results says; run python tools/tables.py", file=sys.stderr)
    return 1 if check and stale else 0


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def _one(records: Sequence[Record], **values: str) -> Record:
    """The only record with all of ``values``."""
    (record,) = (r for r in records if all(r.get(key) == value for key, value in values.items()))
    return record


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ms(value: float | None) -> str:
    """Milliseconds with three digits, or nothing."""
    if value is None:
        return ""
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ours(value: float | None) -> str:
    return f"**{_ms(value)}**"


def ctu_cpu() -> str:
    """The unit on a CPU, against a copy, ReLU and the published expression."""
    records = _results("cpu")["records"]
    rows = []
    for key, name in (("forward_ms", "forward"), ("forward_backward_ms", "forward + backward, all gradients")):
        for dtype in ("fp32", "bf16"):
            t = _one(records, op="ctu", dtype=dtype)[key]
            rows.append(
                [
                    f"{name}, {dtype}",
                    _ms(t.get("copy")),
                    _ms(t["relu"]),
                    _ours(t["ours"]),
                    _ms(t["official"]),
                    _ms(t["official compiled"]),
                ]
            )
    saved = _one(records, op="ctu", dtype="fp32")["saved_bytes_over_x"]
    rows.append(
        [
            "bytes kept for the backward pass / bytes of x",
            "",
            f"{saved['relu']:.1f}",
            f"**{saved['ours']:.1f}**",
            f"{saved['official']:.1f}",
            "",
        ]
    )
    about = _results("cpu")["provenance"]
    shape = ", ".join(map(str, _one(records, op="ctu", dtype="fp32")["shape"]))
    header = [
        f"({shape}), knobs by channel, {about['threads']} threads, {about['cpu_capability']}, ms",
        "copy",
        "ReLU",
        "**ctu**",
    ]
    return _table([*header, "published", "published, compiled"], rows)


def head_edit_cpu() -> str:
    """The head edit on a CPU, against a copy, a multiplication and the published loop."""
    records = _results("cpu")["records"]
    rows = []
    for key, name in (("forward_ms", "forward"), ("forward_backward_ms", "forward + backward, all gradients")):
        for dtype in ("fp32", "bf16"):
            t = _one(records, op="head_edit", dtype=dtype)[key]
            row = [
                _ms(t.get("copy")),
                _ms(t["mul"]),
                _ours(t["ours"]),
                _ms(t["official"]),
                _ms(t["reference compiled"]),
            ]
            rows.append([f"{name}, {dtype}", *row])
    shape = ", ".join(map(str, _one(records, op="head_edit", dtype="fp32")["shape"]))
    header = [
        f"({shape}) as 32 heads of 128, ms",
        "copy",
        "multiplication by a row (input gradient only)",
        "**head_edit**",
    ]
    return _table([*header, "published loop", "reference, compiled"], rows)


def network_cpu() -> str:
    """A ResNet-50 with units on a CPU, relative to others."""
    both = [_one(_results("networks")["records"], dtype=dtype) for dtype in ("fp32", "bf16")]

    def row(name: str, *ratios: tuple[str, str, str]) -> list[str]:
        return [name, *(", ".join(f"{r[key][a] / r[key][b]:.2f}" for key, a, b in ratios) for r in both)]

    fused, published, plain = "CT, fused", "CT as published", "plain ReLU"
    step, still = "step_ms", "inference_ms"
    rows = [
        row("fixed units, inference / plain ReLU network", (still, fused, plain)),
        row("the same / plain ReLU network with BatchNorm folded", (still, fused, f"{plain}, BatchNorm folded")),
        row("learned units, training step / plain network, forward + backward to the input", (step, fused, plain)),
        row("units as published / ours: inference, training step", (still, published, fused), (step, published, fused)),
        row(
            "both compiled: inference, training step",
            (still, f"{published}, compiled", f"{fused}, compiled"),
            (step, f"{published}, compiled", f"{fused}, compiled"),
        ),
        row(
            "ours compiled / ours: inference, training step",
            (still, f"{fused}, compiled", fused),
            (step, f"{fused}, compiled", fused),
        ),
        row(
            "peak memory of that step / plain, and with everything trained",
            ("step_peak_bytes", fused, plain),
            ("full_step_peak_bytes", fused, plain),
        ),
    ]
    return _table(["ResNet-50, batch 8 × 224², 2 cores", "fp32", "bf16"], rows)


def formats_cpu() -> str:
    """A fused ResNet-50 on a CPU, relative to the plain one, in both memory formats."""
    about, records = _results("formats")["provenance"], _results("formats")["records"]
    sizes = dict.fromkeys((r["batch"], r["side"]) for r in records)
    columns = list(dict.fromkeys((r["format"], r["dtype"]) for r in records))

    def ratio(batch: int, side: int, memory_format: str, dtype: str) -> str:
        (found,) = (
            r["inference_ms"]
            for r in records
            if (r["batch"], r["side"], r["format"], r["dtype"]) == (batch, side, memory_format, dtype)
        )
        return f"{found['fused'] / found['plain ReLU']:.2f}"

    rows = [[f"{batch} × {side}²", *(ratio(batch, side, *c) for c in columns)] for batch, side in sizes]
    isa = about["onednn_max_cpu_isa"]
    where = f"{about['cpu']}{f', {isa}' if isa else ''}, threads: {about['threads']}"
    return _table([f"fused / plain, {where}", *(f"{f}, {d}" for f, d in columns)], rows)


def calls_cpu() -> str:
    """Host time of calls on tiny tensors."""
    records = _results("calls")["records"]
    names = {"forward": "", "both": ", forward and backward"}
    rows = [[f"{r['call']}{names[r['part']]}", f"{r['us']:.1f}", str(r["frames"])] for r in records]
    return _table(["a call on 16 values", "µs of CPU", "Python frames"], rows)


def ops_h100() -> str:
    """Both ops on an H100, forward and backward with all gradients."""
    records = _results("h100")["ops"]["records"]
    rows = []
    for op, case, name, plain, compiled in (
        ("ctu", "ResNet-50 stage 1", "ctu, (32, 256, 56, 56)", "relu", "official compiled"),
        ("head_edit", "8 x 512 tokens", "head edit, (8, 512, 32 heads of 128)", "mul", "reference compiled"),
    ):
        for dtype in ("fp32", "bf16"):
            t = _one(records, op=op, case=case, dtype=dtype)["forward_backward_ms"]
            row = [_ms(t[plain]), _ours(t["ours"]), _ours(t["ours, triton"]), _ms(t[compiled]), _ms(t["official"])]
            rows.append([f"{name}, {dtype}", *row])
    header = ["forward + backward, all gradients, ms", "ReLU, or a product by a row", "**CUDA**", "**Triton**"]
    return _table([*header, "compiled", "published"], rows)


def compare() -> str:
    """Accuracies of `make compare`, one table per network."""
    return TransferComparison.read(ROOT / "benchmarks/results/compare.json").markdown() + "\n"


def kept() -> str:
    """What validation keeps of the probe, S-CT and T-CT in `make compare`, seed by seed, as `tune` does without a margin."""
    result = TransferComparison.read(ROOT / "benchmarks/results/compare.json")
    rows, means = [], []
    for model in result.models:
        for data in result.setup["data"]:
            runs = [result.tested(model, data, stage) for stage in STAGES]
            chosen = [max(of_seed, key=lambda run: run.validation["accuracy"]) for of_seed in zip(*runs)]
            scores = [[100 * run.test for run in some] for some in (runs[0], runs[-1], chosen)]
            means.append([mean(values) for values in scores])
            stages = ", ".join(display(run.method) for run in chosen)
            rows.append([model, data, *(spread(summary(values)) for values in scores), stages])
    rows.append(["mean", "", *(f"{mean(values):.1f}" for values in zip(*means)), ""])
    return _table(["network", "data", "linear probe", "T-CT", "kept", "which, by seed"], rows)


def study() -> str:
    """Accuracies of `make study` by method and task."""
    values = _results("study")
    tasks = list(values["setup"])
    rows = []
    for row in values["table"]:
        beside = row.get("difference")
        rows.append(
            [
                row["method"],
                *(spread(row["tasks"][task]) for task in tasks),
                spread(row["mean"]),
                f"{beside['mean']:+.1f} ± {beside['standard_error']:.1f}" if beside else "",
                f"{row['parameters']:,}",
            ]
        )
    return _table(["accuracy in %", *tasks, "mean", "beside LoRA", "trained numbers"], rows)


def ablation() -> str:
    """What each change to JoLA's training gave, from `python examples/ablation.py`."""
    values = _results("ablation")
    tasks = values["setup"]["tasks"]
    rows = []
    for row in values["table"]:
        away = row.get("difference")
        scores = [spread(row["tasks"][task]) for task in tasks]
        difference = f"{away['mean']:+.1f} ± {away['standard_error']:.1f}" if away else ""
        rows.append([row["text"], *scores, spread(row["mean"]), difference, f"{row['lowest']:.1f}"])
    return _table(["accuracy in %", *tasks, "mean", "difference", "lowest run"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "ctu-cpu": ctu_cpu,
    "head-edit-cpu": head_edit_cpu,
    "network-cpu": network_cpu,
    "formats-cpu": formats_cpu,
    "calls-cpu": calls_cpu,
    "ops-h100": ops_h100,
    "compare": compare,
    "kept": kept,
    "study": study,
    "ablation": ablation,
}


def figure(name: str) -> str:
    """A figure by its name: the file of results, and what of it, with slashes."""
    kind, *path = name.split("/")
    return FIGURES[kind](*path)


def _of_study(method: str, what: str) -> str:
    row = _one(_results("study")["table"], method=method)
    if what == "parameters":
        return f"{row['parameters']:,}"
    if what == "gain":
        return f"{row['difference']['mean']:.1f}"
    return f"{(row['mean'] if what == 'mean' else row['tasks'][what])['mean']:.1f}"


def _of_compare(network: str, method: str, data: str = "") -> str:
    """The gain of a method over the linear probe in points, without its sign; or the mean over all pairs."""
    found = _results("compare")
    if network == "all":
        pairs = [row["test"]["mean"] for row in found["table"] if row["method"] == method]
        return f"{100 * sum(pairs) / len(pairs):.1f}"
    rows = [row for row in found["gains"] if row["model"].rpartition(":")[2] == network and row["baseline"] == "linear"]
    gain = _one(rows, method=method)
    gain = _one(gain["each"], data=data) if data else gain
    return f"{abs(100 * gain['points']):.1f}"


def _of_training(values: Record, above: str, below: str) -> str:
    return f"{values[above] / values[below]:.2f}"


_LLAMA = {
    "jola": "JoLA step",
    "lora": "LoRA r=8 step",
    "frozen": "frozen, forward + backward to the embeddings",
    "free": "frozen, forward + backward to the first edit",
}


def _of_llama(record: Record, above: str, below: str) -> str:
    """The ratio of two training steps, or of two inferences."""
    if above in record["inference_ms"]:
        return _of_training(record["inference_ms"], above, below)
    return _of_training(record["training_ms"], _LLAMA[above], _LLAMA[below])


def _of_llama_apart(end: str) -> str:
    """The least or the largest ratio of the steps of LoRA and JoLA, over processes."""
    steps = [process["training_ms"] for process in _results("jola_step")["records"][0]["processes"]]
    ratios = [step[_LLAMA["lora"]] / step[_LLAMA["jola"]] for step in steps]
    return f"{(min if end == 'least' else max)(ratios):.2f}"


def _of_h100(network: str, above: str, below: str) -> str:
    (record,) = _results("h100")["jola" if network == "llama" else "networks"]["records"]
    return (
        _of_llama(record, above, below)
        if network == "llama"
        else _of_training(record["step_ms"], _UNITS[above], _UNITS[below])
    )


_UNITS = {"fused": "CT, fused", "published": "CT as published", "plain": "plain ReLU"}


def _of_cpu(op: str, above: str, below: str) -> str:
    """A ratio of times forward and backward in float32, with two digits."""
    times = _one(_results("cpu")["records"], op=op, dtype="fp32")["forward_backward_ms"]
    return f"{times[above] / times[below]:.2g}"


def _of_published(end: str) -> str:
    """The least or the largest speed-up of ctu over the published expression, over both dtypes and directions."""
    rows = [
        record for record in _results("cpu")["records"] if record["op"] == "ctu" and record["dtype"] in ("fp32", "bf16")
    ]
    ratios = [row[key]["official"] / row[key]["ours"] for row in rows for key in ("forward_ms", "forward_backward_ms")]
    return f"{min(ratios) if end == 'least' else max(ratios):.0f}"


def _of_formats(slower: str, side: str) -> str:
    """By how many per cent a fused network is slower than the plain one at worst, on images of a side."""
    rows = [record["inference_ms"] for record in _results("formats")["records"] if record["side"] == int(side)]
    return f"{100 * max(row['fused'] / row['plain ReLU'] - 1 for row in rows):.0f}"


def _of_mutation(what: str) -> str:
    return f"{_results('mutation')[what]:,}"


FIGURES: dict[str, Callable[..., str]] = {
    "study": _of_study,
    "compare": _of_compare,
    "jola_step": lambda above, below: _of_llama(_results("jola_step")["records"][0], above, below),
    "jola_step_apart": _of_llama_apart,
    "h100": _of_h100,
    "cpu": _of_cpu,
    "published": _of_published,
    "formats": _of_formats,
    "mutation": _of_mutation,
}

if __name__ == "__main__":
    sys.exit(main())
