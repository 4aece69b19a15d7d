"""What several commands ask for in the same words, and how such options are read."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipes import ImageSet, Preprocess, Splits


def command_parser(command: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """The parser of ``python -m ctkernels COMMAND``; ``examples`` stand below its options, and then the exit codes."""
    return argparse.ArgumentParser(
        prog=f"python -m ctkernels {command}",
        description=summary,
        epilog=f"{examples}\n\nexit codes: 0 done, 2 bad input, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_network_options(p: argparse.ArgumentParser, betas: str) -> argparse._ArgumentGroup:
    """The network, where it is steered, and what is read from it; ``betas`` are the default ones."""
    network = p.add_argument_group("network")
    network.add_argument("--model", required=True, help="torchvision name, timm:NAME, or factory module:function")
    network.add_argument(
        "--weights",
        default="default",
        help="default: the library's pretrained ones, may download; none: random; packaged: from an installed package; "
        "else a .safetensors or torch.save file (default: %(default)s)",
    )
    network.add_argument("--activations", help="kinds to steer, comma-separated (default: all that can be)")
    network.add_argument(
        "--feature-layer", help="submodule whose output is probed (default: what enters the classifier)"
    )
    network.add_argument(
        "--betas",
        default=betas,
        help="START:STOP:STEP with both ends, or values with commas (default: %(default)s); 1 always takes part",
    )
    return network


def add_image_options(p: argparse.ArgumentParser) -> None:
    """How images are made ready and split."""
    images = p.add_argument_group("images")
    images.add_argument("--size", type=int, default=224, help="pixels that the network sees (default: %(default)s)")
    images.add_argument("--resize", type=int, help="shorter side before the centre crop (default: size * 256 / 224)")
    images.add_argument(
        "--normalise",
        choices=("target", "imagenet"),
        default="target",
        help="mean and deviation of up to 1000 training images, or of ImageNet (default: %(default)s)",
    )
    images.add_argument(
        "--val", type=float, default=0.2, help="fraction for validation if none is given (default: %(default)s)"
    )
    images.add_argument(
        "--test", type=float, default=0.2, help="fraction for test if none is given (default: %(default)s)"
    )
    images.add_argument("--max-train", type=int, help="at most so many for training and validation (default: all)")
    images.add_argument("--max-test", type=int, help="at most so many for test (default: all)")


def add_training_options(p: argparse.ArgumentParser) -> None:
    """How methods are trained."""
    training = p.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=20, help="the best is kept (default: %(default)s)")
    training.add_argument("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    training.add_argument(
        "--bn",
        choices=("eval", "train", "paper"),
        default="eval",
        help="batch normalisation: eval: the statistics of pretraining, for every method; train: of the new data, for "
        "every method; paper: train for trained networks, eval for frozen ones (default: %(default)s)",
    )
    training.add_argument(
        "--betas",
        default="0.7:1:0.01",
        help="for S-CT: START:STOP:STEP with both ends, or values with commas (default: %(default)s)",
    )
    training.add_argument(
        "--activations", help="kinds to treat, comma-separated (default: relu,leaky_relu,prelu,relu6)"
    )
    training.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision (default: %(default)s)"
    )


def add_running_options(p: argparse.ArgumentParser, out: str) -> argparse._ArgumentGroup:
    """Where results go, and what is shown meanwhile."""
    running = p.add_argument_group("running")
    running.add_argument("--workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    running.add_argument("--memory-limit", default="2GiB", help="for features kept at once (default: %(default)s)")
    running.add_argument("--out", default=out, help="folder for the results (default: %(default)s)")
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return running


def load_images(arguments: argparse.Namespace) -> tuple[Splits, ImageSet, ImageSet, ImageSet]:
    """The data set, and its images for training, validation and test, as yet unprepared.

    The test images are the same for every seed and command, so that what was trained on the others can be tested on them.
    """
    from .. import recipes

    splits = recipes.load_data(arguments.data)
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
    from .. import recipes

    preprocess = recipes.Preprocess(size=arguments.size, resize=arguments.resize)
    return recipes.normalised_like(preprocess, train) if arguments.normalise == "target" else preprocess


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
    from ..recipes.compare import ImageOptions

    names = ("size", "resize", "normalise", "val", "test", "max_train", "max_test")
    return ImageOptions(**{name: getattr(arguments, name) for name in names})


def training_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :func:`compare_transfer` from those of :func:`add_training_options` and the running ones."""
    from ..recipes.compare import Budget

    return {
        "betas": parse_betas(arguments.betas),
        "budget": Budget(arguments.epochs, arguments.batch_size),
        "bn": arguments.bn,
        "activations": arguments.activations.split(",") if arguments.activations else None,
        "precision": arguments.precision,
        "cpu": arguments.cpu,
        "workers": arguments.workers,
        "memory_limit": parse_bytes(arguments.memory_limit),
        "progress": not arguments.no_progress,
        "extra": {"command": arguments.command, "options": chosen_options(arguments)},
    }


def chosen_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every option's value, for the result file."""
    return {k: v for k, v in vars(arguments).items() if k not in ("command", "traceback")}


def out_folder(text: str) -> Path:
    """The folder for results. ValueError if it is a file."""
    out = Path(text)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    return out


def parse_seeds(text: str) -> list[int]:
    """``"0,1"`` gives ``[0, 1]``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds must be numbers with commas, got {text!r}") from None


def parse_grids(texts: list[str]) -> dict[str, dict[str, list[float]]]:
    """``["lora.rank=4,8"]`` gives ``{"lora": {"rank": [4.0, 8.0]}}``."""
    grids: dict[str, dict[str, list[float]]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        method, _, setting = name.partition(".")
        try:
            grids.setdefault(method, {})[setting] = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--grid must be METHOD.NAME=VALUE,VALUE, got {text!r}") from None
    return grids


def parse_betas(text: str) -> list[float]:
    """``"0.7:1:0.1"`` gives 0.7, 0.8, 0.9, 1; ``"0.8,1"`` gives these."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if not (step > 0 and stop >= start):
                raise ValueError
            return [round(start + i * step, 10) for i in range(int((stop - start) / step + 1e-9) + 1)]
        return [float(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        raise ValueError(f"--betas must be START:STOP:STEP or values with commas, got {text!r}") from None


def parse_bytes(text: str) -> int:
    """``"2GiB"``, ``"500 MB"``, ``"1e9"``: a number of bytes."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*([a-z]*)\s*", text.lower())
    if match and match[2] in units and float(match[1]) > 0:
        return int(float(match[1]) * units[match[2]])
    raise ValueError(f"--memory-limit must be a size such as 500MB or 2GiB, got {text!r}")
