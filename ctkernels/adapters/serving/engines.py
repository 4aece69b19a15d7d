"""Runs saved models in installed runtimes, to compare their predictions of the next token."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..jola.runtimes import RUNTIMES

COUNT = 64  # number of likeliest tokens to compare


def installed(target: str) -> bool:
    """Whether a target runs in this environment."""
    module = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "xllamacpp"}[target]
    return importlib.util.find_spec(module) is not None


def next_token(target: str, path: str | os.PathLike[str], prompt: list[int], count: int) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens in vLLM (from a folder) or llama.cpp (from a GGUF file).

    The runtime runs in a subprocess: it may allocate most of the memory, or abort.

    Raises:
        ValueError: it does not run the model; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logprobs.json"
        script = str(Path(__file__).with_name({"vllm": "_vllm.py", "llama.cpp": "_llama_cpp.py"}[target]))
        command = [sys.executable, script, os.fspath(path), json.dumps(prompt), str(count), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not out.exists():
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
            raise ValueError(f"{RUNTIMES[target].name} does not run the merged model:\n{tail}")
        return {int(token): value for token, value in json.loads(out.read_text()).items()}


def error(target: str, path: str | os.PathLike[str], tokens: Tensor, logits: Tensor) -> float:
    """The largest error of a runtime's log-probabilities of the likeliest next tokens.

    Args:
        target: "vllm" or "llama.cpp".
        path: the model.
        tokens: (rows, length); the first row is the prompt.
        logits: (rows, length, vocabulary): the expected output.
    """
    expected = torch.log_softmax(logits[0, -1].double(), -1)
    actual = next_token(target, path, tokens[0].tolist(), min(COUNT, len(expected)))
    return max(abs(value - float(expected[token])) for token, value in actual.items())
