"""Attention kernels outside of torch's ``scaled_dot_product_attention``, before an edit of its own: FlashAttention-4, and torch's
flex_attention for windows and packed sequences. Each says why it cannot serve a call; its package is imported when it is chosen.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autograd import in_transform
from .problem import Packed
from .reference import UNBOUNDED

FLASH4, FLEX = "flash4", "flex"


class Call(NamedTuple):
    """Attention of q (B, H, T, D), k (B, G, S, D) and v (B, G, S, E); packed: (T, H, D), (S, G, D) and (S, G, E)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    left: int
    right: int
    packed: bool


class Provider(NamedTuple):
    """``refusal``: why it cannot serve a call, or None. ``attend``: the attention of a call with this scale of the scores; a
    query that sees no key gives 0."""

    note: str
    refusal: Callable[[Call], str | None]
    attend: Callable[[Call, float, Packed | None], Tensor]


def _why_not(call: Call) -> str | None:
    """Why no provider serves a call, or None."""
    if call.q.device.type != "cuda" or torch.version.hip:
        return f"serves NVIDIA GPUs, got a tensor on {call.q.device.type}"
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"serves bfloat16 and float16, got {str(call.q.dtype).removeprefix('torch.')}"
    if call.mask is not None:
        return "serves no attn_mask"
    if in_transform():
        return "torch.func transforms and forward-mode derivatives go through torch's attention"
    if torch.compiler.is_compiling():
        return "a compiled program chooses between the fused kernels and torch's attention"
    return None


# ---- FlashAttention-4 --------------------------------------------------------------------------------------------------


@cache
def _flash4_version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def _flash4_refusal(call: Call) -> str | None:
    if _flash4_version() is None:
        return "flash-attn-4 is not installed"
    reason = _why_not(call)
    if reason is not None:
        return reason
    major = torch.cuda.get_device_capability(call.q.device)[0]
    if major not in (9, 10):
        return f"chosen on compute capability 9 and 10, got {major}"
    dim, size = call.q.shape[-1], call.v.shape[-1]
    within = 8 <= dim <= 256 and 8 <= size <= 256 if major == 9 else 8 <= dim <= 128 and 8 <= size <= 128
    if not (within or (major == 10 and (dim, size) in ((192, 128), (256, 256)))) or dim % 8 or size % 8:
        return f"does not have kernels for heads of {dim} and {size} values on compute capability {major}"
    return None


def _flash4(call: Call, scale: float, packed: Packed | None) -> Tensor:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    causal = call.right == 0 and call.left == UNBOUNDED
    window = (None, None) if causal else tuple(None if n == UNBOUNDED else n for n in (call.left, call.right))
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "window_size": window}
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if packed is None:
        found = flash_attn_func(*(t.transpose(1, 2) for t in (call.q, call.k, call.v)), **options)
        return _first(found).transpose(1, 2)
    lengths = {"cu_seqlens_q": packed.starts_q, "cu_seqlens_k": packed.starts_k}
    longest = {"max_seqlen_q": packed.longest_q, "max_seqlen_k": packed.longest_k}
    return _first(flash_attn_varlen_func(call.q, call.k, call.v, **lengths, **longest, **options))


def _first(found: Any) -> Tensor:
    """The output, of (output, log of the sum of exponentials)."""
    return found[0] if isinstance(found, tuple) else found


# ---- flex_attention ----------------------------------------------------------------------------------------------------


def _flex_refusal(call: Call) -> str | None:
    reason = backends.BACKENDS["triton"].missing or _why_not(call)
    if reason is not None:
        return reason
    if not call.packed and call.left == UNBOUNDED:
        return "for windows and packed sequences; torch's other kernels serve the rest"
    sizes = {call.q.shape[-1], call.v.shape[-1]}
    if not sizes <= {16, 32, 64, 128, 256}:
        return f"chosen for heads of 16, 32, 64, 128 or 256 values, got {', '.join(map(str, sorted(sizes)))}"
    return None


def visible(left: int, right: int, shift: Any, sequences: tuple[Tensor, Tensor] | None = None) -> Callable[..., Tensor]:
    """The rule of visibility for flex_attention: query i is at position i + ``shift``, a number or a tensor by query. With
    ``sequences``, those of queries and keys, keys of the query's own sequence are seen."""

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = j - i - (shift[i] if isinstance(shift, Tensor) else shift)
        seen = distance == distance
        if right != UNBOUNDED:
            seen = seen & (distance <= right)
        if left != UNBOUNDED:
            seen = seen & (distance >= -left)
        return seen if sequences is None else seen & (sequences[0][i] == sequences[1][j])

    return rule


@cache
def _compiled(name: str) -> Any:
    from torch.nn.attention import flex_attention

    return torch.compile(getattr(flex_attention, name))


@lru_cache(maxsize=64)
def _window_mask(tokens: int, keys: int, left: int, right: int, device: torch.device) -> Any:
    make = _compiled("create_block_mask")
    return make(visible(left, right, keys - tokens), None, None, tokens, keys, device=device)


def packed_rule(packed: Packed, tokens: int, keys: int, left: int, right: int) -> Callable[..., Tensor]:
    """:func:`visible` for sequences one after the other, of ``tokens`` queries and ``keys`` keys."""
    sequences, starts = [], (packed.starts_q, packed.starts_k)
    for boundaries, total in zip(starts, (tokens, keys)):
        at = torch.arange(total, device=boundaries.device, dtype=boundaries.dtype)
        sequences.append(torch.searchsorted(boundaries, at, right=True) - 1)
    # from a query's place in the packed queries to its position among the packed keys
    shift = (packed.starts_k[1:] - packed.starts_q[1:])[sequences[0]]
    return visible(left, right, shift, (sequences[0], sequences[1]))


def _flex(call: Call, scale: float, packed: Packed | None) -> Tensor:
    attend = _compiled("flex_attention")
    options = {"scale": scale, "enable_gqa": call.q.shape[1] != call.k.shape[1]}
    if packed is None:
        mask = _window_mask(call.q.shape[2], call.k.shape[2], call.left, call.right, call.q.device)
        return attend(call.q, call.k, call.v, block_mask=mask, **options)
    tokens, keys = call.q.shape[0], call.k.shape[0]
    rule = packed_rule(packed, tokens, keys, call.left, call.right)
    mask = _compiled("create_block_mask")(rule, None, None, tokens, keys, device=call.q.device)
    q, k, v = (t.transpose(0, 1)[None] for t in (call.q, call.k, call.v))
    return attend(q, k, v, block_mask=mask, **options)[0].transpose(0, 1)


PROVIDERS = {
    FLASH4: Provider("FlashAttention-4 (flash-attn-4), then the edit", _flash4_refusal, _flash4),
    FLEX: Provider("torch's flex_attention, then the edit", _flex_refusal, _flex),
}


def serve(name: str, call: Call, scale: float, packed: Packed | None) -> Tensor:
    """The attention of a call by a provider, whose second derivatives are an error: their own code would leave them out."""
    z = PROVIDERS[name].attend(call, scale, packed)
    if z.requires_grad:
        z.register_hook(_refuse_second_order)
    return z


def _refuse_second_order(_: Tensor) -> None:
    if torch.is_grad_enabled():  # with create_graph=True
        raise RuntimeError(
            "attention_head_edit: FlashAttention-4 and flex_attention have no second derivatives; pass implementation='fused', "
            "or use_backend('reference')"
        )
