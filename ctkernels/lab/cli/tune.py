"""``python -m ctkernels tune``: learn the curvature of one network on one data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...cli import option_types as types
from .compare import model_source
from .options import (
    add_image_data,
    add_image_options,
    add_running_options,
    add_training_options,
    command_parser,
    network_and_weights,
    option,
    record_of,
    transfer_config,
)

SUMMARY = """\
Learn the curvature of a pretrained network on new data (T-CT): the fixed knob first, then learned ones.

A linear probe and the best fixed beta (S-CT) come first. Then a beta and a coefficient per channel are learned together
with a new head, starting at that beta (T-CT). Validation decides which of the three is kept; T-CT is saved as a PEFT
adapter. Every stage is tested once."""

EXAMPLES = """\
examples:
  python -m ctkernels tune photos/ --model resnet18

  # rates to try; validation chooses
  python -m ctkernels tune data.npz --model timm:resnet50d --lr 0.1,0.01 --head-lr 1e-3,1e-2

  # without a hub, in a clone of the repository: packaged weights and data
  python -m ctkernels tune examples.data:fashion_mnist --model mobilenet_v2=packaged --size 64 --resize 64 --max-train 500 \\
      --max-test 500 --betas 0.8,0.9,0.95 --epochs 10

afterwards:
  from ctkernels.lab import load_model
  from ctkernels.lab.transfer import load_tuned
  network, preprocess, classes = load_tuned(load_model("resnet18"), "out/tune")

results:
  OUT/result.json   every stage, how the learned curvature is distributed, everything needed to repeat the run
  OUT/adapter/      the adapter and the head, as peft saves them, where T-CT is kept
  OUT/head.safetensors   the head, where the plain network or S-CT is"""


def parser() -> argparse.ArgumentParser:
    p = command_parser("tune", SUMMARY, EXAMPLES)
    add_image_data(p)
    p.add_argument(
        "--model",
        type=network_and_weights,
        required=True,
        metavar="NAME[=WEIGHTS]",
        help="torchvision name, timm:NAME, transformers:NAME, or factory module:function; weights: default, none, "
        "packaged, or a file",
    )
    option(p, "--lr", types.RATES, "0.1", "of beta and coeff, to try, with commas")
    option(p, "--head-lr", types.RATES, "1e-3", "of the head, to try, with commas")
    option(p, "--seed", types.SEED, 42, "of splits, initial weights and order")
    add_training_options(p)
    add_image_options(p)
    running = add_running_options(p, "out/tune", memory_limit=True)
    running.add_argument("--cpu", action="store_true", help="run on the CPU")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ... import lab
    from ..._extras import require
    from .. import _distributed

    out, config = arguments.out, transfer_config(arguments)
    for module in ("accelerate", "peft", "safetensors"):
        require(module, "adapters", "learning the curvature")
    from ..transfer import stages, tune_curvature
    from ..transfer.tune import HEAD, kept_stage

    name, weights = arguments.model
    _, load = model_source(name, weights, arguments.seed)
    result = tune_curvature(
        load,
        lab.load_data(arguments.data),
        out,
        config,
        name=name,
        data_name=Path(arguments.data).name,
        seed=arguments.seed,
        lr=arguments.lr,
        head_lr=arguments.head_lr,
        extra=record_of(arguments),
    )
    if _distributed.launched_rank() == 0:
        kept = out / ("adapter" if kept_stage(result) == "tct" else HEAD)
        print(f"{stages(result)}\n\n{result.verdict()}\n\nsaved {kept} and {out / 'result.json'}")
    return 0
