"""``python -m ctkernels compare``: the Curvature Tuning paper's comparison on any networks and data sets."""

from __future__ import annotations

import argparse

from ...cli import option_types as types
from ...cli.errors import OptionError
from ..transfer.config import TransferConfig
from ..transfer.methods import NAMES, method
from . import options

SUMMARY = """\
Compare ways to adapt pretrained classifiers of images, texts or time series: a linear probe, S-CT, LoRA, T-CT, and T-CT with
LoRA.

Every method trains a new head with the same schedule and keeps its best validation epoch. Where there are several
settings to try, validation on the first seed chooses. With few validation images every run is trained on several folds
(--folds). The test images are read once per method and seed."""

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

  # time series that come in a package, and a network pretrained on others
  python -m ctkernels compare aeon:GunPoint aeon:ItalyPowerDemand --model examples.series:leaf_fcn \\
      --methods linear,sct,lora-r1,tct

  # four GPUs share each step; cut short, the same command goes on where it was
  torchrun --nproc-per-node 4 -m ctkernels compare photos/ --model resnet152 --batch-size 128 --precision bf16

  # trials on the machines of a Ray cluster (pip install "ctkernels[ray]"; ray start on each)
  python -m ctkernels compare photos/ --model resnet18 --model resnet50 --ray auto

results:
  OUT/result.json   every run, the table with mean and deviation over seeds, the settings that were tried
  OUT/table.md      the table as Markdown
  OUT/weights/      what each tested run trained"""


METHODS = types.several(types.Kind(NAMES, lambda text: method(text).name), NAMES)


def parser() -> argparse.ArgumentParser:
    p = options.command_parser("compare", SUMMARY, EXAMPLES)
    options.add_data(p, nargs="+")
    comparison = p.add_argument_group("comparison")
    options.add_model(comparison, texts=True, action="append")
    options.option(comparison, "--methods", METHODS, "linear,sct,lora-r1,tct,tct+lora-r1", f"{NAMES}, with commas")
    options.option(comparison, "--seeds", types.SEEDS, "42,43,44", "with commas; the first chooses")
    options.add_grid(comparison, method)
    options.add_training_options(p)
    options.add_example_options(p)
    options.add_executor(options.add_running_options(p, TransferConfig, "workers", "memory_limit", out="out/compare"))
    return p


def run(arguments: argparse.Namespace) -> int:
    from ... import lab
    from ..._extras import require
    from ..._files import write_text
    from .. import _distributed
    from ..transfer import compare_transfer

    seeds, out = arguments.seeds, arguments.out
    grids = options.grids_of(arguments.grid, arguments.methods)
    options.plain_preprocess(arguments)
    config = options.config_of(TransferConfig, arguments, cpu=options.on_cpu(arguments))
    executor = options.executor_of(arguments)
    for module in ("accelerate", "peft", "safetensors"):
        require(module, "adapters", "comparing methods")
    for kind, names in (("--model", [model.name for model in arguments.model]), ("data", arguments.data)):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise OptionError(f"{kind} must name each one once, got {twice} more than once")
    data = {name: lab.load_data(name) for name in arguments.data}
    options.tell_counts(data, config, seeds[0])
    result = compare_transfer(
        {model.name: options.model_source(model, seeds[0]) for model in arguments.model},
        data,
        config,
        methods=arguments.methods,
        seeds=seeds,
        grids=grids,
        out=out,
        executor=executor,
        extra=options.record_of(arguments),
    )
    if _distributed.launched_rank() == 0:
        write_text(out / "table.md", result.markdown() + "\n")
        tuning = result.tuning()
        print("\n\n".join([*([tuning] if tuning else []), result.table(), result.verdict()]))
        print(f"\nsaved {out / 'result.json'} and {out / 'table.md'}")
    return 0
