"""What users of a GPU would run instead, from cuDNN and other packages: each with its calls, or with the reason why it is absent.

A function returns (calls by name, reasons by name). In a rehearsal on a CPU those that need a GPU are absent.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctkernels.ops.attention import providers
from ctkernels.ops.attention.providers import Call
from ctkernels.ops.attention.reference import UNBOUNDED

Found = tuple[dict[str, Callable[..., Tensor]], dict[str, str]]
REHEARSAL = "needs a GPU, and this is a rehearsal on a CPU"


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _absent(distribution: str, dry: bool) -> str | None:
    """Why a package cannot be measured, or None."""
    if version(distribution) is None:
        return f"{distribution} is not installed"
    return f"{distribution} {version(distribution)} {REHEARSAL}" if dry else None


def liger(dry: bool) -> Found:
    """Liger's gated products of gate and up. On a CPU they do not run: they are Triton kernels."""
    why = _absent("liger-kernel", dry)
    if why is not None:
        return {}, {"Liger": why}
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {"Liger, SwiGLU": LigerSiLUMulFunction.apply, "Liger, GEGLU": LigerGELUMulFunction.apply}, {}


def quack(dry: bool, weight: Tensor) -> Found:
    """quack's projection to gate and up, the halves of ``weight``, with SwiGLU in its epilogue. It has no gated product alone."""
    why = _absent("quack-kernels", dry)
    if why is None and weight.dtype == torch.float32:
        why = "quack's matrix products are in 16 bits"
    if why is None and torch.cuda.get_device_capability(weight.device)[0] < 9:
        why = "quack's matrix products are for compute capability 9 and later"
    if why is not None:
        return {}, {"quack": why}
    from quack.linear import linear_gated_func

    def swiglu(x: Tensor) -> Tensor:
        projected: Tensor = linear_gated_func(x, weight, "swiglu", store_preact=False, tuned=False, concat_layout=True)[
            1
        ]
        return projected

    return {"quack, SwiGLU": swiglu}, {}


def cudnn(dry: bool, weight: Tensor, bias: Tensor) -> Found:
    """cuDNN's convolutions of 3 x 3 with bias and ReLU, and with a sum before the ReLU."""
    names = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")
    if dry:
        return {}, dict.fromkeys(names, REHEARSAL)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    relu, add_relu = (getattr(torch.ops.aten, name) for name in names)
    calls = (lambda x: relu(x, weight, bias, *geometry), lambda x, z: add_relu(x, weight, z, 1.0, bias, *geometry))
    return dict(zip(names, calls)), {}


def attention(dry: bool, q: Tensor, window: int | None, starts: Tensor | None) -> Found:
    """Causal flex_attention and FlashAttention-4, of q (B, H, T, D), or with ``starts`` of packed (T, H, D)."""
    left, size = UNBOUNDED if window is None else window - 1, q.shape[0] if starts is not None else q.shape[2]
    packed = None
    if starts is not None:
        longest = int(starts.diff().max())
        packed = providers.Packed(starts, starts, longest, longest)
    calls: dict[str, Callable[..., Tensor]] = {"flex_attention": flex(dry, size, left, packed, q.device)}
    why = _absent("flash-attn-4", dry)
    if why is None:
        why = providers.PROVIDERS[providers.FLASH4].refusal(Call(q, q, q, None, left, 0, packed is not None))
    if why is not None:
        return calls, {"FlashAttention-4": why}

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = Call(q, k, v, None, left, 0, packed is not None)
        return providers.PROVIDERS[providers.FLASH4].attend(call, q.shape[-1] ** -0.5, packed)

    return calls | {"FlashAttention-4": flash}, {}


def flex(dry: bool, size: int, left: int, packed: Any, on: torch.device) -> Callable[..., Tensor]:
    """flex_attention with its mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rule = providers.visible(left, 0, 0) if packed is None else providers.packed_rule(packed, size, size, left, 0)
    mask = create_block_mask(rule, None, None, size, size, device=on)
    attend: Any = flex_attention if dry else torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if packed is None:
            return attend(q, k, v, block_mask=mask)
        return attend(*(t.transpose(0, 1)[None] for t in (q, k, v)), block_mask=mask)[0].transpose(0, 1)

    return call
