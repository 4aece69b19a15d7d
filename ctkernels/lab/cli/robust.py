"""``python -m ctkernels robust``: accuracy under attack and under corruptions."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._copying import copy_module
from ...cli import option_types as types
from ...cli.errors import OptionError
from ..robustness.attacks import PixelClassifier, Threat
from ..robustness.config import RobustnessConfig
from ..robustness.evaluate import robustness
from . import options

if TYPE_CHECKING:
    from .. import Splits

SUMMARY = """\
Accuracy of a steered network under adversarial attack and under common corruptions (S-CT), beside the plain network and any
adapters you trained (T-CT, LoRA).

Bounds are in pixels, images stay in [0, 1], and normalisation is part of the network. For every condition beta is chosen on
validation images under that condition; the test images are used once. Attacks are AutoAttack's; corruptions are
ImageNet-C's, from five kinds of noise to JPEG."""

EXAMPLES = """\
examples:
  # a linear probe on frozen features is the classifier, fitted anew for every beta
  python -m ctkernels robust photos/ --model resnet18

  # a network that was trained for the data, with its own output; your own factory and weights
  python -m ctkernels robust cifar.npz --model my_project.networks:make=best.safetensors --head own

  # beside an adapter in PEFT's format, with a classifier of its own
  python -m ctkernels robust cifar.npz --model resnet18 --head own --adapter lora=out/lora

  # beside learned curvature: train it first
  python -m ctkernels tune photos/ --model resnet18 --out out/tune
  python -m ctkernels robust photos/ --model resnet18 --adapter t-ct=out/tune

  # without a hub, small, in a clone of the repository: packaged MobileNetV2 weights and Fashion-MNIST
  python -m ctkernels robust examples.data:fashion_mnist --model mobilenet_v2=packaged --size 64 --resize 64 \\
      --max-train 900 --max-test 100 --max-attacked 50 --betas 0.5,0.85 --linf 2/255 --l2 none --severities 3 \\
      --attacks apgd-ce,square --iterations 10 --queries 200

results:
  OUT/result.json   accuracies, choices, gains with their uncertainty, and everything needed to repeat the run"""


def _adapter(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder or name in ("plain", "s-ct"):
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, with a name other than plain and s-ct, got {text!r}")
    if not any((Path(folder) / file).is_file() for file in ("adapter_config.json", "result.json")):
        raise argparse.ArgumentTypeError(
            f"must have PEFT's adapter_config.json or the result.json of tune in {folder}, found none"
        )
    return name, Path(folder)


def parser() -> argparse.ArgumentParser:
    p = options.command_parser("robust", SUMMARY, EXAMPLES)
    options.add_image_data(p)
    network = options.add_network_options(p, RobustnessConfig)
    options.add_fields(network, RobustnessConfig, "head")
    network.add_argument(
        "--adapter",
        action="append",
        type=_adapter,
        default=[],
        metavar="NAME=FOLDER",
        help="also test this: a PEFT adapter, or the folder of tune; repeatable",
    )
    options.add_image_options(p)
    conditions = p.add_argument_group("conditions")
    options.option(conditions, "--linf", types.BOUND, "8/255", "bound in the maximum norm, or none")
    options.option(conditions, "--l2", types.BOUND, "0.5", "bound in the Euclidean norm, or none")
    fields = ("corruptions", "severities", "attacks", "val_attacks", "iterations", "queries", "max_attacked")
    options.add_fields(conditions, RobustnessConfig, *fields)
    options.add_running_options(p, RobustnessConfig, "seed", "batch_size", out="out/robust")
    return p


def run(arguments: argparse.Namespace) -> int:
    threats = [Threat(norm, eps) for norm in ("linf", "l2") if (eps := getattr(arguments, norm)) is not None]
    config = options.config_of(RobustnessConfig, arguments, threats=threats, l2=RobustnessConfig.l2)
    folders = dict(arguments.adapter)
    if len(folders) < len(arguments.adapter):
        raise OptionError(f"--adapter must have different names, got {[name for name, _ in arguments.adapter]}")
    inputs = options.load_inputs(arguments)
    model, splits, train, val, test, preprocess = inputs
    inputs.tell(1, config.margin)
    result = robustness(
        model,
        train if arguments.head == "probe" else None,
        val,
        test,
        replace(config, mean=preprocess.mean, std=preprocess.std),
        trained={name: load_adapter(model, name, folder, splits, arguments.test) for name, folder in folders.items()},
        **options.running(arguments),
    )
    options.tell_result(result, arguments, inputs)
    return 0


def load_adapter(model: Any, name: str, folder: Path, splits: Splits, test: float) -> Any:
    """A copy of ``model`` with the adapter in ``folder``: PEFT's, or what ``tune`` left. Nothing is unpickled.

    ValueError if ``tune`` had other classes, or cut other test images off the same data: it has seen some of these.
    """

    from .._weights import load_adapter as load_peft
    from ..transfer import TransferComparison, load_tuned

    if not (folder / "adapter_config.json").is_file():
        network, preprocess, classes = load_tuned(copy_module(model), folder)
        if classes != splits.train.classes:
            raise ValueError(
                f"--adapter {name}: expected one for the classes {list(splits.train.classes)}, got one for {list(classes)}"
            )
        setup = TransferComparison.read(folder / "result.json").setup
        try:
            same = splits.source in [data["source"] for data in setup["data"].values()]
            held_out = setup["images"]["test"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'result.json'} is damaged: {error!r}") from error
        if same and splits.test is None and held_out != test:
            raise ValueError(f"--test must be {held_out}, as when {folder} was trained on the other images, got {test}")
        return PixelClassifier(network, preprocess.mean, preprocess.std)  # normalised as it was trained
    return load_peft(copy_module(model), folder, f"--adapter {name}")
