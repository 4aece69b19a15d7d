"""Replacements for the hub models of peft's tests: the same architectures and names, tiny, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_VOCAB = 100
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_GPT = {"vocab_size": _VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
_GPT |= {"bos_token_id": 98, "eos_token_id": 98, "pad_token_id": 98}
_OPT = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
_BART = {
    "vocab_size": _VOCAB,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "forced_eos_token_id": None,
}
_T5 = {"vocab_size": _VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 3}
_T5 |= {"num_heads": 4, "decoder_start_token_id": 0}

# name: (configuration class, model class, values)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTConfig",
        "OPTForCausalLM",
        _OPT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJConfig", "GPTJForCausalLM", _GPT | {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _GROUPED | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5Config",
        "T5ForConditionalGeneration",
        _T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartConfig",
        "BartForConditionalGeneration",
        _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertConfig", "BertModel", _SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaConfig", "RobertaModel", _SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaConfig", "DebertaModel", _SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Config", "DebertaV2Model", _SIZES),
}


def make(folder: Path) -> None:
    """Write the missing models to `folder`, at relative paths equal to their hub names."""
    import transformers

    for name, (config, model_class, values) in MODELS.items():
        if (folder / name / "config.json").exists():
            continue
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config)(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:  # with the usual small initialisation, outputs would hardly differ
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
