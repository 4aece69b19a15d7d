"""``python -m ctkernels compare``: the Curvature Tuning paper's comparison on any networks and data sets."""

from __future__ import annotations

import argparse
from typing import Any

from ...cli import option_types as types
from ...cli.errors import OptionError
from .options import (
    add_image_data,
    add_image_options,
    add_running_options,
    add_training_options,
    command_parser,
    grids_of,
    network_and_weights,
    option,
    record_of,
    transfer_config,
)

SUMMARY = """\
Compare ways to adapt pretrained image classifiers: a linear probe, S-CT, LoRA, T-CT, and T-CT with LoRA.

Every method trains a new head with the same schedule and keeps its best validation epoch. Where there are several
settings to try, validation on the first seed chooses. The test images are read once per method and seed."""

EXAMPLES = """\
examples:
  # the paper's table 1: one command a table
  python -m ctkernels compare torchvision:Flowers102 torchvision:DTD beans/ \\
      --model resnet18 --model resnet50 --methods linear,sct,lora-r1,tct --bn paper --out out/table1

  # ranks of LoRA are methods of their own; rates to try are given by method
  python -m ctkernels compare photos/ --model timm:resnet50d --methods linear,lora-r1,lora-r4,tct,tct+lora-r4 \\
      --grid lora-r1.lr=1e-4,1e-3 --grid lora-r4.lr=1e-4,1e-3 --grid tct.lr=0.1,0.01

  # a classifier of transformers with GELU
  python -m ctkernels compare photos/ --model transformers:google/vit-base-patch16-224 --activations gelu

  # without a hub, in a clone of the repository: packaged weights and data
  python -m ctkernels compare examples.data:fashion_mnist examples.data:emoji --model mobilenet_v2=packaged \\
      --size 64 --resize 64 --max-train 500 --max-test 500 --betas 0.7,0.8,0.9,0.95 --epochs 10

  # four GPUs share each step; cut short, the same command goes on where it was
  torchrun --nproc-per-node 4 -m ctkernels compare photos/ --model resnet152 --batch-size 128 --precision bf16

results:
  OUT/result.json   every run, the table with mean and deviation over seeds, the settings that were tried
  OUT/table.md      the table as Markdown
  OUT/weights/      what each tested run trained"""


def _method(text: str) -> str:
    from ..transfer.methods import method

    return method(text).name


METHOD = types.Kind("linear, sct, sct-mean-free, tct, lora-rN or tct+lora-rN", _method)


def _grid(text: str) -> tuple[str, str, list[float]]:
    from ..transfer.methods import method

    name, setting, values = types.GRID(text)
    types.checked(lambda _: method(name).settings({setting: values}))(text)
    return name, setting, values


def parser() -> argparse.ArgumentParser:
    p = command_parser("compare", SUMMARY, EXAMPLES)
    add_image_data(p, nargs="+")
    what = p.add_argument_group("comparison")
    what.add_argument(
        "--model",
        action="append",
        type=network_and_weights,
        required=True,
        metavar="NAME[=WEIGHTS]",
        help="torchvision name, timm:NAME, transformers:NAME, or factory module:function; weights: default, none, "
        "packaged, or a file (default: default). May be given several times",
    )
    option(
        what,
        "--methods",
        types.several(METHOD, METHOD.expected),
        "linear,sct,lora-r1,tct,tct+lora-r1",
        "linear, sct, sct-mean-free, tct, lora-rN, tct+lora-rN, with commas",
    )
    option(what, "--seeds", types.SEEDS, "42,43,44", "with commas; the first chooses")
    what.add_argument(
        "--grid", action="append", type=_grid, default=[], metavar="METHOD.NAME=VALUES", help="settings to try"
    )
    add_training_options(p)
    add_image_options(p)
    running = add_running_options(p, "out/compare", memory_limit=True)
    running.add_argument("--cpu", action="store_true", help="run on the CPU")
    return p


def model_source(name: str, weights: str, seed: int) -> tuple[str, Any]:
    """The name, and a function that loads the network."""

    def load() -> Any:
        import torch

        from .. import load_model

        torch.manual_seed(seed)  # for weights drawn at random
        return load_model(name, weights)

    return name, load


def run(arguments: argparse.Namespace) -> int:
    from ... import lab
    from ..._extras import require
    from ..._files import write_text
    from .. import _distributed
    from ..transfer import compare_transfer

    seeds, out = arguments.seeds, arguments.out
    grids = grids_of(arguments.grid, arguments.methods)
    config = transfer_config(arguments)
    for module in ("accelerate", "peft", "safetensors"):
        require(module, "adapters", "comparing methods")
    sources = [model_source(name, weights, seeds[0]) for name, weights in arguments.model]
    for kind, names in (("--model", [name for name, _ in sources]), ("data", arguments.data)):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise OptionError(f"{kind} must name each one once, got {twice} more than once")
    result = compare_transfer(
        dict(sources),
        {name: lab.load_data(name) for name in arguments.data},
        config,
        methods=arguments.methods,
        seeds=seeds,
        grids=grids,
        out=out,
        extra=record_of(arguments),
    )
    if _distributed.launched_rank() == 0:
        write_text(out / "table.md", result.markdown() + "\n")
        tuning = result.tuning()
        print("\n\n".join([*([tuning] if tuning else []), result.table(), result.verdict()]))
        print(f"\nsaved {out / 'result.json'} and {out / 'table.md'}")
    return 0
