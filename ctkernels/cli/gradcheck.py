"""python -m ctkernels gradcheck: check the gradients of the ops, and of a model of yours, on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._copying import copy_module
from .._factories import check_takes, find_factory
from .._files import write_text
from ..ops.backends import BACKENDS
from ..testing.gradients import GradientReport, check_call, gradcheck_module
from ..testing.samples import SAMPLES, Sample
from . import option_types as types
from .errors import OptionError, Parser, renamed

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = Parser(
        prog="python -m ctkernels gradcheck",
        description="Compare outputs and gradients with finite differences, with the reference in float64, and in the "
        "tensors' own dtype with what plain torch gets there. Without --module the ops are checked. "
        "Exit code: 0 all agree, 1 something does not, 2 bad input.",
    )
    p.renamed.append(renamed("--train", "--training"))
    p.add_argument("--op", choices=SAMPLES, nargs="+", help="which ops (default: all; none with --module)")
    p.add_argument(
        "--module",
        type=types.checked(find_factory),
        metavar="PATH:FACTORY",
        help="a function that returns the model: package.module:function, or file.py:function",
    )
    p.add_argument(
        "--input",
        type=types.SHAPE,
        metavar="SHAPE",
        action="append",
        help="shape of an input of the model, as 2x3x32x32; once for each input",
    )
    p.add_argument("--integers", type=types.COUNT, metavar="N", help="the inputs are integers below N, such as tokens")
    p.add_argument("--backend", choices=BACKENDS, nargs="+", help="which backends (default: what serves each call)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="the own dtype to check (default: float32)")
    p.add_argument("--device", type=types.device, default="cpu", help="such as cpu or cuda:0 (default: cpu)")
    p.add_argument(
        "--directions", type=types.whole(1, 10_000), default=3, help="finite differences for each tensor (default: 3)"
    )
    p.add_argument("--training", action="store_true", help="the model in training mode (default: evaluation)")
    p.add_argument("--seed", type=types.SEED, default=0, help="of inputs and directions (default: 0)")
    p.add_argument(
        "--json", type=types.OUT_FILE, metavar="FILE", help="also write every comparison there; - for standard output"
    )
    return p


def run(arguments: argparse.Namespace) -> int:
    """Check and print; the exit code is 1 if anything disagrees."""
    if (arguments.module is None) != (arguments.input is None):
        raise OptionError("--module and --input: expected both or neither, got one")
    device = torch.device(arguments.device)
    inputs = arguments.input or []
    model = None if arguments.module is None else find_factory(arguments.module)()
    backends = arguments.backend or [None]
    for name in arguments.backend or []:
        refusal = BACKENDS[name].refusal(torch.empty(1, device=device, dtype=DTYPES[arguments.dtype]))
        if refusal is not None:
            raise OptionError(f"--backend {name}: {refusal}")
    ops = arguments.op or (() if model is not None else SAMPLES)
    results = {}
    for backend in backends:
        for op in ops:
            results[f"{op}, {_named(backend)}"] = _check_op(op, backend, arguments, device)
        if model is not None:
            results[f"{arguments.module}, {_named(backend)}"] = _check_model(model, inputs, backend, arguments, device)
    ok = all(report.ok for report in results.values())
    text = json.dumps({"ok": ok, "reports": {k: r.as_dict() for k, r in results.items()}}, indent=1)
    if arguments.json == Path("-"):
        print(text)
    else:
        for name, report in results.items():
            print(f"{name}\n" + "\n".join(f"  {line}" for line in str(report).splitlines()))
        print("all agree" if ok else "NOT all agree")
        if arguments.json:
            write_text(arguments.json, text + "\n")
    return 0 if ok else 1


def _named(backend: str | None) -> str:
    return "the backends in use" if backend is None else f"backend {backend}"


def _check_op(op: str, backend: str | None, arguments: argparse.Namespace, device: torch.device) -> GradientReport:
    report = GradientReport()
    for sample in SAMPLES[op](DTYPES[arguments.dtype], str(device), arguments.seed):
        leaves = sample.tensors()
        if all(leaf.numel() for leaf in leaves.values()):

            def call(values: dict[str, Tensor], sample: Sample = sample) -> Tensor:
                return sample.map(lambda key, _: values[key])()

            # The expectation of a gate is a quadrature with an error of 6e-12, so two results differ by at most twice that.
            accuracy = 2 * 6e-12 if sample.kwargs.get("estimator") == "mean" else 0.0
            check_call(sample.name, call, leaves, report, backend, arguments.directions, accuracy)
    return report


def _check_model(
    model: nn.Module, shapes: list[tuple[int, ...]], backend: str | None, arguments: Any, device: torch.device
) -> GradientReport:
    dtype = DTYPES[arguments.dtype]
    generator = torch.Generator().manual_seed(arguments.seed)
    if arguments.integers is not None:
        inputs = [torch.randint(0, arguments.integers, shape, generator=generator) for shape in shapes]
    else:
        inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    model, inputs = model.to(device, dtype), [value.to(device) for value in inputs]
    check_takes(copy_module(model), *inputs, what="--input: values")
    return gradcheck_module(
        model,
        *inputs,
        backend=backend,
        directions=arguments.directions,
        training=arguments.training,
        seed=arguments.seed,
    )
