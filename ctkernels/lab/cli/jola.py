"""``python -m ctkernels jola``: compare JoLA with other ways to adapt a language model on a few examples."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from ...cli import option_types as types
from ..jola.config import Answering, MethodsConfig, TrainingConfig
from . import options

SUMMARY = """\
Adapt a language model with a few examples: JoLA beside zero-shot, LoRA, BitFit, (IA)3 and ungated head edits.

Every method gets the same examples, epochs and number of settings to try; settings are chosen on the first seed's
validation examples, the best epoch is kept, and the test examples are scored once per method and seed."""

EXAMPLES = """\
examples:
  # a file with prompt and answer in every line; validation and test examples are taken out of it
  python -m ctkernels jola questions.jsonl --model ./Llama-3.2-1B

  # with choices, the most probable answer counts: {"prompt": "...", "answer": "yes", "choices": ["yes", "no"]}
  python -m ctkernels jola folder_with_train_val_test/ --model ./model --methods zero-shot,lora,jola --seeds 0,1,2

  # generated answers: the first letter A to J is the answer
  python -m ctkernels jola exam.parquet --model ./model --extract '\\b([A-J])\\b' --max-new-tokens 16 --beams 4

  # everything from packages, in a clone of the repository: SmolLM2-135M, and WordNet definitions in eight classes
  python -m ctkernels jola examples.data:wordnet --model smollm2-135m --methods zero-shot,lora,jola --epochs 3 --seeds 0

  # other settings to try
  python -m ctkernels jola questions.csv --model ./model --grid lora.rank=4,16 --grid jola.lr=0.005,0.01,0.02

  # four processes share each step; cut short, the same command goes on where it was
  torchrun --nproc-per-node 4 -m ctkernels jola questions.jsonl --model ./model --batch-size 16

  # trials on the machines of a Ray cluster (pip install "ctkernels[ray]"; ray start on each)
  python -m ctkernels jola questions.jsonl --model ./model --ray auto

results:
  OUT/result.json   every run, the table with mean and deviation over seeds, the settings that were tried
  OUT/weights/      what each tested run trained
  OUT/gates.png     JoLA's gates by layer and head over training
  OUT/edits.txt     the heads that act most, and the test prompts on which they do"""


def _data(text: str) -> str:
    from ..jola.texts import find_texts

    return types.checked(find_texts)(text)


def _model(text: str) -> str:
    from ..jola.language_models import find_language_model

    return types.checked(find_language_model)(text)


def _loggers(text: str) -> list[str]:
    from ..._extras import require

    require("transformers", "lab", "a logger of the Trainer")
    from ..jola.training import check_loggers

    names = types.TEXT(text).split(",")
    types.checked(lambda _: check_loggers(names))(text)
    return names


def parser() -> argparse.ArgumentParser:
    from ..jola.compare import DEFAULT_METHODS
    from ..jola.language_models import DTYPES
    from ..jola.methods import METHODS, find_method

    p = options.command_parser("jola", SUMMARY, EXAMPLES)
    p.add_argument(
        "data",
        type=_data,
        help=".jsonl, .csv or .parquet file, folder of such, datasets:NAME, or factory module:function",
    )
    p.add_argument("--model", required=True, type=_model, help="folder, .gguf file, smollm2-135m, or a name on the hub")
    options.option(p, "--dtype", types.choice(*DTYPES), "float32", "of the weights")
    comparison = p.add_argument_group("comparison")
    options.option(comparison, "--methods", types.names(list(METHODS)), ",".join(DEFAULT_METHODS), "with commas")
    options.option(comparison, "--seeds", types.SEEDS, "0,1,2", "with commas")
    options.add_grid(comparison, find_method)
    options.add_fields(comparison, MethodsConfig, "choose_on", "train", "val", "test")
    training = p.add_argument_group("training")
    options.add_fields(training, TrainingConfig, "epochs", "patience", "batch_size", "warmup")
    options.add_fields(training, MethodsConfig, "schedule")
    answers = p.add_argument_group("answers")
    answers.add_argument("--separator", default=" ", help="between prompt and answer (default: a space)")
    options.add_fields(answers, Answering, "max_length", "max_new_tokens", "beams", "extract")
    answers.add_argument(
        "--bertscore-model", type=types.FOLDER, help="folder of an encoder for BERTScore (default: none)"
    )
    answers.add_argument("--bertscore-layer", type=types.COUNT, help="of that encoder")
    running = p.add_argument_group("running")
    options.option(running, "--score-batch-size", types.COUNT, Answering.batch_size, "when scoring")
    options.add_device(running)
    options.add_results(running, "out/jola")
    options.add_executor(running)
    running.add_argument(
        "--report-to",
        type=_loggers,
        default=[],
        help="loggers of transformers' Trainer with commas, such as tensorboard, which writes to OUT/logs (default: none)",
    )
    running.add_argument("--no-report", action="store_true", help="do not plot gates, and no report on edits")
    return p


def _loaded(name: str, dtype: str) -> Any:
    """The model alone, for machines that load it by name."""
    from ..jola import load_language_model

    return load_language_model(name, dtype)[0]


def run(arguments: argparse.Namespace) -> int:
    from ..._extras import require
    from .. import _distributed, jola

    out = arguments.out
    grids = options.grids_of(arguments.grid, arguments.methods)
    for module in ("transformers", "peft", "accelerate", *(() if arguments.no_report else ("matplotlib",))):
        require(module, "lab", "comparing methods on texts")
    config = options.config_of(
        MethodsConfig,
        arguments,
        answering=options.config_of(Answering, arguments, batch_size=arguments.score_batch_size),
        name=arguments.model,
        device=arguments.device or (_distributed.launched_device() if arguments.ray is None else None),
    )
    executor = options.executor_of(arguments)
    sizes: dict[str, Any] = {"train": config.train, "val": config.val, "test": config.test}
    data = jola.read_texts(arguments.data)
    tested = jola.draw(data, arguments.seeds[0], **sizes).test  # before the model loads
    model, tokenizer = jola.load_language_model(arguments.model, arguments.dtype)
    result = jola.compare_methods(
        model if arguments.ray is None else partial(_loaded, arguments.model, arguments.dtype),
        tokenizer,
        data,
        config,
        methods=arguments.methods,
        seeds=arguments.seeds,
        grids=grids,
        out=out,
        executor=executor,
        extra=options.record_of(arguments),
    )
    if _distributed.launched_rank() == 0:
        print(f"{data.source}: {config.train} to train, {config.val} to validate on")
        print(f"\n{result.tuning()}\n\n{result.table()}\n\n{result.verdict()}\n\nsaved {out / 'result.json'}")
        if result.tested("jola") and not arguments.no_report:
            for path in jola.save_report(result, model, tokenizer, [e.prompt for e in tested], out):
                print(f"saved {path}")
    return 0
