"""JoLA inside transformers' attention: the attention kernel applies the edit, without another pass over its output.

The attention function is registered with transformers' `AttentionInterface`, together with the mask function of `sdpa`:
without one, transformers builds no mask, and padding is attended to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..._marks import ATTENTION_FUSION
from ...functional import attention_head_edit
from .calls import CallRecorder, current_call
from .layer import JolaLayer
from .model import jola_layers

NAME = "sdpa_head_edit"

# Families that use the interface and pass the attention output to the projection unchanged; each is tested.
_NAMES = """
    albert arcee bart beit bert biogpt blenderbot camembert clip codegen cohere cohere2 deepseek_v3 deit dinov2
    dinov2_with_registers dinov3_vit distilbert electra ernie ernie4_5 esm exaone4 gemma gemma3_text glm glm4 gpt2
    gpt_bigcode gpt_neox gptj granite granitemoe helium hubert layoutlm llama m2m_100 marian mbart mistral mixtral
    modernbert nemotron olmo olmo2 olmoe opt pegasus persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta
    seed_oss siglip smollm3 stablelm starcoder2 swin vit vit_msn wav2vec2 whisper xlm-roberta yolos
"""
FAMILIES = frozenset(_NAMES.split())

# arguments that only transformers' own function supports
_FOREIGN = ("position_bias", "cache", "softcap", "s_aux", "output_attentions")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the edit of the block's JoLA layer, or transformers' `sdpa`, for `AttentionInterface`."""
    call = current_call()
    edit = None if call is None else call.layer.single_edit(query.shape[1], value.shape[-1])
    foreign = any(kwargs.get(name) is not None and kwargs[name] is not False for name in _FOREIGN)
    if call is None or edit is None or dropout or foreign:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    tokens, keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is not None:  # a preallocated cache can be longer than its content
        attention_mask = attention_mask[..., :keys]
    causal = tokens > 1 and attention_mask is None and is_causal
    if causal and keys > tokens:  # a preallocated cache without a mask: only its first `tokens` keys are filled
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    y = attention_head_edit(
        query, key, value, *edit, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=True
    )
    call.edited = True
    return y.transpose(1, 2).contiguous(), None


class FusedAttention:
    """Handle of :func:`fuse_attention`. `sites`: the projections whose edit is now applied by the attention.

    The model, or a copy of it, refers to its handle: unloading the JoLA layers removes the fusion.
    """

    def __init__(self, model: Any, owners: list[tuple[JolaLayer, nn.Module]]):
        self._model = model
        model.__dict__[ATTENTION_FUSION] = self
        self._recorders = [CallRecorder(owner, layer) for layer, owner in owners]
        self.sites = [layer.site for layer, _ in owners]

    def remove(self) -> None:
        """Restore transformers' `sdpa`; the projections apply the edits again."""
        if self._model.__dict__.get(ATTENTION_FUSION) is not self:
            return
        del self._model.__dict__[ATTENTION_FUSION]
        for recorder in self._recorders:
            recorder.stop()
        if self._model.config._attn_implementation == NAME:
            self._model.set_attn_implementation("sdpa")


def fuse_attention(model: nn.Module) -> FusedAttention:
    """Apply JoLA edits inside a model's attention (:func:`ctkernels.functional.attention_head_edit`).

    Results, gradients, caches, saved adapters and merging stay the same. A call that cannot be fused (several active
    adapters, one adapter per row, gates sampled per row, attention dropout, a monitor on the projection) applies the
    edit in the projection as before. Not the default, because it sets the model's attention implementation.

    Args:
        model: a model with JoLA layers, from `peft.get_peft_model` or bare, whose attention implementation is "sdpa".

    Returns:
        a handle with `.sites` and `.remove()`; unloading the adapters removes it too.

    Raises:
        ValueError: the model has no JoLA layer, its family is not in the table or does not use `AttentionInterface` in the
            installed transformers, or its attention implementation is not "sdpa". The model is unchanged.

    Examples:
        >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
        >>> handle = ctkernels.adapters.fuse_attention(model)
        >>> handle.remove()
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    if not any(layer.edits == "head" for layer in jola_layers(model)):
        raise ValueError("fuse_attention: expected a model with JoLA layers that edit heads, got none")
    base: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    family = getattr(getattr(base, "config", None), "model_type", None)
    if family not in FAMILIES:
        raise ValueError(
            f"fuse_attention: model_type must be one of {', '.join(sorted(FAMILIES))}, whose attention output is "
            f"known to reach the projection unchanged; got {family!r}"
        )
    implementations = {str(module.config._attn_implementation) for module in _pretrained(base)}
    if implementations != {"sdpa"}:
        raise ValueError(f'fuse_attention: the attention implementation must be "sdpa", got {sorted(implementations)}')
    owners = list(_owners(base))
    for _, owner in owners:
        if not _asks_interface(owner):
            raise ValueError(
                f"fuse_attention: expected attention that transformers' AttentionInterface provides; "
                f"{type(owner).__name__} of this version of transformers brings its own"
            )
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(NAME)
    return FusedAttention(base, owners)


def _pretrained(base: nn.Module) -> Iterator[Any]:
    from transformers import PreTrainedModel

    return (module for module in base.modules() if isinstance(module, PreTrainedModel))


def _asks_interface(owner: nn.Module) -> bool:
    """Whether the forward of ``owner`` or of a module in it uses transformers' table of attention functions."""
    codes = (getattr(inspect.unwrap(type(module).forward), "__code__", None) for module in owner.modules())
    return any(code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def _owners(base: nn.Module) -> Iterator[tuple[JolaLayer, nn.Module]]:
    """Each JoLA layer with its attention block, the nearest module around it with "att" in its name."""
    for name, module in base.named_modules():
        if isinstance(module, JolaLayer) and module.edits == "head":
            parts = name.split(".")[:-1]
            while parts and not re.search(r"att", parts[-1], re.IGNORECASE):
                parts.pop()
            if not parts:
                raise ValueError(f"fuse_attention: no attention module around {name}")
            yield module, base.get_submodule(".".join(parts))
