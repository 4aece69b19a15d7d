"""Where the output of attention heads can be edited: a table of model families, and a probe for the rest.

A site is the attention output projection: its input holds the heads side by side, `(..., heads * head_dim)`. A family
is a row of `LAYOUTS`: the regular expression its sites' names end with. Head count and size are read from the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

LAYOUTS: dict[str, str] = {
    # decoders in the style of Llama
    r"self_attn\.o_proj": """
        llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2 gemma3_text phi3 phimoe cohere
        cohere2 olmo olmo2 olmoe granite granitemoe glm glm4 gpt_oss deepseek_v3 starcoder2 stablelm nemotron helium
        smollm3 exaone4 ernie4_5 seed_oss arcee""",
    # vision transformers; the second name is that of transformers 4
    r"attention\.(o_proj|output\.dense)": """
        vit deit beit dinov2 dinov2_with_registers dinov3_vit swin swinv2 vit_msn yolos data2vec-vision""",
    r"(self_attn|encoder_attn)\.out_proj": """
        opt clip siglip bart mbart pegasus blenderbot marian m2m_100 whisper xglm biogpt""",
    r"attention\.out_proj": "wav2vec2 hubert",
    r"attn\.out_proj": "gptj codegen mpt",
    r"attn\.attention\.out_proj": "gpt_neo",
    r"self_attn\.dense": "phi persimmon",
    r"attention\.dense": "gpt_neox gpt_neox_japanese albert",
    r"self_attention\.dense": "falcon bloom",
    r"attention\.output\.dense": """
        bert roberta electra deberta deberta-v2 camembert xlm-roberta ernie layoutlm esm rembert roformer""",
    r"attn\.c_proj": "gpt2 gpt_bigcode openai-gpt",
    r"(SelfAttention|EncDecAttention)\.o": "t5 mt5 umt5",
    r"(attention|attentions\.\d+)\.out_lin": "distilbert xlm flaubert",
    r"attn\.Wo": "modernbert",
    r"attention\.attn\.o": "mpnet",
}

PATTERNS: dict[str, str] = {family: pattern for pattern, row in LAYOUTS.items() for family in row.split()}

UNSUPPORTED: dict[str, str] = {
    "xlnet": "its output projection is an einsum over a raw parameter",
    "wavlm": "its attention uses the projection's weight without calling the module",
    "mamba": "it has no attention heads",
    "mamba2": "it has no attention heads",
    "fnet": "it has no attention heads",
    "rwkv": "it has no attention heads",
}

_DIM_NAMES = ("v_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head")
_COUNT_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_INPUT_PROJECTIONS = re.compile(
    r"(q|k|v|qkv|query|key|value|in|qkvz)(_proj|_lin|_proj_weight)?|query_key_value|c_attn|Wqkv|Wq|Wk|Wv|q_[ab]_proj|kv_.*"
)
_OUTPUT_NAMES = {"o_proj", "out_proj", "out_lin", "dense", "c_proj", "wo", "Wo", "o", "out", "proj", "projection"}


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(in_features, out_features)` of a linear-like module (Linear, quantised Linear, GPT-2's Conv1D), else None."""
    layer: Any = module
    if isinstance(getattr(layer, "in_features", None), int) and isinstance(getattr(layer, "out_features", None), int):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D" and isinstance(getattr(layer, "nf", None), int):
        return layer.weight.shape[0], layer.nf
    return None


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The parents of `name`, nearest first, the root last."""
    parts = name.split(".")[:-1]
    while parts:
        yield model.get_submodule(".".join(parts))
        parts.pop()
    yield model


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _declared(model: nn.Module, name: str) -> tuple[int | None, int | None]:
    """Head count and head size as the attention module declares them, else as the nearest config does."""
    count = size = None
    for level, owner in enumerate(_ancestors(model, name)):
        if level > 2:
            break
        for candidate in (owner, *owner.children()):
            if linear_shape(candidate) is None:
                count = count or _number(candidate, _COUNT_NAMES)
                size = size or _number(candidate, _DIM_NAMES)
        if count or size:
            break
    for owner in _ancestors(model, name):
        config = getattr(owner, "config", None)
        if config is not None:
            count = count or _number(config, _COUNT_NAMES)
            break
    return count, size


def head_layout(model: nn.Module, name: str, module: nn.Module, head_dim: int | None = None) -> tuple[int, int]:
    """Read `(heads, head_dim)` of the site `name`.

    Args:
        model: the model that holds the site.
        name: the site's module name in `model`.
        module: the projection itself (unwrapped).
        head_dim: overrides what the model declares.

    Raises:
        ValueError: the module is no linear projection, is never called as a module (`nn.MultiheadAttention`), is an
            input projection, or its input is not `heads * head_dim` wide (a fused layout).

    Example:
        >>> head_layout(model, "model.layers.0.self_attn.o_proj", model.model.layers[0].self_attn.o_proj)
        (32, 128)
    """
    shape = linear_shape(module)
    if shape is None:
        raise ValueError(f"{name}: expected a linear projection (Linear or Conv1D), got {type(module).__name__}")
    parent = next(_ancestors(model, name))
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name}: nn.MultiheadAttention never calls its output projection as a module, so its heads cannot be "
            "edited there; exclude it with exclude_modules"
        )
    if _INPUT_PROJECTIONS.fullmatch(name.rsplit(".", 1)[-1]):
        raise ValueError(f"{name}: expected an attention output projection, got an input projection")
    width = shape[0]
    count, size = _declared(model, name)
    if head_dim is not None:
        count, size = None, head_dim
    if size is None and count is not None and width % count == 0:
        size = width // count
    if size is None:
        raise ValueError(f"{name}: cannot read the head size from the model or its config; set head_dim in JolaConfig")
    if width % size != 0 or (count is not None and count * size != width):
        heads = "heads" if count is None else f"{count} heads"
        raise ValueError(
            f"{name}: expected an input of {heads} of size {size}, got {width} features; "
            "a fused projection cannot be edited per head (set head_dim in JolaConfig if the size is misread)"
        )
    return width // size, size


def find_sites(model: nn.Module) -> list[str]:
    """Find the attention output projections of a model without the table, by their names and shapes.

    A site is a linear module with an output-like name whose nearest attention ancestor has no other such module, and
    whose width is a whole number of heads. Use it to look at an unknown model before passing `target_modules`.

    Returns:
        module names, in the model's order; empty if nothing fits.

    Example:
        >>> find_sites(model)[:1]
        ['model.layers.0.self_attn.o_proj']
    """
    by_attention: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if linear_shape(module) is None or name.rsplit(".", 1)[-1] not in _OUTPUT_NAMES:
            continue
        attention = next((owner for owner in _ancestors(model, name) if "ttention" in type(owner).__name__), None)
        if attention is None:
            continue
        try:
            head_layout(model, name, module)
        except ValueError:
            continue
        by_attention.setdefault(id(attention), []).append(name)
    return [names[0] for names in by_attention.values() if len(names) == 1]


def default_targets(model: nn.Module) -> str | list[str]:
    """What `target_modules=None` means for `model`: the table's pattern, or the probe's names.

    Raises:
        ValueError: the family is known to have no editable projection, or the probe found none.
    """
    config = getattr(model, "config", None)
    family = str(getattr(config, "model_type", "") or "")
    if family in UNSUPPORTED:
        raise ValueError(f"model_type {family!r} cannot be edited per head: {UNSUPPORTED[family]}")
    if family in PATTERNS:
        return r"(.*\.)?" + PATTERNS[family]
    sites = find_sites(model)
    if not sites:
        raise ValueError(
            f"model_type {family!r} is not in the table of families and no attention output projection was "
            f"recognised; pass target_modules. {near_misses(model)}"
        )
    suffixes = sorted({re.split(r"\.\d+\.", name)[-1] for name in sites})
    matched = [
        name
        for name, module in model.named_modules()
        if linear_shape(module) and any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)
    ]
    return suffixes if set(matched) == set(sites) else sites


def near_misses(model: nn.Module, limit: int = 8) -> str:
    """A sentence listing the model's distinct linear module names, for error messages."""
    linear = (name for name, module in model.named_modules() if linear_shape(module) is not None)
    names = dict.fromkeys(re.sub(r"\d+", "*", name) for name in linear)
    shown = ", ".join(list(names)[:limit]) or "none"
    return f"Linear modules of this model: {shown}" + (", ..." if len(names) > limit else "")
