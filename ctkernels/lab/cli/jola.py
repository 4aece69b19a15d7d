"""``python -m ctkernels jola``: compare JoLA with other ways to adapt a language model on a few examples."""

from __future__ import annotations

import argparse

from ...cli import option_types as types
from .options import command_parser, config_of, grids_of, option, record_of

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


def _grid(text: str) -> tuple[str, str, list[float]]:
    from ..jola.methods import METHODS

    name, setting, values = types.GRID(text)
    types.names(list(METHODS))(name)
    types.checked(lambda _: METHODS[name].settings({setting: values}))(text)
    return name, setting, values


def parser() -> argparse.ArgumentParser:
    from ..jola.compare import DEFAULT_METHODS, SCHEDULES
    from ..jola.language_models import DTYPES
    from ..jola.methods import METHODS

    p = command_parser("jola", SUMMARY, EXAMPLES)
    p.add_argument("data", type=_data, help=".jsonl, .csv or .parquet file, folder of such, or factory module:function")
    p.add_argument("--model", required=True, type=_model, help="folder, .gguf file, smollm2-135m, or a name on the hub")
    option(p, "--dtype", tuple(DTYPES), "float32", "of the weights")
    what = p.add_argument_group("comparison")
    option(what, "--methods", types.names(list(METHODS)), ",".join(DEFAULT_METHODS), "with commas")
    option(what, "--seeds", types.SEEDS, "0,1,2", "with commas")
    what.add_argument(
        "--grid", action="append", type=_grid, default=[], metavar="METHOD.NAME=VALUES", help="settings to try"
    )
    option(what, "--choose-on", types.COUNT, 1, "how many of the seeds choose settings")
    option(what, "--train", types.COUNT, 200, "training examples")
    option(what, "--val", types.COUNT, 100, "validation examples")
    option(what, "--test", types.COUNT, 300, "test examples at most")
    training = p.add_argument_group("training")
    option(training, "--epochs", types.COUNT, 10, "at most")
    option(training, "--patience", types.COUNT, 2, "epochs without progress")
    option(training, "--batch-size", types.COUNT, 10, "examples per step")
    option(training, "--warmup", types.SHARE, 0.1, "part of the steps")
    option(training, "--schedule", SCHEDULES, "exponential", "of the penalty on gates")
    answers = p.add_argument_group("answers")
    answers.add_argument("--separator", default=" ", help="between prompt and answer (default: a space)")
    option(answers, "--max-length", types.COUNT, 400, "tokens of an example")
    option(answers, "--max-new-tokens", types.COUNT, 16, "to generate")
    option(answers, "--beams", types.COUNT, 1, "of beam search")
    answers.add_argument(
        "--extract", type=types.PATTERN, help="regular expression whose first match is the answer (default: all text)"
    )
    answers.add_argument(
        "--bertscore-model", type=types.FOLDER, help="folder of an encoder for BERTScore (default: none)"
    )
    answers.add_argument("--bertscore-layer", type=types.COUNT, help="of that encoder")
    running = p.add_argument_group("running")
    option(running, "--score-batch-size", types.COUNT, 16, "when scoring")
    running.add_argument("--device", type=types.device, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    option(running, "--out", types.OUT, "out/jola", "folder for the results")
    running.add_argument(
        "--report-to",
        type=_loggers,
        default=[],
        help="loggers of transformers' Trainer with commas, such as tensorboard, which writes to OUT/logs (default: none)",
    )
    running.add_argument("--no-report", action="store_true", help="do not plot gates, and no report on edits")
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ..._extras import require
    from .. import _distributed, jola

    seeds, out = arguments.seeds, arguments.out
    grids = grids_of(arguments.grid, arguments.methods)
    for module in ("transformers", "peft", "accelerate", *(() if arguments.no_report else ("matplotlib",))):
        require(module, "lab", "comparing methods on texts")
    from ..jola.training import TrainingConfig

    answering = config_of(jola.Answering, arguments, batch_size=arguments.score_batch_size)
    training = config_of(TrainingConfig, arguments)
    sizes = {"train": arguments.train, "val": arguments.val, "test": arguments.test}
    data = jola.read_texts(arguments.data)
    jola.draw(data, seeds[0], **sizes)  # before the model loads
    model, tokenizer = jola.load_language_model(arguments.model, arguments.dtype)
    result = jola.compare_methods(
        model,
        tokenizer,
        data,
        methods=arguments.methods,
        seeds=seeds,
        **sizes,
        grids=grids,
        training=training,
        answering=answering,
        schedule=arguments.schedule,
        choose_on=arguments.choose_on,
        out=out,
        name=arguments.model,
        device=arguments.device or _distributed.launched_device(),
        progress=not arguments.no_progress,
        report_to=arguments.report_to,
        extra=record_of(arguments),
    )
    if _distributed.launched_rank() == 0:
        print(f"{data.source}: {arguments.train} to train, {arguments.val} to validate on")
        print(f"\n{result.tuning()}\n\n{result.table()}\n\n{result.verdict()}\n\nsaved {out / 'result.json'}")
        if result.tested("jola") and not arguments.no_report:
            tested = jola.draw(data, seeds[0], **sizes).test
            for path in jola.save_report(result, model, tokenizer, [e.prompt for e in tested], out):
                print(f"saved {path}")
    return 0
