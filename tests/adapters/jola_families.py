"""Tiny random models of every family in the table, with inputs for one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

VOCAB = 64
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
HEAD = {"head_dim": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 0,
}

SPEECH = SMALL | {
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}


@dataclass(frozen=True)
class Family:
    """How to build a family: head model ("causal", "seq2seq", "plain"), config values, sites to expect, input kind."""

    head: str
    values: dict[str, Any]
    sites: int = 2
    kind: str = "tokens"
    biased: bool = False
    model_class: str = ""


def _llama(*parts: dict[str, Any], sites: int = 2, biased: bool = False, **values: Any) -> Family:
    merged = dict(SMALL)
    for part in parts:
        merged |= part
    return Family("causal", merged | values, sites=sites, biased=biased)


FAMILIES: dict[str, Family] = {
    "llama": _llama(),
    "mistral": _llama(HEAD),
    "mixtral": _llama(MOE),
    "qwen2": _llama(),
    "qwen2_moe": _llama(MOE, shared_expert_intermediate_size=16),
    "qwen3": _llama(HEAD),
    "qwen3_moe": _llama(MOE, HEAD),
    "gemma": _llama(HEAD),
    "gemma2": _llama(HEAD),
    "gemma3_text": _llama(HEAD),
    "phi3": _llama(),
    "phimoe": _llama(MOE),
    "cohere": _llama(),
    "cohere2": _llama(),
    "olmo": _llama(),
    "olmo2": _llama(),
    "granite": _llama(),
    "glm": _llama(HEAD),
    "glm4": _llama(HEAD),
    "gpt_oss": _llama(MOE, HEAD, biased=True),
    "deepseek_v3": _llama(
        MOE,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "qwen3_next": _llama(
        MOE,
        HEAD,
        sites=1,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
    ),
    "nemotron": _llama(),
    "olmoe": _llama(MOE),
    "granitemoe": _llama(MOE),
    "helium": _llama(HEAD),
    "arcee": _llama(),
    "ernie4_5": _llama(HEAD),
    "exaone4": _llama(layer_types=["sliding_attention", "full_attention"]),
    "seed_oss": _llama(HEAD),
    "starcoder2": _llama(biased=True),
    "stablelm": _llama(),
    "smollm3": _llama(),
    "phi": _llama(biased=True),
    "persimmon": _llama(biased=True),
    "gpt_neox": _llama(biased=True),
    "falcon": _llama(alibi=False, new_decoder_architecture=False),
    "bloom": Family("causal", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}, biased=True),
    "gpt2": Family("causal", GPT, biased=True),
    "gpt_bigcode": Family("causal", GPT, biased=True),
    "openai-gpt": Family("causal", GPT, biased=True),
    "gpt_neox_japanese": _llama(),
    "gptj": Family("causal", GPT | {"rotary_dim": 4}),
    "codegen": Family("causal", GPT | {"rotary_dim": 4, "n_ctx": 64}),
    "gpt_neo": Family(
        "causal",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        biased=True,
    ),
    "mpt": Family("causal", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "max_seq_len": 64}),
    "opt": Family(
        "causal",
        SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 32},
        biased=True,
    ),
    "bart": Family("seq2seq", SEQ2SEQ, sites=6, kind="seq2seq", biased=True),
    "mbart": Family("seq2seq", SEQ2SEQ, sites=6, kind="seq2seq", biased=True),
    "pegasus": Family("seq2seq", SEQ2SEQ, sites=6, kind="seq2seq", biased=True),
    "blenderbot": Family("seq2seq", SEQ2SEQ, sites=6, kind="seq2seq", biased=True),
    "marian": Family("seq2seq", SEQ2SEQ, sites=6, kind="seq2seq", biased=True),
    "m2m_100": Family("seq2seq", SEQ2SEQ, sites=6, kind="seq2seq", biased=True),
    "xglm": Family(
        "causal",
        {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 32, "vocab_size": VOCAB},
        biased=True,
    ),
    "biogpt": Family("causal", SMALL, biased=True),
    "whisper": Family(
        "seq2seq",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        sites=6,
        kind="audio",
        biased=True,
        model_class="WhisperForConditionalGeneration",
    ),
    "t5": Family("seq2seq", T5, sites=6, kind="seq2seq"),
    "mt5": Family("seq2seq", T5, sites=6, kind="seq2seq"),
    "umt5": Family("seq2seq", T5, sites=6, kind="seq2seq"),
    "bert": Family("plain", SMALL, biased=True),
    "camembert": Family("plain", SMALL, biased=True),
    "xlm-roberta": Family("plain", SMALL, biased=True),
    "ernie": Family("plain", SMALL, biased=True),
    "layoutlm": Family("plain", SMALL, biased=True),
    "esm": Family("plain", SMALL | {"mask_token_id": 3}, biased=True),
    "rembert": Family("plain", SMALL, biased=True),
    "roformer": Family("plain", SMALL | {"embedding_size": 32}, biased=True),
    "deberta": Family("plain", SMALL, biased=True),
    "roberta": Family("plain", SMALL, biased=True),
    "electra": Family("plain", SMALL | {"embedding_size": 32}, biased=True),
    "deberta-v2": Family("plain", SMALL, biased=True),
    "albert": Family("plain", SMALL | {"embedding_size": 16}, sites=1, biased=True),
    "distilbert": Family(
        "plain",
        {"dim": 32, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 64},
        biased=True,
    ),
    "xlm": Family("plain", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB}, biased=True),
    "flaubert": Family("plain", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB}, biased=True),
    "modernbert": Family("plain", SMALL | {"cls_token_id": 1, "sep_token_id": 2, "reference_compile": False}),
    "mpnet": Family("plain", SMALL, biased=True),
    "vit": Family("plain", VISION, kind="image", biased=True),
    "deit": Family("plain", VISION, kind="image", biased=True),
    "beit": Family("plain", VISION, kind="image", biased=True),
    "dinov2": Family("plain", VISION, kind="image", biased=True),
    "dinov2_with_registers": Family("plain", VISION, kind="image", biased=True),
    "vit_msn": Family("plain", VISION, kind="image", biased=True),
    "yolos": Family("plain", VISION | {"image_size": [16, 16]}, kind="image", biased=True),
    "data2vec-vision": Family("plain", VISION, kind="image", biased=True),
    "swinv2": Family("plain", WINDOWS, kind="image", biased=True),
    "dinov3_vit": Family("plain", VISION, kind="image", biased=True),
    "swin": Family("plain", WINDOWS, kind="image", biased=True),
    "clip": Family(
        "plain",
        {"text_config": SMALL | {"eos_token_id": 2}, "vision_config": VISION, "projection_dim": 16},
        sites=4,
        kind="both",
        biased=True,
    ),
    "siglip": Family(
        "plain",
        {"text_config": SMALL | {"projection_size": 32}, "vision_config": VISION},
        sites=4,
        kind="both",
        biased=True,
    ),
    "wav2vec2": Family("plain", SPEECH, kind="wave", biased=True),
    "hubert": Family("plain", SPEECH, kind="wave", biased=True),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A tiny random model of the family, in eval."""
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **family.values)
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "plain": transformers.AutoModel,
    }[family.head]
    model = getattr(transformers, family.model_class)(config) if family.model_class else auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # tiny inits would hide errors
            if parameter.dim() == 2 and parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def inputs(name: str, batch: int = 2) -> dict[str, torch.Tensor]:
    """Inputs of one forward pass."""
    torch.manual_seed(1)
    tokens = torch.randint(3, VOCAB, (batch, 6))
    kind = FAMILIES[name].kind
    if kind == "tokens":
        return {"input_ids": tokens}
    if kind == "seq2seq":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    if kind == "image":
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    if kind == "both":
        return {"input_ids": tokens, "pixel_values": torch.randn(batch, 3, 16, 16)}
    if kind == "audio":
        return {"input_features": torch.randn(batch, 8, 16), "decoder_input_ids": tokens[:, :4]}
    return {"input_values": torch.randn(batch, 400)}


def output(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The main output of a forward pass as one tensor."""
    with torch.no_grad():
        result = model(**values)
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(result, key, None) is not None:
            return getattr(result, key)
    return result[0]
