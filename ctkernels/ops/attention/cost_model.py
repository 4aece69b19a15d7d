"""Cost model that chooses between fused attention and torch's attention with a separate edit.

time = max(flops / (peak * share), bytes / bandwidth) of the attention, plus the memory passes of a separate edit. Peaks and
bandwidths come from data sheets. Each kernel's share of the peak, in inference and over a training step's forward and backward,
was measured on an H100 (``python -m benchmarks --device cuda --attention``, the run in benchmarks/results/h100.json), except:
FlashAttention-3 (about its paper's figures, arXiv 2407.08608); torch's math attention in 16 bits; A100 (FlashAttention-2 about
as in its paper for long sequences, arXiv 2307.08691; the others guessed from that); B200 (taken from H100, except that kernels
with pre-Hopper tensor instructions are no faster there); FlashAttention-4 (cuDNN's on H100; on B200 1.2 and 1.05 times cuDNN's,
where its announcement has up to 1.3); flex_attention (0.9 and 0.85 of FlashAttention-2's: guessed).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, eager
from ..autograd import in_transform
from .providers import FLASH4, FLEX, PROVIDERS, Call
from .reference import UNBOUNDED

FUSED, SEPARATE = "fused", "separate"
IMPLEMENTATIONS = (FUSED, SEPARATE, *PROVIDERS)
LAUNCH = 4e-6  # seconds per additional kernel
PACKED_MASK = 5e-4  # seconds to make flex_attention's mask of packed sequences, mostly the host's: guessed


class Peak(NamedTuple):
    """Dense bf16 flop/s, bytes/s, and each attention's share of the peak as (inference, training): ``half`` in 16 bits,
    ``single`` in float32, whose peak is a sixth (three tf32 products each)."""

    flops: float
    bandwidth: float
    half: dict[str, tuple[float, float]]
    single: dict[str, tuple[float, float]]


_SINGLE = {"fused": (0.19, 0.12), "efficient": (0.27, 0.23), "math": (0.064, 0.10)}
_H100 = {
    "fused": (0.31, 0.15),
    "cudnn": (0.56, 0.50),
    "flash": (0.30, 0.27),
    "efficient": (0.24, 0.28),
    "math": (0.03, 0.03),
    FLASH4: (0.56, 0.50),
    FLEX: (0.27, 0.23),
}
_A100 = {
    "fused": (0.60, 0.33),
    "flash": (0.70, 0.60),
    "efficient": (0.40, 0.40),
    "math": (0.05, 0.05),
    FLEX: (0.63, 0.51),
}
_B200 = _H100 | {"flash": (0.13, 0.12), "efficient": (0.11, 0.12), FLASH4: (0.67, 0.525), FLEX: (0.12, 0.10)}
PEAKS = {
    8: Peak(312e12, 2.039e12, _A100, _SINGLE),
    9: Peak(989e12, 3.35e12, _H100 | {"flash3": (0.70, 0.60)}, _SINGLE),
    10: Peak(2250e12, 8e12, _B200, _SINGLE),
}


class Shape(NamedTuple):
    """The features of a call that determine its cost."""

    batch: int
    heads: int
    groups: int
    tokens: int
    keys: int
    head_dim: int
    value_dim: int
    itemsize: int
    causal: bool
    training: bool
    window: int | None = None  # keys that a query sees
    packed: bool = False


class Estimate(NamedTuple):
    implementation: str
    seconds: float
    attention: str


def shape_of(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, training: bool, batch: int | None = None) -> Shape:
    """``batch``: the number of sequences in a packed q (T, H, D); None if q is not packed."""
    if batch is not None:
        tokens, keys, count = math.ceil(q.shape[0] / max(batch, 1)), math.ceil(k.shape[0] / max(batch, 1)), batch
    else:
        count, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    causal, window = right == 0 and tokens > 1, None
    if left != UNBOUNDED:
        window, causal = min(keys, left + 1 + (0 if right == UNBOUNDED else right)), False
    sizes = (count, q.shape[1], k.shape[1], tokens, keys, q.shape[-1], v.shape[-1])
    return Shape(*sizes, q.element_size(), causal, training, window, batch is not None)


def seconds(peak: Peak, shape: Shape, attention: str) -> float:
    """Predicted time of a call: forward, plus backward in training. Torch's attention does not skip keys outside the window."""
    skips = attention == FUSED or attention in PROVIDERS
    keys = shape.window if skips and shape.window is not None else shape.keys
    work = 2.0 * shape.batch * shape.heads * shape.tokens * keys * (shape.head_dim + shape.value_dim)
    work *= (0.5 if shape.causal else 1.0) * (3.5 if shape.training else 1.0)
    shares, unit = (peak.half, 1.0) if shape.itemsize == 2 else (peak.single, 1 / 6)
    rate = peak.flops * unit * shares[attention][shape.training]
    rows = shape.batch * shape.tokens * shape.heads * shape.itemsize
    cached = shape.batch * keys * shape.groups * (shape.head_dim + shape.value_dim) * shape.itemsize
    moved = rows * (shape.head_dim + shape.value_dim) + cached
    time = max(work / rate, moved / peak.bandwidth) + LAUNCH
    if attention != FUSED:  # the edit's passes: read and write z; in training also z, dy and dz of its backward
        time += rows * shape.value_dim * (5 if shape.training else 2) / peak.bandwidth
        time += LAUNCH * (2 if shape.training else 1)
    if attention == FLEX and shape.packed:
        time += PACKED_MASK
    return time


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str:
    """The kernel that scaled_dot_product_attention would use on a CUDA device, as torch itself reports it."""
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(q, k, v, mask, 0.0, causal, q.shape[1] != k.shape[1])
    if (
        cuda.cudnn_sdp_enabled()
        and cuda.can_use_cudnn_attention(params)
        and torch.cuda.get_device_capability(q.device)[0] >= 9
    ):
        return "cudnn"
    if cuda.flash_sdp_enabled() and cuda.can_use_flash_attention(params):
        active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
        return "flash3" if active == "FA3" else "flash"
    if cuda.mem_efficient_sdp_enabled() and cuda.can_use_efficient_attention(params):
        return "efficient"
    return "math"


def fused_refusal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
    """Why the fused kernels cannot serve a call, or None."""
    reason = backends.BACKENDS["triton"].refusal(q)
    if reason is not None:
        return reason
    if q.dtype == torch.float64:
        return "the kernels use tensor cores: float32, bfloat16 and float16, got float64"
    if q.shape[-1] > 256 or v.shape[-1] > 256:
        return f"heads of at most 256 values, got {max(q.shape[-1], v.shape[-1])}"
    if not scale > 0:
        return f"scale must be positive, got {scale}"
    if in_transform():
        return "torch.func transforms and forward-mode derivatives go through torch's attention"
    return None


def estimates(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    left: int,
    right: int,
    training: bool,
    batch: int | None = None,
    scale: float = 1.0,
) -> list[Estimate]:
    """Predicted times of the implementations that can serve a call on q's CUDA device, the fastest one first."""
    shape, peak = shape_of(q, k, v, left, right, training, batch), _peak(q)
    shares = peak.half if shape.itemsize == 2 else peak.single
    masked = _masked(q, k, mask, left, right, batch)
    kernel = "efficient" if masked else torch_attention(q, k, v, None, right == 0 and shape.tokens > 1)
    if masked:
        separate = seconds(peak, shape._replace(causal=False), kernel)
    else:
        separate = seconds(peak, shape, kernel if kernel in shares else "math")
    found = [Estimate(SEPARATE, separate, kernel)]
    if fused_refusal(q, k, v, mask, scale) is None:
        found.insert(0, Estimate(FUSED, seconds(peak, shape, FUSED), FUSED))
    call = Call(q, k, v, mask, left, right, batch is not None)
    for name, provider in PROVIDERS.items():
        if name in shares and provider.refusal(call) is None:
            found.append(Estimate(name, seconds(peak, shape, name), name))
    return sorted(found, key=lambda e: e.seconds)


def _peak(q: Tensor) -> Peak:
    return PEAKS[max((m for m in PEAKS if m <= torch.cuda.get_device_capability(q.device)[0]), default=8)]


def _masked(q: Tensor, k: Tensor, mask: Tensor | None, left: int, right: int, batch: int | None) -> bool:
    """Whether torch's attention needs an explicit mask: also for a window, unaligned lengths and packed sequences."""
    if mask is not None or left != UNBOUNDED or batch is not None:
        return True
    return right == 0 and q.shape[2] not in (1, k.shape[2])


def _slow_in_torch(q: Tensor, k: Tensor, mask: Tensor | None, left: int, right: int, batch: int | None) -> bool:
    """Whether torch lacks a fast kernel for a call: with a mask, a single query, or grouped heads in float32."""
    if _masked(q, k, mask, left, right, batch) or q.shape[2] == 1:
        return True
    return q.dtype == torch.float32 and q.shape[1] != k.shape[1]


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    left: int,
    right: int,
    training: bool,
    batch: int | None,
    forced: str | None,
) -> str:
    """One of IMPLEMENTATIONS. RuntimeError if a forced choice, by argument or ``use_backend``, cannot serve the call."""
    backend = backends.forced()
    if backend is not None and backend != "triton":
        backends.check_forced_backend(q)
    requested = forced or {None: None, "triton": FUSED}.get(backend, SEPARATE)
    if requested == SEPARATE:
        return SEPARATE
    if requested is not None:
        reason = _refusal(requested, Call(q, k, v, mask, left, right, batch is not None), scale)
        if reason is not None:
            what = "the fused kernels were" if requested == FUSED else f"{requested} was"
            raise RuntimeError(f"attention_head_edit: {what} forced but cannot serve this call: {reason}")
        return requested
    if torch.version.hip:  # peaks and shares are NVIDIA's
        return SEPARATE
    if torch.compiler.is_compiling():  # sizes may be symbolic, and torch's kernel queries cannot be traced
        slow = _slow_in_torch(q, k, mask, left, right, batch)
        return FUSED if slow and fused_refusal(q, k, v, mask, scale) is None else SEPARATE
    if not q.is_cuda:
        return SEPARATE
    return estimates(q, k, v, mask, left, right, training, batch, scale)[0].implementation


def _refusal(name: str, call: Call, scale: float) -> str | None:
    """Why an implementation other than SEPARATE cannot serve a call, or None."""
    if name == FUSED:
        return fused_refusal(call.q, call.k, call.v, call.mask, scale)
    return PROVIDERS[name].refusal(call)


def explain(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, training: bool = True) -> str:
    """Says which implementation would serve causal attention of q (B, H, T, D), with predicted times."""
    k = q if k is None else k
    v = k if v is None else v
    lines = [
        f"attention_head_edit on {str(q.dtype).removeprefix('torch.')} queries of shape {tuple(q.shape)} and keys of shape "
        f"{tuple(k.shape)} on {q.device}, causal, {'with' if training else 'without'} gradients"
    ]
    call = Call(q, k, v, None, UNBOUNDED, 0, False)
    forced = backends.forced()
    chosen = choose(q, k, v, None, 1.0, UNBOUNDED, 0, training, None, None)
    notes = {FUSED: "triton kernels, the edit in their epilogue", SEPARATE: "torch's attention, then the edit"}
    notes |= {name: provider.note for name, provider in PROVIDERS.items()}
    times = {}
    if q.is_cuda and not torch.version.hip:
        times = {e.implementation: e for e in estimates(q, k, v, None, UNBOUNDED, 0, training)}
    for name in IMPLEMENTATIONS:
        text = ("forced: " if forced else "") + "used" if name == chosen else "not used"
        if name in times:
            text += f", {times[name].seconds * 1e6:.0f} us predicted ({times[name].attention})"
        if name != SEPARATE and (reason := _refusal(name, call, 1.0)) is not None:
            text = reason
        lines.append(f"  {name:<10} {text}  [{notes[name]}]")
    if q.is_cpu and forced is None and eager.MISSING is None:
        lines.append("  eager calls: compiled code checks the arguments and edits torch's result, in the common case")
    return "\n".join(lines)
