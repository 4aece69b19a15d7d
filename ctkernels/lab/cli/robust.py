"""``python -m ctkernels robust``: accuracy under attack and under corruptions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cli import option_types as types
from ...cli.errors import OptionError
from .options import (
    add_image_options,
    add_network_options,
    command_parser,
    image_data,
    load_images,
    load_network,
    plain_preprocess,
    preprocess_for,
    save_result,
)

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
  python -m ctkernels robust cifar.npz --model my_project.networks:make --weights best.safetensors --head own

  # beside an adapter in PEFT's format, with a classifier of its own
  python -m ctkernels robust cifar.npz --model resnet18 --head own --adapter lora=out/lora

  # beside learned curvature: train it first
  python -m ctkernels tune photos/ --model resnet18 --out out/tune
  python -m ctkernels robust photos/ --model resnet18 --adapter t-ct=out/tune

  # without a network connection, small: packaged MobileNetV2 weights and Fashion-MNIST
  python -m ctkernels robust fashion-mnist --model mobilenet_v2 --weights packaged --size 64 --resize 64 \\
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


def _corruptions(text: str) -> list[str]:
    from ..robustness.corruptions import CORRUPTIONS

    if text in ("all", "none"):
        return list(CORRUPTIONS) if text == "all" else []
    return types.names(CORRUPTIONS)(text)


def _attacks(text: str) -> list[str] | None:
    from ..robustness.attacks import ATTACKS

    return None if text == "standard" else types.names(ATTACKS)(text)


def parser() -> argparse.ArgumentParser:
    p = command_parser("robust", SUMMARY, EXAMPLES)
    p.add_argument("data", type=image_data, help="folder of images, .npz file, or fashion-mnist")
    network = add_network_options(p, "0.5:1:0.05")
    network.add_argument(
        "--head",
        choices=("probe", "own"),
        default="probe",
        help="what classifies: a linear probe on frozen features, or the network's own output (default: %(default)s)",
    )
    network.add_argument(
        "--adapter",
        action="append",
        type=_adapter,
        default=[],
        metavar="NAME=FOLDER",
        help="also test this: a PEFT adapter, or the folder of tune; repeatable",
    )
    network.add_argument("--coeff", type=types.SHARE, default=0.5, help="mixing coefficient c (default: %(default)s)")
    add_image_options(p)
    conditions = p.add_argument_group("conditions")
    conditions.add_argument(
        "--linf", type=types.BOUND, default="8/255", help="bound in the maximum norm, or none (default: %(default)s)"
    )
    conditions.add_argument(
        "--l2", type=types.BOUND, default="0.5", help="bound in the Euclidean norm, or none (default: %(default)s)"
    )
    conditions.add_argument(
        "--corruptions",
        type=_corruptions,
        default="all",
        help="all, none, or names with commas (default: %(default)s)",
    )
    conditions.add_argument(
        "--severities", type=types.LEVELS, default="1,2,3,4,5", help="of the corruptions (default: %(default)s)"
    )
    conditions.add_argument(
        "--attacks", type=_attacks, help="names with commas (default: AutoAttack's standard ensemble)"
    )
    conditions.add_argument(
        "--val-attacks",
        type=_attacks,
        default="apgd-ce",
        help="to choose beta with; standard for the ensemble (default: %(default)s)",
    )
    conditions.add_argument("--iterations", type=types.COUNT, default=100, help="of the attacks (default: %(default)s)")
    conditions.add_argument("--queries", type=types.COUNT, default=5000, help="of Square (default: %(default)s)")
    conditions.add_argument(
        "--max-attacked",
        type=types.COUNT,
        default=1000,
        help="attack at most so many images of a set (default: %(default)s)",
    )
    running = p.add_argument_group("running")
    running.add_argument("--seed", type=types.SEED, default=0, help="of everything random (default: %(default)s)")
    running.add_argument("--batch-size", type=types.COUNT, default=64, help="images at once (default: %(default)s)")
    running.add_argument("--device", type=types.device, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    running.add_argument(
        "--out", type=types.OUT, default="out/robust", help="folder for the results (default: %(default)s)"
    )
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return p


def run(arguments: argparse.Namespace) -> int:
    from .. import _distributed
    from ..robustness.attacks import Threat
    from ..robustness.evaluate import check_conditions, robustness

    threats = [Threat(norm, eps) for norm in ("linf", "l2") if (eps := getattr(arguments, norm)) is not None]
    check_conditions(threats, arguments.corruptions, arguments.severities)
    folders = dict(arguments.adapter)
    if len(folders) < len(arguments.adapter):
        raise OptionError(f"--adapter must have different names, got {[name for name, _ in arguments.adapter]}")
    plain_preprocess(arguments)
    model = load_network(arguments)
    splits, train, val, test = load_images(arguments)
    trained = {name: load_adapter(model, name, folder, splits, arguments.test) for name, folder in folders.items()}
    preprocess = preprocess_for(arguments, train)
    train, val, test = (part.prepared(preprocess) for part in (train, val, test))
    result = robustness(
        model,
        train if arguments.head == "probe" else None,
        val,
        test,
        mean=preprocess.mean,
        std=preprocess.std,
        head=arguments.head,
        trained=trained,
        betas=arguments.betas,
        coeff=arguments.coeff,
        activations=arguments.activations,
        feature_layer=arguments.feature_layer,
        threats=threats,
        corruptions=arguments.corruptions,
        severities=arguments.severities,
        attacks=arguments.attacks,
        val_attacks=arguments.val_attacks,
        iterations=arguments.iterations,
        queries=arguments.queries,
        max_attacked=arguments.max_attacked,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        device=arguments.device or _distributed.launched_device(),
        progress=not arguments.no_progress,
    )
    print(f"{splits.source}: {len(train)} train, {len(val)} validation, {len(test)} test images")
    print(f"\n{result.table()}\n\n{result.verdict()}")
    save_result(result, arguments.out, arguments, splits, train, preprocess)
    return 0


def load_adapter(model: Any, name: str, folder: Path, splits: Splits, test: float) -> Any:
    """A copy of ``model`` with the adapter in ``folder``: PEFT's, or what ``tune`` left. Nothing is unpickled.

    ValueError if ``tune`` had other classes, or cut other test images off the same data: it has seen some of these.
    """
    import copy

    from ... import adapters  # noqa: F401 - makes the library's own methods known to PEFT
    from ..._extras import require
    from ..._factories import told
    from ..._files import read_json
    from .._weights import read_weights

    peft = require("peft", "adapters", "adapters")
    if not (folder / "adapter_config.json").is_file():
        from ..robustness.attacks import PixelClassifier
        from ..transfer import load_tuned, read_comparison

        network, preprocess, classes = load_tuned(copy.deepcopy(model), folder)
        if classes != splits.train.classes:
            raise ValueError(
                f"--adapter {name}: expected one for the classes {list(splits.train.classes)}, got one for {list(classes)}"
            )
        setup = read_comparison(folder / "result.json").setup
        try:
            same = splits.source in [data["source"] for data in setup["data"].values()]
            held_out = setup["images"]["test"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'result.json'} is damaged: {error!r}") from error
        if same and splits.test is None and held_out != test:
            raise ValueError(f"--test must be {held_out}, as when {folder} was trained on the other images, got {test}")
        return PixelClassifier(network, preprocess.mean, preprocess.std)  # normalised as it was trained
    if not (folder / "adapter_model.safetensors").is_file():  # else peft asks the hub for it
        raise ValueError(f"{folder}: expected adapter_model.safetensors, found none")
    read_json(folder / "adapter_config.json")
    read_weights(folder / "adapter_model.safetensors")
    try:
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--adapter {name}: what is in {folder} does not fit the network: {told(error)}") from error
