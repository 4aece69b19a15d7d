"""The biases that each runtime reads, by model family: where a merged model can store additive edits."""

from __future__ import annotations

from typing import NamedTuple

# The targets of `save_merged`.
TARGETS = ("transformers", "vllm", "llama.cpp")

# For families (config.model_type) that a runtime implements: which biases it reads, of the attention's output and value
# projections, out of those that transformers can have. transformers itself is queried instead of listed. State of vLLM
# 0.32 (its transformers backend reads what transformers does) and llama.cpp of October 2026.
BOTH, VALUE, NONE = ("output", "value"), ("value",), ()
READS: dict[str, dict[str, tuple[str, ...]]] = {
    "arcee": {"vllm": BOTH, "llama.cpp": VALUE},
    "cohere": {"vllm": NONE, "llama.cpp": VALUE},
    "cohere2": {"vllm": NONE, "llama.cpp": VALUE},
    "gemma": {"vllm": NONE, "llama.cpp": VALUE},
    "gemma2": {"vllm": BOTH, "llama.cpp": VALUE},
    "gemma3_text": {"vllm": BOTH, "llama.cpp": VALUE},
    "glm4": {"vllm": VALUE, "llama.cpp": VALUE},
    "granite": {"vllm": BOTH, "llama.cpp": BOTH},
    "llama": {"vllm": BOTH, "llama.cpp": BOTH},
    "mistral": {"vllm": NONE, "llama.cpp": BOTH},
    "nemotron": {"vllm": BOTH, "llama.cpp": BOTH},
    "olmo": {"vllm": BOTH, "llama.cpp": VALUE},
    "olmo2": {"vllm": BOTH, "llama.cpp": VALUE},
    "qwen2": {"vllm": VALUE, "llama.cpp": VALUE},
    "qwen2_moe": {"vllm": VALUE, "llama.cpp": VALUE},
    "qwen3": {"vllm": VALUE, "llama.cpp": VALUE},
    "qwen3_moe": {"vllm": VALUE, "llama.cpp": VALUE},
    "seed_oss": {"vllm": BOTH, "llama.cpp": VALUE},
    "smollm3": {"vllm": BOTH, "llama.cpp": VALUE},
    "stablelm": {"vllm": VALUE, "llama.cpp": VALUE},
}

# Families that can be saved as another one with the same layers and with biases.
REHOMES = {"mistral": "llama", "qwen2": "llama"}


class Runtime(NamedTuple):
    """A runtime's name in messages, and its behaviour for a bias that it does not read."""

    name: str
    unread: str


RUNTIMES = {
    "transformers": Runtime("transformers", "skips it"),
    "vllm": Runtime("vLLM", "builds that projection without a bias and skips the one in the file without a word"),
    "llama.cpp": Runtime("llama.cpp", "refuses the file, as it has more tensors than it knows"),
}


def listed(family: str) -> tuple[str, ...]:
    """The targets known to serve a family: transformers, and those in the table."""
    return ("transformers", *READS.get(family, {}))


def reads(family: str, target: str, projection: str) -> bool | None:
    """Whether a target reads the bias of attention's "output" or "value" projection, or an "mlp"'s last; None if unknown."""
    if target == "transformers":
        return True
    if projection == "mlp":
        return None
    biases = READS.get(family, {}).get(target)
    return None if biases is None else projection in biases


def losses(family: str, projection: str = "output") -> list[str]:
    """Warnings about a merged model of `family` with new biases, one for each runtime that may ignore them."""
    if projection == "mlp":
        return [
            f"Nothing is known of {RUNTIMES[target].name} and biases of MLPs (model_type {family!r}): compare its outputs before "
            "you serve this merged model with it."
            for target in READS.get(family, {})
        ]
    return [
        f"{RUNTIMES[target].name} {RUNTIMES[target].unread} (model_type {family!r}): do not serve this merged model with "
        f"it. save_merged(target={target!r}) finds another way or says why there is none."
        for target in READS.get(family, {})
        if reads(family, target, projection) is False
    ]
