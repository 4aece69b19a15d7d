"""A tiny random Llama with a tokenizer of words; needs transformers and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_tokenizer(words: Sequence[str]) -> Any:
    """A token for every word, after those of ``SPECIAL``."""
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *words])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=inputs, **SPECIAL)


def tiny_llama(words: Sequence[str]) -> Any:
    """Two layers of four heads of eight numbers, with random but decided opinions."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(words) + len(SPECIAL),
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
    )
    return transformers.LlamaForCausalLM(config).eval()


def save_tiny_llama(path: Path, words: Sequence[str]) -> Path:
    """Save both in a folder; the same weights every time."""
    torch.manual_seed(0)
    tiny_llama(words).save_pretrained(path)
    word_tokenizer(words).save_pretrained(path)
    return path
