"""Subprocess that computes log-probabilities of the next token in vLLM. Arguments: model, prompt, count, output."""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main(model: str, prompt: list[int], count: int) -> dict[int, float]:
    """Log-probabilities of the `count` likeliest tokens after a prompt, in the dtype of the model's file."""
    from vllm import LLM, SamplingParams

    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    engine = LLM(
        model,
        dtype=config.get("dtype") or config.get("torch_dtype") or "auto",  # "auto" turns float32 into half precision
        max_model_len=len(prompt) + 2,
        max_num_seqs=1,
        max_logprobs=count,
        enforce_eager=True,
        skip_tokenizer_init=True,
        gpu_memory_utilization=float(os.environ.get("CTKERNELS_VLLM_MEMORY", "0.9")),
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=count, detokenize=False)
    (result,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return {token: entry.logprob for token, entry in result.outputs[0].logprobs[0].items()}


if __name__ == "__main__":
    result = main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
    with open(sys.argv[4], "w", encoding="utf-8") as file:
        json.dump(result, file)
