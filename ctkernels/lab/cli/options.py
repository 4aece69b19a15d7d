"""Options that several commands share, most of them made from configurations, and what they are turned into."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ...cli import option_types as types
from ...cli.errors import OptionError, Parser, renamed
from .. import _distributed
from ..config import Config, SteeringConfig, fields_of
from ..stats import folds_for, what_counts
from ..transfer.config import ImageOptions, TrainingConfig, TransferConfig

if TYPE_CHECKING:
    from torch import nn

    from .. import ImageSet, Preprocess, Splits
    from ..executor import Executor
    from ..experiment import Method

T = TypeVar("T")
CHOICE = ("margin", "folds")  # the fields of a configuration about a choice by validation


def image_data(text: str) -> str:
    """A source of labelled images, see :func:`ctkernels.lab.load_data`."""
    from ..images.data import find_images

    return types.checked(find_images)(text)


def labelled_data(text: str) -> str:
    """A source of labelled examples, see :func:`ctkernels.lab.load_data`."""
    from ..data import find_data

    return types.checked(find_data)(text)


def network_name(text: str) -> str:
    """The name of a network, see :func:`ctkernels.lab.load_model`."""
    from ..images.models import find_model

    return types.checked(find_model)(text)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and its weights, as of :func:`ctkernels.lab.load_model`."""

    name: str
    weights: str = "default"

    def __str__(self) -> str:
        return self.name if self.weights == "default" else f"{self.name}={self.weights}"


def network(text: str) -> Network:
    """``NAME`` or ``NAME=WEIGHTS``."""
    name, equals, weights = text.partition("=")
    name = network_name(name)
    if not equals:
        return Network(name)
    try:
        return Network(name, types.WEIGHTS(weights))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"weights {error}") from None


def option(
    p: argparse._ActionsContainer, name: str, kind: Callable[[str], Any], default: Any, text: str, **more: Any
) -> None:
    """Add an option whose help says its default."""
    choices = getattr(kind, "choices", ()) or None
    p.add_argument(name, default=default, help=f"{text} (default: %(default)s)", type=kind, choices=choices, **more)


def add_fields(p: argparse._ActionsContainer, config: type[Config], *names: str) -> None:
    """Add an option for each of some fields of a configuration."""
    fields = fields_of(config)
    for name in names:
        kind, _, default, text = fields[name]
        if default is not None:
            text += f" (default: {default if isinstance(default, str) else kind.show(default)})"
        p.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=kind.choices or None,
            default=default,
            help=text.replace("%", "%%"),
        )


def command_parser(command: str, summary: str, examples: str) -> Parser:
    """The parser of ``python -m ctkernels COMMAND``; ``examples`` stand below its options, and then the exit codes."""
    p = Parser(
        prog=f"python -m ctkernels {command}",
        description=summary,
        epilog=f"{examples}\n\nexit codes: 0 done, 2 bad input, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.renamed += [_weights_in_model, renamed("--cpu", "--device", "cpu")]
    return p


def add_image_data(p: argparse.ArgumentParser, nargs: str | None = None, more: str = "") -> None:
    """Add the positional argument for images, or for several sets of them."""
    text = f"folder of images, .npz file, digits, torchvision:NAME, or a factory module:function{more}"
    p.add_argument("data", nargs=nargs, type=image_data, help=text)


def add_data(p: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Add the positional argument for labelled examples of any kind, or for several sets of them."""
    text = (
        "images: folder, .npz file, digits or torchvision:NAME; texts: .jsonl, .csv or .parquet file, or datasets:NAME; "
        "series: .ts file or aeon:NAME; or a factory module:function"
    )
    p.add_argument("data", nargs=nargs, type=labelled_data, help=text)


def add_model(
    p: argparse._ActionsContainer, *, required: bool = True, texts: bool = False, action: str = "store"
) -> None:
    """Add a network and its weights, one for images, or for texts too; with the action "append", any number of them."""
    p.add_argument(
        "--model",
        action=action,
        type=network,
        required=required,
        metavar="NAME[=WEIGHTS]",
        help=f"torchvision name, timm:NAME, transformers:NAME, {'encoder:NAME for texts, ' if texts else ''}or factory "
        "module:function; WEIGHTS: the library's pretrained ones, which it may download (default: default), none (random), "
        "packaged (from an installed package), or a .safetensors or torch.save file"
        + ("; repeatable" if action == "append" else ""),
    )


def _weights_in_model(words: list[str]) -> list[str]:
    """``--model NAME=WEIGHTS`` in place of ``--model NAME --weights WEIGHTS``."""
    model, weights = _option(words, "--model"), _option(words, "--weights")
    if model is None or weights is None:
        return words
    given = f"{model[1]}={weights[1]}"
    warnings.warn(f"--weights is a part of --model now: --model {given}", FutureWarning, stacklevel=2)
    rest = [word for i, word in enumerate(words) if i not in (*model[0], *weights[0])]
    return [*rest, "--model", given]


def _option(words: list[str], name: str) -> tuple[tuple[int, ...], str] | None:
    """Where an option stands among the words of a command line, and its value."""
    for i, word in enumerate(words):
        if word.startswith(f"{name}="):
            return (i,), word.partition("=")[2]
        if word == name and i + 1 < len(words):
            return (i, i + 1), words[i + 1]
    return None


def add_grid(p: argparse._ActionsContainer, method: Callable[[str], Method]) -> None:
    """Add the settings to try; ``method`` finds a method by its name."""

    def read(text: str) -> tuple[str, str, list[float]]:
        name, setting, values = types.GRID(text)
        types.checked(lambda _: method(name).settings({setting: values}))(text)
        return name, setting, values

    p.add_argument(
        "--grid", action="append", type=read, default=[], metavar="METHOD.NAME=VALUES", help="settings to try"
    )


def add_network_options(p: argparse.ArgumentParser, config: type[SteeringConfig]) -> argparse._ArgumentGroup:
    """Add the network, where it is steered, and what is read from it."""
    network = p.add_argument_group("network")
    add_model(network)
    add_fields(network, config, "activations", "feature_layer", "betas", "coeff")
    add_fields(
        p.add_argument_group("choice by validation"), config, *(name for name in CHOICE if name in fields_of(config))
    )
    return network


def add_image_options(p: argparse.ArgumentParser) -> None:
    """Add how images are made ready and split."""
    names = ("size", "resize", "normalise", "val", "test", "max_train", "max_test")
    add_fields(p.add_argument_group("images"), ImageOptions, *names)


def add_example_options(p: argparse.ArgumentParser) -> None:
    """Add how images, texts and series are made ready and split."""
    add_image_options(p)
    add_fields(p.add_argument_group("texts"), ImageOptions, "max_tokens")


def add_training_options(p: argparse.ArgumentParser) -> None:
    """Add how methods are trained, and how the command runs."""
    training = p.add_argument_group("training")
    add_fields(training, TrainingConfig, "epochs", "batch_size")
    add_fields(training, TransferConfig, "bn", "betas", "activations", "precision")
    add_fields(p.add_argument_group("choice by validation"), TransferConfig, *CHOICE)


def add_running_options(
    p: argparse.ArgumentParser, config: type[Config], *fields: str, out: str
) -> argparse._ArgumentGroup:
    """Add how the command runs: ``fields``, such as the seed, the device, and where results go."""
    running = p.add_argument_group("running")
    add_fields(running, config, *fields)
    add_device(running)
    add_results(running, out)
    return running


def add_device(p: argparse._ActionsContainer, default: str = "a GPU if there is one") -> None:
    """Add where to run."""
    p.add_argument("--device", type=types.device, help=f"such as cpu or cuda:0 (default: {default})")


def add_results(p: argparse._ActionsContainer, out: str) -> None:
    """Add where results go, and whether progress shows."""
    option(p, "--out", types.OUT, out, "folder for the results")
    p.add_argument("--no-progress", action="store_true", help="no progress bar")


def add_executor(p: argparse._ActionsContainer) -> None:
    """Add where trials run."""
    p.add_argument(
        "--ray",
        type=types.CLUSTER,
        metavar="ADDRESS",
        help="run trials on a Ray cluster: auto (that of this machine), HOST:PORT, or local (this machine's cores). "
        "Default: in this process",
    )


def executor_of(arguments: argparse.Namespace) -> Executor:
    """What :func:`add_executor` asks for."""
    from ..executor import LocalExecutor, RayExecutor

    if arguments.ray is None:
        return LocalExecutor()
    return RayExecutor(arguments.ray, progress=not arguments.no_progress)


def plain_preprocess(arguments: argparse.Namespace) -> Preprocess:
    """The preprocessing of :func:`add_image_options`, with ImageNet's mean and deviation."""
    from ... import lab

    if arguments.resize is not None and arguments.resize < arguments.size:
        raise OptionError(f"--resize must be at least --size, {arguments.size}, got {arguments.resize}")
    return lab.Preprocess(size=arguments.size, resize=arguments.resize)


def load_network(arguments: argparse.Namespace) -> nn.Module:
    """The network of :func:`add_model`; weights that are random, or that its factory draws, from the seed."""
    return model_source(arguments.model, arguments.seed)()


def model_source(model: Network, seed: int) -> Callable[[], nn.Module]:
    """A function that loads a network, here or on another machine."""
    return functools.partial(_loaded, model.name, model.weights, seed)


def _loaded(name: str, weights: str, seed: int) -> nn.Module:
    import torch

    from ... import lab

    torch.manual_seed(seed)  # for weights drawn at random
    return lab.load_model(name, weights)


class Inputs(NamedTuple):
    """A network, a data set, and its images prepared for the network."""

    model: nn.Module
    splits: Splits
    train: ImageSet
    val: ImageSet
    test: ImageSet
    preprocess: Preprocess

    def folds(self, asked: int | None) -> int:
        """How many folds to validate on: ``asked``, else by the number of validation images cut off the others."""
        if asked is not None or self.splits.val is not None:
            return asked or 1
        return folds_for(len(self.val), len(self.train))

    def tell(self, folds: int, margin: float) -> None:
        """Print, before anything is run, what a difference has to be to count."""
        validated = folds * len(self.val)
        print(what_counts(validated, len(self.test), folds, margin), flush=True)


def load_inputs(arguments: argparse.Namespace) -> Inputs:
    """Load what network, data and image options ask for.

    The test images are the same for every seed and command, so that what was trained on the others can be tested on them.
    """
    from ... import lab
    from ..images.data import find_images
    from ..transfer.inputs import split

    preprocess = plain_preprocess(arguments)
    model, splits = load_network(arguments), find_images(arguments.data)()
    parts: dict[str, Any] = split(splits, config_of(ImageOptions, arguments), arguments.seed)
    if arguments.normalise == "target":
        preprocess = lab.normalised_like(preprocess, parts["train"])
    prepared = {name: part.prepared(preprocess) for name, part in parts.items()}
    return Inputs(model, splits, **prepared, preprocess=preprocess)


def tell_counts(data: Mapping[str, Splits], config: TransferConfig, seed: int) -> None:
    """Print, before anything is trained, what a difference has to be to count on each data set."""
    from ..transfer.inputs import folds_of, split

    if _distributed.launched_rank() == 0:
        for name, splits in data.items():
            sizes = {part: len(examples) for part, examples in split(splits, config.images, seed).items()}
            folds = folds_of(splits, config, sizes)
            about = what_counts(folds * sizes["val"], sizes["test"], folds, config.margin, "simpler method")
            print(f"{name}: {about}{' Everything is trained once per fold.' if folds > 1 else ''}", flush=True)


def running(arguments: argparse.Namespace) -> dict[str, Any]:
    """Device and progress, as functions take them."""
    device = arguments.device or _distributed.launched_device()
    return {"device": device, "progress": not arguments.no_progress}


def on_cpu(arguments: argparse.Namespace) -> bool:
    """Whether accelerate is to run on the CPU. A GPU that was asked for by number becomes the one that it takes."""
    import torch

    if arguments.device is None:
        return False
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device.type == "cpu"


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
    """A configuration from ``values`` and the options that are called as its fields, and so those within it."""
    options = vars(arguments)
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and issubclass(hint, Config):
            values.setdefault(name, config_of(hint, arguments))
        elif name in options:
            values.setdefault(name, options[name])
        elif name == "progress":
            values.setdefault(name, not arguments.no_progress)
    return kind(**values)


def record_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Entries of a result file about the command: its line, and every option's value."""
    values = {name: value for name, value in vars(arguments).items() if name not in ("command", "traceback")}
    options = json.loads(json.dumps(values, default=str))  # folders are paths
    return {"command": arguments.command, "options": options}


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
