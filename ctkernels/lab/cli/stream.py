"""``python -m ctkernels stream``: tasks one after the other, an adapter for each, and a router between them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...cli import option_types as types
from ...cli.errors import OptionError
from ..jola.config import Answering, MethodsConfig, TrainingConfig
from . import options

SUMMARY = """\
Learn tasks in the order in which they arrive, each with an adapter of its own, and show that none is forgotten.

A regression suite holds outputs of all earlier tasks bitwise against those right after training. One adapter that is trained
on all tasks in turn shows what would be forgotten, and a router that knows the prompts alone chooses an adapter for each."""

EXAMPLES = """\
examples:
  # files with prompt and answer in every line
  python -m ctkernels stream law=law.jsonl tax=tax.jsonl --model ./Llama-3.2-1B

  # everything from packages, in a clone of the repository
  python -m ctkernels stream examples.data:wordnet examples.data:fortunes examples.data:tweets --model smollm2-135m \\
      --train 100 --val 50 --test 100 --epochs 2 --grid lr=0.02 --grid gate_lr=0.5

  # one more task has arrived: those before are not trained again
  python -m ctkernels stream law=law.jsonl tax=tax.jsonl trade=trade.jsonl --model ./Llama-3.2-1B

results:
  OUT/result.json          scores, changed outputs, what the router found
  OUT/TASK/                the runs of each task, as the command jola leaves them
  OUT/adapters/TASK/       each adapter, as peft and an AdapterPool load it, and the reference of an EditMonitor for it
  OUT/router.safetensors   what the router learned"""


def _task(text: str) -> tuple[str, str]:
    """``NAME=DATA``, or DATA, which is called as its file or function is."""
    from ..jola.texts import find_texts

    name, equals, source = text.partition("=")
    if not equals:
        function = text.rpartition(":")[2]
        name, source = Path(text).stem if Path(text).exists() else function, text
    return name, types.checked(find_texts)(source)


def _grid(text: str) -> tuple[str, list[float]]:
    try:
        _, name, values = types.GRID.read(f"any.{text}")
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE,VALUE with finite numbers, got {text!r}") from None
    return name, values


def parser() -> argparse.ArgumentParser:
    from ..jola.language_models import DTYPES, find_language_model
    from ..jola.methods import METHODS

    p = options.command_parser("stream", SUMMARY, EXAMPLES)
    p.add_argument(
        "tasks", nargs="+", type=_task, help="[NAME=]DATA in the order of arrival; data as of the command jola"
    )
    p.add_argument(
        "--model",
        required=True,
        type=types.checked(find_language_model),
        help="folder, .gguf file, smollm2-135m, or a name on the hub",
    )
    options.option(p, "--dtype", types.choice(*DTYPES), "float32", "of the weights")
    learning = p.add_argument_group("learning")
    trained = [name for name, method in METHODS.items() if method.attach is not None]
    options.option(learning, "--method", types.choice(*trained), "jola", "how adapters are made")
    learning.add_argument(
        "--grid", action="append", type=_grid, default=[], metavar="NAME=VALUES", help="settings to try"
    )
    options.option(learning, "--seed", types.SEED, 0, "of examples, training and gates")
    options.add_fields(learning, MethodsConfig, "train", "val", "test")
    options.option(learning, "--suite", types.COUNT, 20, "test examples of each task in the regression suite")
    options.add_fields(learning, TrainingConfig, "epochs", "patience", "batch_size", "warmup")
    options.add_fields(learning, MethodsConfig, "schedule")
    answers = p.add_argument_group("answers")
    answers.add_argument("--separator", default=" ", help="between prompt and answer (default: a space)")
    options.add_fields(answers, Answering, "max_length", "max_new_tokens", "beams", "extract")
    running = p.add_argument_group("running")
    options.option(running, "--score-batch-size", types.COUNT, Answering.batch_size, "when scoring")
    options.add_device(running)
    options.add_results(running, "out/stream")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ..._extras import require
    from .. import jola
    from ..streaming import stream

    for module in ("transformers", "peft", "accelerate"):
        require(module, "lab", "a stream of tasks")
    names = [name for name, _ in arguments.tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"tasks must have different names, got {twice[0]} more than once; name them: NAME=DATA")
    config = options.config_of(
        MethodsConfig,
        arguments,
        answering=options.config_of(Answering, arguments, batch_size=arguments.score_batch_size),
        name=arguments.model,
    )
    tasks = {name: jola.read_texts(source) for name, source in arguments.tasks}
    for data in tasks.values():  # before the model loads
        jola.draw(data, arguments.seed, train=config.train, val=config.val, test=config.test)
    model, tokenizer = jola.load_language_model(arguments.model, arguments.dtype)
    result = stream(
        model,
        tokenizer,
        tasks,
        config,
        method=arguments.method,
        seed=arguments.seed,
        suite=arguments.suite,
        grid=dict(arguments.grid) or None,
        out=arguments.out,
        extra=options.record_of(arguments),
    )
    print(f"{result.table()}\n\n{result.verdict()}\n\nsaved {arguments.out / 'result.json'}")
    return 0
