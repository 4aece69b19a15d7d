"""``python -m ctkernels steer``: search beta for a network and a folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...cli import option_types as types
from .options import (
    add_image_options,
    add_network_options,
    add_running_options,
    command_parser,
    image_data,
    load_images,
    load_network,
    plain_preprocess,
    preprocess_for,
    save_result,
)

SUMMARY = """\
Find the curvature at which a pretrained network fits new data best, without training it (S-CT).

Every ReLU-like activation becomes a curvature-tuning unit with one knob, beta: 1 is the network as it is, lower is
smoother. For each beta a linear probe is fitted on frozen features of the training images; the beta with the best
validation accuracy is compared with the plain network on the test images, once."""

EXAMPLES = """\
examples:
  # a folder with one subfolder of images per class; a fifth each is held out for validation and for test
  python -m ctkernels steer photos/ --model resnet18

  # folders train/, val/ and test/ or an .npz with x_train, y_train, x_test, y_test are used as they are
  python -m ctkernels steer data.npz --model timm:resnet50d --betas 0.8:1:0.02

  # your own network and weights; checkpoints are read without unpickling
  python -m ctkernels steer photos/ --model my_project.networks:make --weights best.safetensors

  # without a network connection: packaged MobileNetV2 weights and Fashion-MNIST, a small sample
  python -m ctkernels steer fashion-mnist --model mobilenet_v2 --weights packaged \\
      --size 64 --resize 64 --max-train 900 --max-test 600 --betas 0.7,0.8,0.85,0.9,0.95,1

  # four processes share the work, with the result of one
  torchrun --nproc-per-node 4 -m ctkernels steer photos/ --model resnet50

results:
  OUT/result.json            accuracies, choice, test with its uncertainty, and everything needed to repeat the run
  OUT/accuracy_vs_beta.png   the picture"""


def parser() -> argparse.ArgumentParser:
    p = command_parser("steer", SUMMARY, EXAMPLES)
    p.add_argument(
        "data", type=image_data, help="folder of images, .npz file, or a data set by name such as fashion-mnist"
    )
    network = add_network_options(p, "0.7:1:0.01")
    network.add_argument(
        "--coeff",
        type=types.COEFF,
        default=0.5,
        help="mixing coefficient c of the unit, or mean-free: beta^2 / (1 + beta^2) (default: %(default)s)",
    )
    add_image_options(p)
    probe = p.add_argument_group("probe")
    probe.add_argument(
        "--probe",
        choices=("logistic", "adam"),
        default="logistic",
        help="logistic regression on standardised features, or the paper's own with Adam (default: %(default)s)",
    )
    probe.add_argument(
        "--l2", type=types.POSITIVE, default=0.01, help="penalty of the logistic probe (default: %(default)s)"
    )
    running = add_running_options(p, "out/steer")
    running.add_argument(
        "--seed", type=types.SEED, default=0, help="of splits, samples and probe (default: %(default)s)"
    )
    running.add_argument(
        "--batch-size", type=types.COUNT, default=32, help="images per forward pass (default: %(default)s)"
    )
    running.add_argument("--device", type=types.device, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    running.add_argument("--no-plot", action="store_true", help="no picture")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ... import lab
    from ..._extras import require
    from .. import _distributed
    from ..search.plot import plot

    if not arguments.no_plot:
        require("matplotlib.figure", "lab", "the picture")
    plain_preprocess(arguments)
    model = load_network(arguments)
    splits, train, val, test = load_images(arguments)
    preprocess = preprocess_for(arguments, train)
    result = lab.search_beta(
        model,
        *(part.prepared(preprocess) for part in (train, val, test)),
        betas=arguments.betas,
        coeff=arguments.coeff,
        activations=arguments.activations,
        feature_layer=arguments.feature_layer,
        probe=arguments.probe,
        l2=arguments.l2,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=arguments.device or _distributed.launched_device(),
        memory_limit=arguments.memory_limit,
        progress=not arguments.no_progress,
    )
    if _distributed.launched_rank() == 0:
        print(f"{splits.source}: {len(train)} train, {len(val)} validation, {len(test)} test images")
        print(f"{arguments.model}: {len(result.sites)} activations steered; features: {result.feature_layer}")
        print(f"\n{result.table()}\n")
        print(result.verdict())
        save_result(result, arguments.out, arguments, splits, train, preprocess)
        if not arguments.no_plot:
            plot(
                result,
                arguments.out / "accuracy_vs_beta.png",
                title=f"{arguments.model} on {Path(arguments.data).name}",
            )
            print(f"saved {arguments.out / 'accuracy_vs_beta.png'}")
    return 0
