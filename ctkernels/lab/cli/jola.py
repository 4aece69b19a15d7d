"""``python -m ctkernels jola``: compare JoLA with other ways to adapt a language model on a few examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...cli import option_types as types
from .options import chosen_options, command_parser, grids_of

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

  # everything from packages: SmolLM2-135M, and WordNet definitions in eight classes
  python -m ctkernels jola wordnet --model smollm2-135m --methods zero-shot,lora,jola --epochs 3 --seeds 0

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
    from ..jola.wordnet import WORDNET

    return types.TEXT(text) if text == WORDNET else types.checked(find_texts)(text)


def _model(text: str) -> str:
    from ..jola.language_models import find_language_model

    return types.checked(find_language_model)(text)


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
    p.add_argument(
        "data", type=_data, help=".jsonl, .csv or .parquet file with prompt and answer; folder of such; or wordnet"
    )
    p.add_argument("--model", required=True, type=_model, help="folder, .gguf file, smollm2-135m, or a name on the hub")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    what = p.add_argument_group("comparison")
    what.add_argument(
        "--methods",
        type=types.names(list(METHODS)),
        default=",".join(DEFAULT_METHODS),
        help="with commas (default: %(default)s)",
    )
    what.add_argument("--seeds", type=types.SEEDS, default="0,1,2", help="with commas (default: %(default)s)")
    what.add_argument(
        "--grid", action="append", type=_grid, default=[], metavar="METHOD.NAME=VALUES", help="settings to try"
    )
    what.add_argument(
        "--choose-on", type=types.COUNT, default=1, help="how many of the seeds choose settings (default: %(default)s)"
    )
    what.add_argument("--train", type=types.COUNT, default=200, help="training examples (default: %(default)s)")
    what.add_argument("--val", type=types.COUNT, default=100, help="validation examples (default: %(default)s)")
    what.add_argument("--test", type=types.COUNT, default=300, help="test examples at most (default: %(default)s)")
    training = p.add_argument_group("training")
    training.add_argument("--epochs", type=types.COUNT, default=10, help="at most (default: %(default)s)")
    training.add_argument(
        "--patience", type=types.COUNT, default=2, help="epochs without progress (default: %(default)s)"
    )
    training.add_argument("--batch-size", type=types.COUNT, default=10, help="examples per step (default: %(default)s)")
    training.add_argument("--warmup", type=types.SHARE, default=0.1, help="part of the steps (default: %(default)s)")
    training.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="exponential",
        help="of the penalty on gates (default: %(default)s)",
    )
    answers = p.add_argument_group("answers")
    answers.add_argument("--separator", default=" ", help="between prompt and answer (default: a space)")
    answers.add_argument(
        "--max-length", type=types.COUNT, default=400, help="tokens of an example (default: %(default)s)"
    )
    answers.add_argument("--max-new-tokens", type=types.COUNT, default=16, help="to generate (default: %(default)s)")
    answers.add_argument("--beams", type=types.COUNT, default=1, help="of beam search (default: %(default)s)")
    answers.add_argument(
        "--extract", type=types.PATTERN, help="regular expression whose first match is the answer (default: all text)"
    )
    answers.add_argument(
        "--bertscore-model", type=types.FOLDER, help="folder of an encoder for BERTScore (default: none)"
    )
    answers.add_argument("--bertscore-layer", type=types.COUNT, help="of that encoder")
    running = p.add_argument_group("running")
    running.add_argument("--score-batch-size", type=types.COUNT, default=16, help="when scoring (default: %(default)s)")
    running.add_argument("--device", type=types.device, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    running.add_argument(
        "--out", type=types.OUT, default="out/jola", help="folder for the results (default: %(default)s)"
    )
    running.add_argument("--no-report", action="store_true", help="no picture and no report on edits")
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ..._extras import require
    from .. import _distributed, jola

    seeds, out = arguments.seeds, arguments.out
    grids = grids_of(arguments.grid, arguments.methods)
    for module in ("transformers", "peft", "accelerate", *(() if arguments.no_report else ("matplotlib",))):
        require(module, "lab", "the JoLA recipe")
    from ..jola.training import Budget
    from ..jola.wordnet import WORDNET

    answering = jola.Answering(
        separator=arguments.separator,
        max_length=arguments.max_length,
        max_new_tokens=arguments.max_new_tokens,
        beams=arguments.beams,
        extract=arguments.extract,
        batch_size=arguments.score_batch_size,
        bertscore_model=arguments.bertscore_model,
        bertscore_layer=arguments.bertscore_layer,
    )
    budget = Budget(
        epochs=arguments.epochs,
        patience=arguments.patience,
        batch_size=arguments.batch_size,
        warmup=arguments.warmup,
    )
    named = arguments.data == WORDNET and not Path(arguments.data).exists()
    data = jola.wordnet_nouns() if named else jola.read_texts(arguments.data)
    jola.draw(data, seeds[0], train=arguments.train, val=arguments.val, test=arguments.test)  # before the model loads
    model, tokenizer = jola.load_language_model(arguments.model, arguments.dtype)
    result = jola.compare_methods(
        model,
        tokenizer,
        data,
        methods=arguments.methods,
        seeds=seeds,
        train=arguments.train,
        val=arguments.val,
        test=arguments.test,
        grids=grids,
        budget=budget,
        answering=answering,
        schedule=arguments.schedule,
        choose_on=arguments.choose_on,
        out=out,
        name=arguments.model,
        device=arguments.device or _distributed.launched_device(),
        progress=not arguments.no_progress,
        extra={"command": arguments.command, "options": chosen_options(arguments)},
    )
    if _distributed.launched_rank() == 0:
        print(f"{data.source}: {arguments.train} to train, {arguments.val} to validate on")
        print(f"\n{result.tuning()}\n\n{result.table()}\n\n{result.verdict()}\n\nsaved {out / 'result.json'}")
        if result.tested("jola") and not arguments.no_report:
            tested = jola.draw(data, seeds[0], train=arguments.train, val=arguments.val, test=arguments.test).test
            for path in jola.save_report(result, model, tokenizer, [e.prompt for e in tested], out):
                print(f"saved {path}")
    return 0
