"""What several commands ask for in the same words, and how such options are read."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cli import option_types as types
from ...cli.errors import OptionError, Parser

if TYPE_CHECKING:
    from torch import nn

    from .. import ImageSet, Preprocess, Splits


def image_data(text: str) -> str:
    """Where labelled images come from, see :func:`ctkernels.lab.load_data`."""
    from ..images.data import find_data

    return types.checked(find_data)(text)


def network_name(text: str) -> str:
    """The name of a network, see :func:`ctkernels.lab.load_model`."""
    from ..images.models import find_model

    return types.checked(find_model)(text)


def network_and_weights(text: str) -> tuple[str, str]:
    """``NAME`` or ``NAME=WEIGHTS``."""
    name, equals, chosen = text.partition("=")
    return network_name(name), types.WEIGHTS(chosen) if equals else "default"


def command_parser(command: str, summary: str, examples: str) -> Parser:
    """The parser of ``python -m ctkernels COMMAND``; ``examples`` stand below its options, and then the exit codes."""
    return Parser(
        prog=f"python -m ctkernels {command}",
        description=summary,
        epilog=f"{examples}\n\nexit codes: 0 done, 2 bad input, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_network_options(p: argparse.ArgumentParser, betas: str) -> argparse._ArgumentGroup:
    """The network, where it is steered, and what is read from it; ``betas`` are the default ones."""
    network = p.add_argument_group("network")
    network.add_argument(
        "--model", required=True, type=network_name, help="torchvision name, timm:NAME, or factory module:function"
    )
    network.add_argument(
        "--weights",
        type=types.WEIGHTS,
        default="default",
        help="default: the library's pretrained ones, may download; none: random; packaged: from an installed package; "
        "else a .safetensors or torch.save file (default: %(default)s)",
    )
    network.add_argument(
        "--activations", type=types.activations(), help="kinds to steer, comma-separated (default: all that can be)"
    )
    network.add_argument(
        "--feature-layer",
        type=types.TEXT,
        help="submodule whose output is probed (default: what enters the classifier)",
    )
    network.add_argument(
        "--betas",
        type=types.BETAS,
        default=betas,
        help="START:STOP:STEP with both ends, or values with commas (default: %(default)s); 1 always takes part",
    )
    return network


def add_image_options(p: argparse.ArgumentParser) -> None:
    """How images are made ready and split."""
    images = p.add_argument_group("images")
    images.add_argument(
        "--size", type=types.PIXELS, default=224, help="pixels that the network sees (default: %(default)s)"
    )
    images.add_argument(
        "--resize", type=types.PIXELS, help="shorter side before the centre crop (default: size * 256 / 224)"
    )
    images.add_argument(
        "--normalise",
        choices=("target", "imagenet"),
        default="target",
        help="mean and deviation of up to 1000 training images, or of ImageNet (default: %(default)s)",
    )
    images.add_argument(
        "--val",
        type=types.FRACTION,
        default=0.2,
        help="fraction for validation if none is given (default: %(default)s)",
    )
    images.add_argument(
        "--test", type=types.FRACTION, default=0.2, help="fraction for test if none is given (default: %(default)s)"
    )
    images.add_argument(
        "--max-train", type=types.COUNT, help="at most so many for training and validation (default: all)"
    )
    images.add_argument("--max-test", type=types.COUNT, help="at most so many for test (default: all)")


def add_training_options(p: argparse.ArgumentParser) -> None:
    """How methods are trained."""
    training = p.add_argument_group("training")
    training.add_argument("--epochs", type=types.COUNT, default=20, help="the best is kept (default: %(default)s)")
    training.add_argument("--batch-size", type=types.COUNT, default=32, help="images per step (default: %(default)s)")
    training.add_argument(
        "--bn",
        choices=("eval", "train", "paper"),
        default="eval",
        help="batch normalisation: eval: the statistics of pretraining, for every method; train: of the new data, for "
        "every method; paper: train for trained networks, eval for frozen ones (default: %(default)s)",
    )
    training.add_argument(
        "--betas",
        type=types.BETAS,
        default="0.7:1:0.01",
        help="for S-CT: START:STOP:STEP with both ends, or values with commas (default: %(default)s)",
    )
    training.add_argument(
        "--activations",
        type=types.activations(),
        help="kinds to treat, comma-separated (default: relu,leaky_relu,prelu,relu6)",
    )
    training.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision (default: %(default)s)"
    )


def add_running_options(p: argparse.ArgumentParser, out: str) -> argparse._ArgumentGroup:
    """Where results go, and what is shown meanwhile."""
    running = p.add_argument_group("running")
    running.add_argument(
        "--workers", type=types.WORKERS, default=0, help="processes that decode images (default: %(default)s)"
    )
    running.add_argument(
        "--memory-limit", type=types.SIZE, default="2GiB", help="for features kept at once (default: %(default)s)"
    )
    running.add_argument("--out", type=types.OUT, default=out, help="folder for the results (default: %(default)s)")
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return running


def plain_preprocess(arguments: argparse.Namespace) -> Preprocess:
    """What :func:`add_image_options` asks for, with ImageNet's mean and deviation."""
    from ... import lab

    if arguments.resize is not None and arguments.resize < arguments.size:
        raise OptionError(f"--resize must be at least --size, {arguments.size}, got {arguments.resize}")
    return lab.Preprocess(size=arguments.size, resize=arguments.resize)


def load_network(arguments: argparse.Namespace) -> nn.Module:
    """The network of :func:`add_network_options`; weights that are random, or that its factory draws, from the seed."""
    import torch

    from ... import lab

    torch.manual_seed(arguments.seed)
    return lab.load_model(arguments.model, arguments.weights)


def load_images(arguments: argparse.Namespace) -> tuple[Splits, ImageSet, ImageSet, ImageSet]:
    """The data set, and its images for training, validation and test, as yet unprepared.

    The test images are the same for every seed and command, so that what was trained on the others can be tested on them.
    """
    from ... import lab

    splits = lab.load_data(arguments.data)
    return splits, *splits.complete(
        val=arguments.val,
        test=arguments.test,
        seed=arguments.seed,
        test_seed=0,
        max_train=arguments.max_train,
        max_test=arguments.max_test,
    )


def preprocess_for(arguments: argparse.Namespace, train: ImageSet) -> Preprocess:
    """What :func:`add_image_options` asks for; the mean and deviation may be those of ``train``."""
    from ... import lab

    preprocess = plain_preprocess(arguments)
    return lab.normalised_like(preprocess, train) if arguments.normalise == "target" else preprocess


def save_result(
    result: Any, out: Path, arguments: argparse.Namespace, splits: Splits, train: ImageSet, preprocess: Preprocess
) -> None:
    """``out/result.json``, with what it takes to repeat the run."""
    result.save(
        out / "result.json",
        command=arguments.command,
        options=chosen_options(arguments),
        data={
            "source": splits.source,
            "classes": list(train.classes),
            "preprocess": dataclasses.asdict(preprocess),
        },
    )
    print(f"\nsaved {out / 'result.json'}")


def image_options(arguments: argparse.Namespace) -> Any:
    from ..transfer import ImageOptions

    plain_preprocess(arguments)
    names = ("size", "resize", "normalise", "val", "test", "max_train", "max_test")
    return ImageOptions(**{name: getattr(arguments, name) for name in names})


def training_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :func:`compare_transfer` from those of :func:`add_training_options` and the running ones."""
    from ..transfer import Budget

    return {
        "betas": arguments.betas,
        "budget": Budget(arguments.epochs, arguments.batch_size),
        "bn": arguments.bn,
        "activations": arguments.activations,
        "precision": arguments.precision,
        "cpu": arguments.cpu,
        "workers": arguments.workers,
        "memory_limit": arguments.memory_limit,
        "progress": not arguments.no_progress,
        "extra": {"command": arguments.command, "options": chosen_options(arguments)},
    }


def chosen_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every option's value, for the result file."""
    values = {name: value for name, value in vars(arguments).items() if name not in ("command", "traceback")}
    return json.loads(json.dumps(values, default=str))  # folders are paths


def grids_of(
    given: Sequence[tuple[str, str, list[float]]], methods: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """The values of every ``--grid`` by method and setting. OptionError for a method that does not take part."""
    grids: dict[str, dict[str, list[float]]] = {}
    for method, setting, values in given:
        if method not in methods:
            raise OptionError(f"--grid must be of methods that take part, {', '.join(methods)}, got {method}")
        if setting in grids.setdefault(method, {}):
            raise OptionError(f"--grid must name {method}.{setting} once, got it more than once")
        grids[method][setting] = values
    return grids
