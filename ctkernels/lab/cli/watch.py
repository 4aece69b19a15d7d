"""``python -m ctkernels watch``: a live page of the edits of an adapter on the texts that come in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...cli import option_types as types
from ...cli.errors import OptionError
from . import options

SUMMARY = """\
Serve a page on this machine that shows how much each edited head does, by layer and head, on the texts that come in: those
of a file or of standard input, and those typed on the page. Stop it with Ctrl-C.

In a process of your own that serves a model, ctkernels.lab.live.watch does the same for what it serves."""

EXAMPLES = """\
examples:
  # type texts on the page
  python -m ctkernels watch --model ./Llama-3.2-1B --adapter adapters/law

  # calibrate on prompts like those of training first; the reference is saved in the adapter's folder, and read from then on
  python -m ctkernels watch --model ./Llama-3.2-1B --adapter adapters/law --calibrate law.jsonl

  # a text in every line of a log
  tail -f prompts.txt | python -m ctkernels watch - --model ./Llama-3.2-1B --adapter adapters/law"""

BATCH = 8  # prompts of a calibration
TEXTS = types.Kind("a file with a text in every line, or -", str, lambda text: text == "-" or Path(text).is_file())


def _data(text: str) -> str:
    from ..jola.texts import find_texts

    return types.checked(find_texts)(text)


def parser() -> argparse.ArgumentParser:
    from ..jola.language_models import DTYPES, find_language_model

    p = options.command_parser("watch", SUMMARY, EXAMPLES)
    p.add_argument(
        "texts", nargs="?", type=TEXTS, help="file with a text in every line, - for standard input (default: none)"
    )
    p.add_argument(
        "--model",
        required=True,
        type=types.checked(find_language_model),
        help="folder, .gguf file, smollm2-135m, or a name on the hub",
    )
    p.add_argument("--adapter", required=True, type=types.FOLDER, help="folder of a JoLA adapter, as peft saves it")
    options.option(p, "--dtype", types.choice(*DTYPES), "float32", "of the weights")
    p.add_argument("--calibrate", type=_data, help="prompts like those of training, as the data of the command jola")
    options.option(p, "--window", types.COUNT, 64, "inputs that drift is measured over, with --calibrate")
    serving = p.add_argument_group("serving")
    options.option(serving, "--host", types.TEXT, "127.0.0.1", "address to serve on")
    options.option(serving, "--port", types.whole(0, 65535), 8321, "0 takes a free one")
    options.option(serving, "--history", types.COUNT, 20, "texts that are shown")
    options.add_device(serving)
    return p


def run(arguments: argparse.Namespace) -> int:
    from ..._extras import require

    for module in ("transformers", "peft", "jinja2", "matplotlib"):
        require(module, "lab", "the live page")
    from ...adapters import EditMonitor
    from ...adapters.monitor.monitor import FILE
    from .. import jola
    from .._weights import load_adapter
    from ..jola.scoring import padded_batches, tail_inputs
    from ..live import watch

    prompts = [e.prompt for e in jola.read_texts(arguments.calibrate).train] if arguments.calibrate else []
    if prompts and len(prompts) < 2 * arguments.window:
        raise OptionError(
            f"--calibrate: drift over windows of {arguments.window} needs {2 * arguments.window} prompts, got {len(prompts)}; "
            "give more, or a smaller --window"
        )
    folder = Path(arguments.adapter)
    model, tokenizer = jola.load_language_model(arguments.model, arguments.dtype)
    adapted: Any = load_adapter(model, folder, "--adapter")
    if arguments.device is not None:
        adapted.to(arguments.device)
    device = next(adapted.parameters()).device
    monitor = EditMonitor(adapted, every=1, history=arguments.history, window=arguments.window)
    file = folder / FILE

    def batches() -> Iterator[dict[str, Any]]:
        rows = sorted((list(tokenizer(prompt)["input_ids"]) for prompt in prompts), key=len)
        for _, ids, mask in padded_batches(rows, tokenizer.pad_token_id, BATCH, device):
            yield tail_inputs(adapted, ids, mask, 1)

    if prompts:
        monitor.calibrate(batches())
        monitor.save(file)
        print(f"calibrated on {len(prompts)} prompts, saved {file}")
    elif file.exists():
        monitor.load(file)
    with watch(monitor, tokenizer, arguments.host, arguments.port) as server:
        print(f"watching on {server.url}", flush=True)
        if arguments.texts is not None:
            lines = (
                sys.stdin if arguments.texts == "-" else Path(arguments.texts).read_text(encoding="utf-8").splitlines()
            )
            for line in lines:
                if line.strip():
                    server.report.read(line.strip())
        server.wait()
    return 0
