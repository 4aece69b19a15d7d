"""A result of every kind that the report reads, small: from the laboratory's own classes where they need no training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ctkernels.lab.analysis.curvature import CurvatureProfile
from ctkernels.lab.analysis.toys import Toys
from ctkernels.lab.jola.result import MethodComparison, RunResult
from ctkernels.lab.robustness.result import Outcome, Robustness, ValidationScore
from ctkernels.lab.search.result import BetaSearch, Comparison, Evaluation, StrategySearch
from ctkernels.lab.streaming.result import StreamResult, TaskResult

ROOT = Path(__file__).parents[2]
SIZES = {"train": 480, "val": 120, "test": 200, "classes": 10, "features": 512, "passes": 1}
SITES = tuple(f"layer{i}.{j}.relu" for i in range(1, 5) for j in range(2))
EVIL = "<script>alert('x')</script>"


def search_beta(chosen: float = 0.85, only_steered: int = 30) -> dict[str, Any]:
    betas = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    result = BetaSearch(
        betas=betas,
        val_accuracy=tuple(0.82 - (b - 0.85) ** 2 * 2 for b in betas),
        plain_val_accuracy=0.775,
        plain_is_beta_1=True,
        chosen=chosen,
        test=Comparison(140, 10, only_steered, 50 - only_steered),
        sites=SITES,
        missed=(),
        arguments={"betas": list(betas), "seed": 0},
        sizes=SIZES,
        feature_layer="input of fc",
        converged=(True,) * len(betas),
        seconds={"features": 20.0, "probes": 3.0, "test": 2.0, "total": 25.0},
    )
    return result.to_dict(
        command="python -m ctkernels steer photos/ --model resnet18", options={"model": "resnet18", "data": "photos/"}
    )


def search_betas() -> dict[str, Any]:
    points = [(1.0, 1.0), (0.8, 1.0), (0.8, 0.9), (0.7, 0.9), (0.8, 0.95)]
    result = StrategySearch(
        strategy="coordinate",
        groups={"1: layer1.0.relu to layer2.1.relu": SITES[:4], "2: layer3.0.relu to layer4.1.relu": SITES[4:]},
        history=tuple(Evaluation(p, 0.77 + 0.01 * i * (4 - i), 1.0) for i, p in enumerate(points)),
        best=2,
        test=Comparison(140, 10, 12, 38),
        sites=SITES,
        missed=(),
        feature_layer="input of fc",
        arguments={},
        sizes=SIZES,
        seconds=70.0,
    )
    return result.to_dict(command="a command")


def robust() -> dict[str, Any]:
    names = ("ℓ∞ 8/255", "corruptions")
    right = tuple(float(i % 5 == 0) for i in range(50))
    better = tuple(float(i % 5 < 3) for i in range(50))
    result = Robustness(
        conditions=(
            {"name": names[0], "kind": "attack", "norm": "linf", "eps": 8 / 255},
            {"name": names[1], "kind": "corruption", "corruptions": ["fog"], "severities": [1]},
        ),
        validation={
            name: tuple(ValidationScore(b, 0.6 - (b - 0.8) ** 2, 0.8 - (1 - b) * 0.1) for b in (0.6, 0.8, 1.0))
            for name in names
        },
        chosen={names[0]: 0.8, names[1]: 1.0},
        test={
            names[0]: {
                "plain": Outcome(right, 0.8, {"apgd-ce": 0.3, "square": 0.2}),
                "s-ct": Outcome(better, 0.78, {"apgd-ce": 0.7, "square": 0.6}),
                "t-ct": Outcome(better, 0.82, {"apgd-ce": 0.6, "square": 0.6}),
            },
            names[1]: {"plain": Outcome(right, 0.8, {"fog": 0.2}), "t-ct": Outcome(right, 0.82, {"fog": 0.2})},
        },
        plain_is_beta_1=True,
        sites=SITES,
        missed=(),
        sizes=SIZES,
        arguments={
            "attacks": ["apgd-ce", "square"],
            "val_attacks": ["apgd-ce"],
            "iterations": 100,
            "queries": 5000,
            "head": "own",
        },
        seconds={"validation": 100.0, "test": 100.0, "total": 200.0},
    )
    return result.to_dict(command="python -m ctkernels robust cifar.npz --model resnet18 --head own")


def jola() -> dict[str, Any]:
    gates = [
        {
            "step": 10 * k,
            "sites": [f"layers.{i}" for i in range(4)],
            "parameters": 100,
            "m": [[1.0 if h > k else 0.0 for h in range(3)] for _ in range(4)],
            "a": [[0.5] * 3 for _ in range(4)],
        }
        for k in range(3)
    ]
    each = [1.0] * 14 + [0.0] * 6
    runs = tuple(
        RunResult(
            method=m, seed=s, setting={"lr": 0.01} if m != "zero" else {}, parameters=n, epochs=[{"exact_match": 70.0}] * 2,
            best=2 if n else 0, seconds=12.0, gates=gates if m == "jola" else [], test={"exact_match": 60.0 + k + s},
            each=each if m == "jola" else each[::-1],
        )
        for k, (m, n) in enumerate((("zero", 0), ("lora", 460_800), ("jola", 35_100)))
        for s in (0, 1)
    )  # fmt: skip
    setup = {"methods": {"zero": [], "lora": [], "jola": []}, "seeds": [0, 1]}
    return MethodComparison(runs, setup, 90.0, "exact_match").to_dict(command="a command")


def tasks() -> dict[str, Any]:
    """A stream of tasks; the adapter of the second did not help."""
    first = TaskResult("law", "accuracy", 50.0, 80.0, 60.0, 35_100, {"lr": 0.02}, 20, 79.0, 0.99, [80.0, 61.5], [0, 0])
    second = TaskResult("tax", "accuracy", 70.0, 70.0, 60.0, 35_100, {"lr": 0.02}, 20, 70.0, 1.0, [72.0], [0])
    return StreamResult((first, second), {"method": "jola"}, 130.0).to_dict(command="a command")


def compare() -> dict[str, Any]:
    """As the schema ctkernels.compare/1 has it."""
    learned = {
        site: {
            kind: {
                "mean": 0.5 + 0.05 * i,
                "deviation": 0.2,
                "low": 0.01,
                "high": 0.99,
                "histogram": [abs(10 - k) + i for k in range(20)],
            }
            for kind in ("beta", "coeff")
        }
        for i, site in enumerate(SITES)
    }
    search = [{"beta": b, "coeff": 0.5, "val_accuracy": 0.8 - (b - 0.85) ** 2} for b in (0.7, 0.8, 0.85, 0.9, 1.0)]
    details = {
        "linear": {},
        "sct": {"beta": 0.85, "coeff": 0.5, "search": search},
        "lora-r1": {},
        "tct": {"curvature": learned},
    }
    cells, table = [], []
    for k, (method, detail) in enumerate(details.items()):
        values = [0.7 + 0.02 * k, 0.71 + 0.02 * k]
        for seed, value in zip((42, 43), values):
            cells.append(
                {
                    "model": "mobilenet_v2",
                    "data": "fashion-mnist",
                    "method": method,
                    "seed": seed,
                    "setting": {"head_lr": 0.001},
                    "parameters": 100 * k,
                    "seconds": 30.0,
                    "detail": detail,
                    "test": value,
                }
            )
        summary = {"mean": sum(values) / 2, "deviation": 0.007, "values": values}
        table.append({"model": "mobilenet_v2", "data": "fashion-mnist", "method": method, "setting": {"head_lr": 0.001},
                      "parameters": 100 * k, "seeds": [42, 43], "test": summary, "val": summary, "seconds": 30.0})  # fmt: skip
    gains = [
        {"model": "mobilenet_v2", "method": m, "baseline": "linear", "relative": p / 0.7, "points": p, "better": 1, "sets": 1,
         "each": [{"data": "fashion-mnist", "relative": p / 0.7, "points": p, "standard_error": 0.02}]}
        for m, p in (("sct", 0.02), ("lora-r1", -0.05), ("tct", 0.06))
    ]  # fmt: skip
    return {
        "schema": "ctkernels.compare/1",
        "kind": "compare",
        "verdict": "mobilenet_v2, T-CT: +6.0 points over the linear probe.",
        "setup": {
            "models": {"mobilenet_v2": {"class": "MobileNetV2"}},
            "data": {"fashion-mnist": {"sizes": {"train": 600, "val": 200, "test": 500}}},
            "methods": {m: [] for m in details},
            "seeds": [42, 43],
        },
        "table": table,
        "gains": gains,
        "cells": cells,
        "seconds": 100.0,
        "versions": {"torch": "2"},
        "command": "python -m ctkernels compare --model mobilenet_v2",
    }


def curvature() -> dict[str, Any]:
    def summary(value: float) -> dict[str, float]:
        return {"mean": value, "low": value / 2, "median": value, "high": value * 2}

    betas = (None, 0.5, 0.9, 1.0)
    rows = tuple(
        {"data": summary(v), "random": summary(v / 3), "lipschitz": summary(5 - v), "accuracy": 0.8}
        for v in (0.0, 1.0, 0.4, 0.0)
    )
    return CurvatureProfile(betas, rows, "margin", 16, 4, 9.0).to_dict(command="a command")


def toys() -> dict[str, Any]:
    def grid(radius: float) -> list[list[float]]:
        line = [-4 + i / 2 for i in range(17)]
        return [[1 / (1 + math.exp(radius - math.hypot(x, y))) for x in line] for y in line]

    points = [[0.5, -1.0, 2.0, -3.0], [0.5, 0.5, 2.0, 1.0], [0, 0, 1, 1]]
    line = [i / 10 for i in range(30)]
    run = {
        "seed": 0,
        "spirals": {
            "points": points,
            "extent": 4.0,
            "networks": {f"beta {b}": {"grid": grid(b), "accuracy": b} for b in (1, 0.9)},
        },
        "curve": {
            "points": [[0.1, 0.5], [0.3, 0.2]],
            "line": line,
            "truth": [math.sin(x) for x in line],
            "networks": {"beta 1": {"values": line, "error": 0.1}},
        },
        "circles": {
            "points": points,
            "extent": 4.0,
            "networks": {
                n: {"grid": grid(2), "loss": 0.1, "roughness": 0.2} for n in ("trained", "LoRA, rank 1", "T-CT")
            },
        },
    }
    return Toys((run,), {"seeds": [0]}, 9.0).to_dict(command="a command")


def draws() -> dict[str, Any]:
    return {
        "draws": [search_beta(), search_beta(0.9, 20)],
        "command": ["examples/demo_steering.py", "--short"],
        "verdict": "x",
    }


def benchmarks() -> dict[str, Any]:
    """The checked-in record, some of it."""
    values = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    return {**values, "records": [*values["records"][:4], *values["records"][-2:]]}


SAMPLES = {
    f.__name__: f for f in (search_beta, draws, search_betas, compare, jola, tasks, robust, curvature, toys, benchmarks)
}
