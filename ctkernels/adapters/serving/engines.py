"""The runtimes themselves, where they are installed: what they say comes next after a prompt."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..._extras import require

COUNT = 64  # likeliest tokens whose log-probabilities are compared


def installed(target: str) -> bool:
    """Whether a target runs in this environment."""
    module = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "xllamacpp"}[target]
    return importlib.util.find_spec(module) is not None


def vllm(folder: str | os.PathLike[str], prompt: list[int], count: int) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens by vLLM, in a process of its own.

    Raises:
        ValueError: vLLM does not load the model; the message ends as its output does.
    """
    with tempfile.TemporaryDirectory() as room:
        out = Path(room) / "logprobs.json"
        script = str(Path(__file__).with_name("_vllm.py"))
        command = [sys.executable, script, os.fspath(folder), json.dumps(prompt), str(count), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not out.exists():
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
            raise ValueError(f"vLLM does not run the merged model:\n{tail}")
        return {int(token): value for token, value in json.loads(out.read_text()).items()}


def llama_cpp(path: str | os.PathLike[str], prompt: list[int], count: int) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens by llama.cpp, from a GGUF file; keys and values are kept in fp32.

    Raises:
        ValueError: llama.cpp does not load the file.
        ImportError: xllamacpp is missing.
    """
    xllamacpp = require("xllamacpp", "serving", "llama.cpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = os.fspath(path)
    parameters.n_ctx = max(64, len(prompt) + 8)
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    try:
        server: Any = xllamacpp.Server(parameters)
    except Exception as error:
        raise ValueError(f"llama.cpp does not load the merged model {path}: {error}") from error
    request = {
        "prompt": prompt,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": count,
        "cache_prompt": False,
    }
    answer = server.handle_completions(request)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}


def distance(found: dict[int, float], logits: torch.Tensor) -> float:
    """How far log-probabilities of tokens are off those of (vocabulary,) logits."""
    expected = torch.log_softmax(logits.double(), -1)
    return max(abs(value - float(expected[token])) for token, value in found.items())
