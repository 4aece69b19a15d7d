"""What runtimes other than transformers are known to do to merged models: which part they lose, and the way out."""

from __future__ import annotations

from typing import NamedTuple


class Loss(NamedTuple):
    """What happens to the bias of the attention output projection, in which the additive edits are."""

    effect: str
    way_out: str


_DROPS = (
    "builds the attention output projection without a bias and skips the one in the file: the additive edits are lost"
)
_REFUSES = "refuses the file, as it has more tensors than it knows"
_PLAIN = "train with edit='multiplicative', or serve the model with transformers"

# family (config.model_type) -> runtime -> what is lost. A family or runtime that is not here: nothing is known against it.
BIAS_LOSSES: dict[str, dict[str, Loss]] = {
    "qwen3": {"vLLM": Loss(_DROPS, _PLAIN), "llama.cpp": Loss(_REFUSES, _PLAIN)},
    "qwen3_moe": {"vLLM": Loss(_DROPS, _PLAIN)},
    "gemma": {"vLLM": Loss(_DROPS, _PLAIN)},
    "cohere": {"vLLM": Loss(_DROPS, _PLAIN)},
}


# What `save_merged` takes as its target, and what the table calls it.
TARGETS = {"transformers": "transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp"}


def losses(family: str, target: str | None = None) -> list[str]:
    """Sentences about a merged model of `family` whose output projections got a bias, one for each runtime.

    target: a name in TARGETS, to hear of that runtime alone.
    """
    return [
        f"{runtime} {loss.effect} (model_type {family!r}). Do not serve this merged model with {runtime}: {loss.way_out}."
        for runtime, loss in BIAS_LOSSES.get(family, {}).items()
        if target is None or TARGETS[target] == runtime
    ]
