"""``python -m ctkernels adapt``: from a folder of images, or a file of prompts and answers, to an adapted model."""

from __future__ import annotations

import argparse
import importlib
import shlex
import webbrowser
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from ...cli import option_types as types
from ...cli.errors import OptionError
from . import options

if TYPE_CHECKING:
    from ..jola.texts import TextData
    from ..labelled import Splits

SUMMARY = """\
Adapt a pretrained model to your data, with settings that fit it: the first thing to try.

It looks at the data, says what is worth trying on so much of it, runs that, and writes a page with the results. Images: a
linear probe, one fixed beta (S-CT) and learned curvature (T-CT), by `tune`. Prompts and answers: the model as it is,
LoRA and JoLA, by `jola`. The command it runs is printed, to be run again with other settings."""

EXAMPLES = """\
examples:
  # a folder with a folder of images for each class
  python -m ctkernels adapt photos/ --model resnet18

  # a file with a prompt and an answer in every line
  python -m ctkernels adapt questions.jsonl --model ./Llama-3.2-1B

  # what would be run, and why; with options of tune or jola in place of those that were chosen
  python -m ctkernels adapt photos/ --model resnet18 --dry-run --options '--epochs 20 --size 128'

results:
  OUT/              what `tune` or `jola` leaves there
  OUT/report/index.html   the page"""

FEW = 5  # examples of a class; with fewer there is next to nothing to learn it from, and to choose by
SAMPLED = 32  # images that are opened to see how large images are


class Advice(NamedTuple):
    """What was seen in the data, and the command that follows from it."""

    said: list[str]
    command: str
    arguments: list[str]


_OPTIONS = types.Kind(
    "options of tune or jola, such as '--epochs 20'", shlex.split, lambda words: len(words) > 0 and words[0][:2] == "--"
)


def _find(name: str) -> Callable[[], Splits | TextData]:
    """What reads the examples of that name; ValueError for none."""
    from ..._factories import find_factory
    from ..data import find_data, has_texts
    from ..jola.texts import HUB, TextData, find_texts
    from ..labelled import Splits

    path = Path(name)
    if has_texts(path) or name.startswith(HUB):
        return find_texts(name)
    if ":" in name and not path.exists() and name.partition(":")[0] not in ("torchvision", "aeon"):
        return find_factory(name, (Splits, TextData), "data")
    return find_data(name)


def _data(text: str) -> str:
    return types.checked(_find)(text)


def _model(text: str) -> str:
    from ..jola.language_models import find_language_model

    try:
        options.network(text)
    except argparse.ArgumentTypeError:
        types.checked(find_language_model)(text)
    return text


def parser() -> argparse.ArgumentParser:
    p = options.command_parser("adapt", SUMMARY, EXAMPLES)
    p.add_argument(
        "data",
        type=_data,
        help="folder of images, .npz, .jsonl, .csv or .parquet file, datasets:NAME, or factory module:function",
    )
    p.add_argument("--model", type=_model, help="as of tune for images (default: mobilenet_v2), as of jola for texts")
    p.add_argument("--options", type=_OPTIONS, default=[], help="other options for tune or jola, in quotes")
    options.option(p, "--seed", types.SEED, 0, "of everything random; texts are run with this and the next two")
    options.add_device(p)
    options.add_results(p, "out/adapt")
    p.add_argument("--dry-run", action="store_true", help="look at the data and print the command, and run nothing")
    p.add_argument("--open", action="store_true", help="open the page in a browser")
    return p


def run(arguments: argparse.Namespace) -> int:
    advice = advise(arguments.data, _find(arguments.data)(), arguments.model, arguments.seed)
    chosen = [*advice.arguments, "--out", str(arguments.out)]
    chosen += [] if arguments.device is None else ["--device", arguments.device]
    chosen += ["--no-progress"] if arguments.no_progress else []
    chosen += arguments.options
    print("\n".join(advice.said))
    print(f"\n  {shlex.join(['python', '-m', 'ctkernels', advice.command, *chosen])}\n", flush=True)
    module: Any = importlib.import_module(f".{advice.command}", __package__)
    parsed = module.parser().parse_args(chosen)
    parsed.command = arguments.command
    if arguments.dry_run:
        return 0
    code = module.run(parsed)
    if code == 0:
        from ..report.page import build

        page = build([arguments.out / "result.json"], arguments.out / "report", f"{arguments.data}, adapted")
        print(f"\nread {page}")
        if arguments.open:
            webbrowser.open(page.resolve().as_uri())
    return code


def advise(name: str, data: Splits | TextData, model: str | None, seed: int = 0) -> Advice:
    """Say what the data is and what to run on it.

    Args:
        name: of the data, as on the command line.
        data: images or texts.
        model: as on the command line.
        seed: of the command that is run.

    Raises:
        OptionError: no model, for other examples than images.
    """
    from ..labelled import Splits

    if isinstance(data, Splits):
        return _advise_examples(name, data, model, seed)
    if model is None:
        raise OptionError("--model: expected a language model (a folder, a .gguf file or a name on the hub), got none")
    return _advise_texts(name, data, model, seed)


def _advise_examples(name: str, data: Splits, model: str | None, seed: int) -> Advice:
    from ..images.sets import ImageSet

    train = data.train
    counts = Counter(train.labels.tolist())
    classes = {text: counts[number] for number, text in enumerate(train.classes)}
    missing = [text for text, part in (("validation", data.val), ("test", data.test)) if part is None]
    said = [
        f"{name}: {len(train):,} {'images' if isinstance(train, ImageSet) else 'examples'} of {len(classes)} classes "
        f"({_listed(classes)})" + (f"; {' and '.join(missing)} examples are set apart from them" if missing else "")
    ]
    said += _rare(classes)
    if model is None and not isinstance(train, ImageSet):
        raise OptionError("--model: expected a network for these examples, such as module:function, got none")
    arguments = [name, "--model", model or "mobilenet_v2"]
    if isinstance(train, ImageSet):
        step = max(1, len(train) // SAMPLED)
        side = round(median(min(train.raw(i).shape[-2:]) for i in range(0, len(train), step)))
        if side <= 160:  # a network for 224 pixels sees nothing more in images that are blown up
            size = max(32, -(-side // 32) * 32)
            arguments += ["--size", str(size), "--resize", str(size)]
            said.append(
                f"Half of them are at most {side} pixels high or wide: they are run at {size} pixels, which takes "
                f"{(size / 224) ** 2:.0%} of the time of 224."
            )
    epochs = 10 if len(train) <= 1000 else 5
    arguments += ["--epochs", str(epochs), "--betas", "0.8,0.85,0.9,0.95,1", "--seed", str(seed)]
    said.append(
        "Worth trying: a linear probe, then one beta for all activations, which costs no training (S-CT), then a beta and "
        f"a coefficient for every channel (T-CT), {epochs} epochs. Validation decides which is kept."
    )
    return Advice(said, "tune", arguments)


def _advise_texts(name: str, data: TextData, model: str, seed: int) -> Advice:
    pool, given = data.train, {"validation": data.val, "test": data.test}
    answers = Counter(example.answer for example in pool)
    words = round(median(len(f"{example.prompt} {example.answer}".split()) for example in pool))
    repeats = data.has_choices or 2 * len(answers) <= len(pool)
    kind = f"{len(answers)} answers that repeat ({_listed(answers)})" if repeats else "answers in their own words"
    said = [f"{name}: {len(pool):,} examples of about {words} words, {kind}"]
    said += _rare(answers) if repeats else []
    shares = {"train": 5, "val": 0 if given["validation"] else 2, "test": 0 if given["test"] else 3}
    limits = {"train": 200, "val": 100, "test": 300}
    sizes = {
        part: max(1, min(limits[part], len(pool) * share // sum(shares.values()))) for part, share in shares.items()
    }
    sizes |= {part: limits[part] for part, share in shares.items() if not share}
    epochs = 3 if sizes["train"] >= 150 else 6
    arguments = [name, "--model", model, "--methods", "zero-shot,lora,jola", "--epochs", str(epochs)]
    seeds = ",".join(str((seed + i) % 2**32) for i in range(3))
    arguments += ["--seeds", seeds, *(word for part, count in sizes.items() for word in (f"--{part}", str(count)))]
    said.append(
        f"Worth trying: the model as it is, LoRA, and gated edits of attention heads (JoLA), on {sizes['train']} examples "
        f"for {epochs} epochs; {sizes['val']} choose settings, {sizes['test']} test, three seeds say how steady a method is."
    )
    return Advice(said, "jola", arguments)


def _listed(counts: Any, limit: int = 6) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{text} {count}" for text, count in most[:limit]) + (", ..." if len(most) > limit else "")


def _rare(counts: Any) -> list[str]:
    rare = {text: count for text, count in counts.items() if count < FEW}
    return [f"Too few to learn from, and to be tested on: {_listed(rare)}."] if rare else []
