"""Options that several commands share, and what they are turned into."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ...cli import option_types as types
from ...cli.errors import OptionError, Parser
from .. import _distributed

if TYPE_CHECKING:
    from torch import nn

    from .. import ImageSet, Preprocess, Splits
    from ..transfer import TransferConfig

T = TypeVar("T")


def image_data(text: str) -> str:
    """A source of labelled images, see :func:`ctkernels.lab.load_data`."""
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


def option(
    p: argparse._ActionsContainer,
    name: str,
    kind: Callable[[str], Any] | Sequence[str],
    default: Any,
    text: str,
    **more: Any,
) -> None:
    """Add an option whose help says its default; ``kind`` reads it, or is what there is to choose from."""
    reads: dict[str, Any] = {"type": kind} if callable(kind) else {"choices": kind}
    p.add_argument(name, default=default, help=f"{text} (default: %(default)s)".strip(), **reads, **more)


def command_parser(command: str, summary: str, examples: str) -> Parser:
    """The parser of ``python -m ctkernels COMMAND``; ``examples`` stand below its options, and then the exit codes."""
    return Parser(
        prog=f"python -m ctkernels {command}",
        description=summary,
        epilog=f"{examples}\n\nexit codes: 0 done, 2 bad input, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_image_data(p: argparse.ArgumentParser, nargs: str | None = None, more: str = "") -> None:
    """Add the positional argument for images, or for several sets of them."""
    text = f"folder of images, .npz file, digits, torchvision:NAME, or a factory module:function{more}"
    p.add_argument("data", nargs=nargs, type=image_data, help=text)


def add_network_options(p: argparse.ArgumentParser, betas: str) -> argparse._ArgumentGroup:
    """Add the network, where it is steered, and what is read from it; ``betas`` are the default ones."""
    network = p.add_argument_group("network")
    network.add_argument(
        "--model", required=True, type=network_name, help="torchvision name, timm:NAME, or factory module:function"
    )
    option(
        network,
        "--weights",
        types.WEIGHTS,
        "default",
        "default: the library's pretrained ones, may download; none: random; packaged: from an installed package; else a "
        ".safetensors or torch.save file",
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
    """Add how images are made ready and split."""
    images = p.add_argument_group("images")
    option(images, "--size", types.PIXELS, 224, "pixels that the network sees")
    images.add_argument(
        "--resize", type=types.PIXELS, help="shorter side before the centre crop (default: size * 256 / 224)"
    )
    option(
        images,
        "--normalise",
        ("target", "imagenet"),
        "target",
        "mean and deviation of up to 1000 training images, or of ImageNet",
    )
    option(images, "--val", types.FRACTION, 0.2, "fraction for validation if none is given")
    option(images, "--test", types.FRACTION, 0.2, "fraction for test if none is given")
    images.add_argument(
        "--max-train",
        type=types.COUNT,
        help="use at most N images for training and validation (default: all)",
        metavar="N",
    )
    images.add_argument("--max-test", type=types.COUNT, help="use at most N test images (default: all)", metavar="N")


def add_training_options(p: argparse.ArgumentParser) -> None:
    """Add how methods are trained."""
    training = p.add_argument_group("training")
    option(training, "--epochs", types.COUNT, 20, "the best is kept")
    option(training, "--batch-size", types.COUNT, 32, "images per step")
    option(
        training,
        "--bn",
        ("eval", "train", "paper"),
        "eval",
        "batch normalisation: eval: the statistics of pretraining, for every method; train: of the new data, for every "
        "method; paper: train for trained networks, eval for frozen ones",
    )
    option(
        training,
        "--betas",
        types.BETAS,
        "0.7:1:0.01",
        "for S-CT: START:STOP:STEP with both ends, or values with commas",
    )
    training.add_argument(
        "--activations",
        type=types.activations(),
        help="kinds to treat, comma-separated (default: relu,leaky_relu,prelu,relu6)",
    )
    option(training, "--precision", ("no", "bf16", "fp16"), "no", "mixed precision")


def add_running_options(
    p: argparse.ArgumentParser,
    out: str,
    seed: str = "",
    batch_size: int | None = None,
    workers: bool = True,
    memory_limit: bool = False,
) -> argparse._ArgumentGroup:
    """Add where results go, and how the command runs.

    ``seed`` says what the seed is of (empty: no seed, no device); ``batch_size`` is the default (None: no such option).
    """
    running = p.add_argument_group("running")
    if seed:
        option(running, "--seed", types.SEED, 0, seed)
        running.add_argument(
            "--device", type=types.device, help="such as cpu or cuda:0 (default: a GPU if there is one)"
        )
    if batch_size:
        option(running, "--batch-size", types.COUNT, batch_size, "images at once")
    if workers:
        option(running, "--workers", types.WORKERS, 0, "processes that decode images")
    if memory_limit:
        option(running, "--memory-limit", types.SIZE, "2GiB", "for features kept at once")
    option(running, "--out", types.OUT, out, "folder for the results")
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return running


def plain_preprocess(arguments: argparse.Namespace) -> Preprocess:
    """The preprocessing of :func:`add_image_options`, with ImageNet's mean and deviation."""
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


class Inputs(NamedTuple):
    """A network, a data set, and its images prepared for the network."""

    model: nn.Module
    splits: Splits
    train: ImageSet
    val: ImageSet
    test: ImageSet
    preprocess: Preprocess


def load_inputs(arguments: argparse.Namespace) -> Inputs:
    """Load what network, data and image options ask for.

    The test images are the same for every seed and command, so that what was trained on the others can be tested on them.
    """
    from ... import lab

    preprocess = plain_preprocess(arguments)
    model, splits = load_network(arguments), lab.load_data(arguments.data)
    limits = {name: getattr(arguments, name) for name in ("val", "test", "max_train", "max_test")}
    parts = splits.complete(**limits, seed=arguments.seed, test_seed=0)
    if arguments.normalise == "target":
        preprocess = lab.normalised_like(preprocess, parts[0])
    train, val, test = (part.prepared(preprocess) for part in parts)
    return Inputs(model, splits, train, val, test, preprocess)


def running(arguments: argparse.Namespace) -> dict[str, Any]:
    """Device and progress, as functions take them."""
    device = arguments.device or _distributed.launched_device()
    return {"device": device, "progress": not arguments.no_progress}


def tell_result(result: Any, arguments: argparse.Namespace, inputs: Inputs, line: str = "") -> None:
    """Print a result, and save it with what it takes to repeat the run."""
    train, val, test = (len(part) for part in (inputs.train, inputs.val, inputs.test))
    print(f"{inputs.splits.source}: {train} train, {val} validation, {test} test images{line}")
    print(f"\n{result.table()}\n\n{result.verdict()}")
    preprocess = dataclasses.asdict(inputs.preprocess)
    data = {"source": inputs.splits.source, "classes": list(inputs.train.classes), "preprocess": preprocess}
    result.save(arguments.out / "result.json", **record_of(arguments), data=data)
    print(f"\nsaved {arguments.out / 'result.json'}")


def config_of(kind: type[T], arguments: argparse.Namespace, **values: Any) -> T:
    """A configuration from the options that are called as its fields, and from ``values``."""
    names = {field.name for field in dataclasses.fields(kind)} - values.keys()  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(arguments).items() if name in names}, **values)


def transfer_config(arguments: argparse.Namespace) -> TransferConfig:
    """The configuration of :func:`compare_transfer` from image, training and running options."""
    from ..transfer import ImageOptions, TrainingConfig, TransferConfig

    plain_preprocess(arguments)
    training, images = config_of(TrainingConfig, arguments), config_of(ImageOptions, arguments)
    return config_of(TransferConfig, arguments, training=training, images=images, progress=not arguments.no_progress)


def record_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Entries of a result file about the command."""
    return {"command": arguments.command, "options": chosen_options(arguments)}


def chosen_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every option's value, for the result file."""
    values = {name: value for name, value in vars(arguments).items() if name not in ("command", "traceback")}
    return json.loads(json.dumps(values, default=str))  # folders are paths


def grids_of(
    options: Sequence[tuple[str, str, list[float]]], methods: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """The values of every ``--grid`` by method and setting. OptionError for a method that does not take part."""
    grids: dict[str, dict[str, list[float]]] = {}
    for method, setting, values in options:
        if method not in methods:
            raise OptionError(f"--grid must be of methods that take part, {', '.join(methods)}, got {method}")
        if setting in grids.setdefault(method, {}):
            raise OptionError(f"--grid must name {method}.{setting} once, got it more than once")
        grids[method][setting] = values
    return grids
