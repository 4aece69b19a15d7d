"""A tiny random Llama with a tokenizer of words, and sentences to learn, so that every recipe runs in seconds."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers

WORDS = ("apple", "pear", "plum", "red", "blue", "green", "is", "a", "fruit", "colour")
PAIRS = [(f"{word} is a", "fruit" if i < 3 else "colour") for i, word in enumerate(WORDS[:6])]


def load() -> tuple[Any, Any]:
    """The model and its tokenizer; the same weights every time."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config), tokenizer


def prompts(copies: int = 8) -> list[dict[str, str]]:
    """Prompts and completions, as TRL has them."""
    return [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in PAIRS] * copies


def preferences(copies: int = 8) -> list[dict[str, str]]:
    """Prompts with a right and a wrong completion."""
    wrong = {"fruit": "colour", "colour": "fruit"}
    return [{"prompt": p, "chosen": f" {answer}", "rejected": f" {wrong[answer]}"} for p, answer in PAIRS] * copies


def rows(tokenizer: Any, copies: int = 8) -> list[dict[str, list[int]]]:
    """The same as tokens; all are of one length, and only answers count."""
    encoded = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in PAIRS]
    return [
        {"input_ids": p + a, "attention_mask": [1] * len(p + a), "labels": [-100] * len(p) + a} for p, a in encoded
    ] * copies
