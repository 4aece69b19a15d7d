"""``python -m ctkernels steer``: search beta for a network and a folder of images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..search.grid import SearchConfig
from . import options

SUMMARY = """\
Find the curvature at which a pretrained network fits new data best, without training it (S-CT).

Every ReLU-like activation becomes a curvature-tuning unit with one knob, beta: 1 is the network as it is, lower is
smoother. For each beta a linear probe is fitted on frozen features of the training images; the beta with the best
validation accuracy, if it is better than the plain network by more than one standard error (--margin), is compared with it
on the test images, once. With few validation images each beta is validated on several folds (--folds)."""

EXAMPLES = """\
examples:
  # a folder with one subfolder of images per class; a fifth each is held out for validation and for test
  python -m ctkernels steer photos/ --model resnet18

  # folders train/, val/ and test/ or an .npz with x_train, y_train, x_test, y_test are used as they are
  python -m ctkernels steer data.npz --model timm:resnet50d --betas 0.8:1:0.02

  # your own network and weights; checkpoints are read without unpickling
  python -m ctkernels steer photos/ --model my_project.networks:make=best.safetensors

  # without a hub, in a clone of the repository: packaged MobileNetV2 weights and Fashion-MNIST, a small sample
  python -m ctkernels steer examples.data:fashion_mnist --model mobilenet_v2=packaged \\
      --size 64 --resize 64 --max-train 900 --max-test 600 --betas 0.7,0.8,0.85,0.9,0.95,1

  # four processes share the work, with the result of one
  torchrun --nproc-per-node 4 -m ctkernels steer photos/ --model resnet50

results:
  OUT/result.json            accuracies, choice, test with its uncertainty, and everything needed to repeat the run
  OUT/accuracy_vs_beta.png   the plot"""


def parser() -> argparse.ArgumentParser:
    p = options.command_parser("steer", SUMMARY, EXAMPLES)
    options.add_image_data(p)
    options.add_network_options(p, SearchConfig)
    options.add_image_options(p)
    options.add_fields(p.add_argument_group("probe"), SearchConfig, "probe", "l2")
    options.add_running_options(p, SearchConfig, "seed", "batch_size", "workers", "memory_limit", out="out/steer")
    p.add_argument("--no-plot", action="store_true", help="do not plot")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ... import lab
    from ..._extras import require
    from .. import _distributed

    if not arguments.no_plot:
        require("matplotlib.figure", "lab", "the plot")
    config = options.config_of(SearchConfig, arguments)
    inputs = options.load_inputs(arguments)
    config = replace(config, folds=inputs.folds(config.folds))
    if _distributed.launched_rank() == 0:
        inputs.tell(config.folds or 1, config.margin)
    result = lab.search_beta(inputs.model, inputs.train, inputs.val, inputs.test, config, **options.running(arguments))
    if _distributed.launched_rank() == 0:
        line = f"\n{arguments.model}: {len(result.sites)} activations steered; features: {result.feature_layer}"
        options.tell_result(result, arguments, inputs, line)
        if not arguments.no_plot:
            path = arguments.out / "accuracy_vs_beta.png"
            lab.plot(result, path, title=f"{arguments.model} on {Path(arguments.data).name}")
            print(f"saved {path}")
    return 0
