"""Subprocess that computes log-probabilities of the next token in llama.cpp. Arguments: model, prompt, count, output."""

import json
import os
import sys
from typing import Any


def main(model: str, prompt: list[int], count: int) -> dict[int, float]:
    """Log-probabilities of the `count` likeliest tokens after a prompt, with keys and values in fp32."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = max(256, len(prompt) + 8)
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = max(1, (os.cpu_count() or 2) // 2)
    parameters.warmup = False
    parameters.verbosity = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    request = {
        "prompt": prompt,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": count,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = xllamacpp.Server(parameters).handle_completions(request)
    tops = _find(answer if isinstance(answer, dict) else json.loads(answer), "top_logprobs")
    if not tops:
        raise ValueError(f"expected top_logprobs, got {answer}")
    return {entry["id"]: entry["logprob"] for entry in tops}


def _find(value: Any, key: str) -> Any:
    """The value of the first `key` in nested dicts and lists: the format of answers depends on the version."""
    if isinstance(value, dict) and key in value:
        return value[key]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((match for match in (_find(part, key) for part in parts) if match is not None), None)


if __name__ == "__main__":
    result = main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
    with open(sys.argv[4], "w", encoding="utf-8") as file:
        json.dump(result, file)
