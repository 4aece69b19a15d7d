"""GGUF files of tiny models, as a converter would write them, as base files for `save_gguf`."""

from __future__ import annotations

import os
from typing import Any

import torch

PLAIN_ROPE = {"qwen2", "qwen3", "gemma", "gemma2", "phi3"}  # queries and keys have transformers' order in the file


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key weight in the order of llama.cpp's rotary embedding for Llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write(model: Any, path: str | os.PathLike[str], kind: str = "F32") -> None:
    """Write a causal language model with an artificial vocabulary; `kind` is the storage type of its matrices."""
    import gguf

    config = model.config
    family = config.model_type
    arch = "llama" if family == "mistral" else family
    writer = gguf.GGUFWriter(str(path), arch)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 1e4))))
    writer.add_vocab_size(config.vocab_size)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    _vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH_NAMES_INVERSE[arch]
        if hasattr(gguf, "MODEL_ARCH_NAMES_INVERSE")
        else next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch),
        config.num_hidden_layers,
    )
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = value.detach().float()
        if family not in PLAIN_ROPE and (".q_proj." in name or ".k_proj." in name):
            stored = _interleaved(stored, heads if ".q_proj." in name else kv_heads)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            stored = stored + 1
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        quantised = stored.dim() == 2 and kind != "F32" and "embed" not in name and "lm_head" not in name
        dtype = gguf.GGMLQuantizationType[kind if quantised else "F32"]
        writer.add_tensor(new, gguf.quants.quantize(stored.numpy(), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(writer: Any, count: int) -> None:
    import gguf

    special = ["<unk>", "<s>", "</s>"]
    words = [f"▁w{number}" for number in range(count - len(special))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + words)
    writer.add_token_scores([0.0] * 3 + [-float(number) for number in range(len(words))])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
