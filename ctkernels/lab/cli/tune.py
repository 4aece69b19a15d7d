"""``python -m ctkernels tune``: learn the curvature of one network on one data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..transfer.tune import HEAD, TuneConfig, kept_stage, stages, tune_curvature
from . import options

SUMMARY = """\
Learn the curvature of a pretrained network on new data (T-CT), images, texts or time series: the fixed knob first, then
learned ones.

A linear probe and the best fixed beta (S-CT) come first. Then a beta and a coefficient per channel are learned together
with a new head, starting at that beta (T-CT). Validation decides which of the three is kept: the simplest that no other
beats by more than one standard error (--margin). With few validation images every stage is trained on several folds
(--folds). T-CT is saved as a PEFT adapter. Every stage is tested once."""

EXAMPLES = """\
examples:
  python -m ctkernels tune photos/ --model resnet18

  # rates to try; validation chooses
  python -m ctkernels tune data.npz --model timm:resnet50d --lr 0.1,0.01 --head-lr 1e-3,1e-2

  # without a hub, in a clone of the repository: packaged weights and data
  python -m ctkernels tune examples.data:fashion_mnist --model mobilenet_v2=packaged --size 64 --resize 64 --max-train 500 \\
      --max-test 500 --betas 0.8,0.9,0.95 --epochs 10

  # texts and time series, from packages
  python -m ctkernels tune examples.data:wordnet --model encoder:minilm --activations gelu --max-train 300 --max-test 300
  python -m ctkernels tune aeon:ItalyPowerDemand --model examples.series:leaf_fcn --head-lr 1e-2 --epochs 40

afterwards:
  from ctkernels.lab import load_model
  from ctkernels.lab.transfer import load_tuned
  network, preprocess, classes = load_tuned(load_model("resnet18"), "out/tune")

results:
  OUT/result.json   every stage, how the learned curvature is distributed, everything needed to repeat the run
  OUT/adapter/      the adapter and the head, as peft saves them, where T-CT is kept
  OUT/head.safetensors   the head, where the plain network or S-CT is"""


def parser() -> argparse.ArgumentParser:
    p = options.command_parser("tune", SUMMARY, EXAMPLES)
    options.add_data(p)
    options.add_model(p, texts=True)
    options.add_fields(p, TuneConfig, "lr", "head_lr", "seed")
    options.add_training_options(p)
    options.add_example_options(p)
    options.add_executor(options.add_running_options(p, TuneConfig, "workers", "memory_limit", out="out/tune"))
    return p


def run(arguments: argparse.Namespace) -> int:
    from ... import lab
    from ..._extras import require
    from .. import _distributed

    options.plain_preprocess(arguments)
    names = {"name": arguments.model.name, "data_name": Path(arguments.data).name}
    config = options.config_of(TuneConfig, arguments, **names, cpu=options.on_cpu(arguments))
    executor = options.executor_of(arguments)
    for module in ("accelerate", "peft", "safetensors"):
        require(module, "adapters", "learning the curvature")
    source, out = options.model_source(arguments.model, arguments.seed), arguments.out
    data = lab.load_data(arguments.data)
    options.tell_counts({config.data_name: data}, config, config.seed)
    result = tune_curvature(source, data, out, config, executor=executor, extra=options.record_of(arguments))
    if _distributed.launched_rank() == 0:
        kept = out / ("adapter" if kept_stage(result) == "tct" else HEAD)
        print(f"{stages(result)}\n\n{result.verdict()}\n\nsaved {kept} and {out / 'result.json'}")
    return 0
