"""JoLA, T-CT and both in peft's comparison of methods on MetaMathQA (Llama-3.2-3B, 5000 steps, one GPU).

    python examples/metamathqa/run.py predict                       # parameters and memory, in a minute and without a GPU
    python examples/metamathqa/run.py train PATH_TO_PEFT jola       # or curvature, or joint: by peft's own script

PATH_TO_PEFT is a clone of https://github.com/huggingface/peft. The settings are in `experiments/`, and `train` copies them to
peft's; its script is run as it is, in a process that knows this library's methods. Arguments after the method go to it.

That script makes one group of all parameters and has no callback: there is no penalty, so that gates stay open, heads are not
measured, and both methods of `joint` have one rate. The rates here suit that: 0.005 for JoLA's edits, 0.03 for curvature, 0.01
for both, no weight decay.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[2]))

import peft
import torch
import transformers

import ctkernels.adapters  # noqa: F401

EXPERIMENTS = Path(__file__).with_name("experiments")
NAME = "llama-3.2-3B-default"
METHODS = ("jola", "curvature", "joint")
SCRIPT = "import runpy, sys; import ctkernels.adapters; sys.argv[0] = 'run.py'; runpy.run_path('run.py', run_name='__main__')"


class Prediction(NamedTuple):
    """Numbers trained, numbers in all, and bytes.

    `states`: weights, and what is trained with its gradient and Adam's two moments.
    """

    trained: int
    total: int
    states: int


def llama() -> Any:
    """The configuration of Llama-3.2-3B."""
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )


def setting(method: str) -> Any:
    """The adapter's configuration of one of the experiments."""
    return peft.PeftConfig.from_pretrained(str(EXPERIMENTS / method / NAME))


def predict(config: Any, adapter: Any) -> Prediction:
    """Count a model with an adapter in bfloat16, from shapes alone."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        adapted = peft.get_peft_model(model, adapter)
    trained, total = adapted.get_nb_trainable_parameters()
    frozen = sum(p.numel() * p.element_size() for p in adapted.parameters() if not p.requires_grad)
    states = frozen + sum(4 * p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    return Prediction(trained, total, states)


def train(folder: Path, method: str, options: list[str]) -> int:
    """Run peft's script on one of the experiments."""
    place = folder / "method_comparison" / "MetaMathQA"
    if not (place / "run.py").is_file():
        raise SystemExit(f"PATH_TO_PEFT must be a clone of peft with method_comparison/MetaMathQA/run.py, got {folder}")
    shutil.copytree(EXPERIMENTS / method / NAME, place / "experiments" / method / NAME, dirs_exist_ok=True)
    return subprocess.call([sys.executable, "-c", SCRIPT, f"experiments/{method}/{NAME}", *options], cwd=place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("predict", help="count parameters and memory")
    runs = commands.add_parser("train", help="run peft's script")
    runs.add_argument("peft", type=Path)
    runs.add_argument("method", choices=METHODS)
    arguments, options = parser.parse_known_args()
    if arguments.command == "train":
        return train(arguments.peft, arguments.method, options)
    adapters = {"lora, rank 32": peft.LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64)}
    adapters |= {method: setting(method) for method in METHODS}
    print(f"{'Llama-3.2-3B':<14}  {'trained':>10}  {'states, GB':>10}")
    for name, adapter in adapters.items():
        prediction = predict(llama(), adapter)
        print(f"{name:<14}  {prediction.trained:>10,}  {prediction.states / 1e9:>10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
