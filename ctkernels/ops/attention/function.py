"""``ctkernels.functional.attention_head_edit``: argument checks, and the choice of an implementation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, eager
from .cost_model import FUSED, IMPLEMENTATIONS, choose
from .edit import apply
from .op import run
from .problem import Edits, Packed, Problem, keep_for
from .providers import PROVIDERS, Call, serve
from .reference import UNBOUNDED
from .sdpa import attend, attend_packed

OP = "attention_head_edit"
_EAGER = eager.entry(OP)


def attention_head_edit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor | None = None,
    a: Tensor | None = None,
    g_m: Tensor | None = None,
    g_a: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | tuple[int, int] | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Attention with a gated affine edit of every head's output, fused: (1 + g_m * m) * softmax(scale q k^T) v + g_a * a.

    Equals ``scaled_dot_product_attention`` followed by :func:`head_edit`. On a GPU the edit runs in the epilogue of the
    attention kernel, and its gradients in passes that attention's backward makes anyway.

    The last query is aligned with the last key (FlashAttention's convention): with T queries and S keys, query i is at
    position i + S - T, as in decoding with a cache. torch aligns the first query with the first key; the two differ only
    if T != S with ``is_causal`` or ``window``. A query that sees no key gives 0 before the edit.

    Args:
        q: (B, H, T, D), float32, float64, bfloat16 or float16; any strides. Packed: (total queries, H, D).
        k, v: (B, G, S, D) and (B, G, S, E), of q's dtype; E may differ from D. Packed: (total keys, G, D or E).
        m, a: (H, E): the multiplicative and the additive edit; one of them may be None. Kept if float32 or wider, else widened.
        g_m, g_a: (H,): gates of ``m`` and ``a``; None is 1.
        attn_mask: broadcastable to (B, H, T, S): booleans, True where a key takes part (a padding mask is (B, 1, 1, S)), or
            floats added to the scores. Combines with ``is_causal`` and ``window``. Gets no gradient.
        is_causal: queries see no keys after their own position.
        scale: of the scores; None is 1 / sqrt(D).
        enable_gqa: allow G < H if G divides H: each run of H / G query heads shares a key and value head.
        window: queries see ``window`` positions up to and including their own and, unless ``is_causal``, as many onwards.
        cu_seqlens: (B + 1,) int32 or int64, starting with 0: boundaries of the sequences in packed q, k and v; a pair if
            queries and keys differ. Excludes ``attn_mask``.
        max_seqlen: the length of the longest sequence, or a pair; None reads it from ``cu_seqlens``, which synchronises with
            the GPU and cannot be compiled.
        implementation: ``"fused"``; or attention, then the edit (in place without gradients): ``"separate"``, torch's own;
            ``"flash4"``, FlashAttention-4, if the package flash-attn-4 is installed; ``"flex"``, torch's flex_attention, which
            compiles in its first calls. None lets a cost model choose; ``ctkernels.explain(q, "attention_head_edit")`` shows
            its choice.

    Returns:
        (B, H, T, E), or packed (total queries, H, E), of q's dtype. Differentiable in q, k, v, m, a, g_m and g_a. Second
        derivatives: of the fused kernels through plain torch, of torch's attention where torch has them, of the others none
        (``use_backend("reference")`` has them everywhere).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.
        RuntimeError: for an ``implementation`` that cannot serve the call; the message says why.

    Examples:
        >>> q, k, v = torch.randn(3, 2, 4, 16, 8)  # 2 sequences, 4 heads, 16 tokens, 8 numbers per head
        >>> m, a, gates = torch.randn(4, 8), torch.randn(4, 8), torch.ones(4)
        >>> z = ctkernels.functional.attention_head_edit(q, k, v, m, a, gates, gates, is_causal=True)
        >>> k, v = k[:, :2], v[:, :2]  # two query heads share a key and value head
        >>> keep = torch.arange(16) < torch.tensor([[16], [12]])  # the second sequence is shorter
        >>> z = ctkernels.functional.attention_head_edit(q, k, v, m, a, attn_mask=keep[:, None, None, :], enable_gqa=True)

    Source: FlashAttention-2, arXiv 2307.08691; the edit is equation 2 of the JoLA paper.
    """
    usual = window is None and cu_seqlens is None and max_seqlen is None and implementation is None
    if usual and not torch.compiler.is_compiling():
        y = _EAGER(F.scaled_dot_product_attention, q, k, v, m, a, g_m, g_a, attn_mask, is_causal, scale, enable_gqa)
        if y is None:
            scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
            return attend(q, k, v, (m, a, g_m, g_a), attn_mask, scale, UNBOUNDED, 0 if is_causal else UNBOUNDED)
        if y is not NotImplemented:
            return y
    edits = _edits(q, k, v, m, a, g_m, g_a, packed=cu_seqlens is not None)
    heads, groups = q.shape[1], k.shape[1]
    if groups != heads and (not enable_gqa or groups == 0 or heads % groups):
        hint = "enable_gqa=True allows a divisor of H" if not enable_gqa else "it has to divide H"
        raise ValueError(f"{OP}: k must have q's {heads} heads, got {groups}; {hint}")
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    scale = checks.number(OP, "scale", scale)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"{OP}: window must be a positive int or None, got {window!r}")
    if implementation is not None:
        checks.choice(OP, "implementation", implementation, IMPLEMENTATIONS)
    left = UNBOUNDED if window is None else window - 1
    right = 0 if is_causal else left
    packed = None
    if cu_seqlens is not None:
        if attn_mask is not None:
            raise ValueError(f"{OP}: attn_mask is for unpacked q, k and v; leave it out with cu_seqlens")
        packed = _packed(cu_seqlens, max_seqlen, q)
    elif max_seqlen is not None:
        raise ValueError(f"{OP}: max_seqlen belongs to cu_seqlens, which is None")
    mask = None if attn_mask is None else _mask(attn_mask, q, k)
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    if q.numel() == 0 or v.numel() == 0 or k.shape[-2 if packed is None else 0] == 0:
        implementation = "separate"
    batch = None if packed is None else packed.starts_q.shape[0] - 1
    needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (q, k, v, *edits)]
    chosen = choose(q, k, v, mask, scale, left, right, any(needs_grad), batch, implementation)
    if chosen == FUSED:
        problem = Problem(q, k, v, *edits, mask, None, None, 0, 0, scale, left, right)
        return run(problem if packed is None else problem._replace(**packed._asdict()), keep_for(needs_grad))
    if chosen in PROVIDERS:
        return apply(serve(chosen, Call(q, k, v, mask, left, right, packed is not None), scale, packed), edits)
    if packed is None:
        return attend(q, k, v, edits, mask, scale, left, right)
    return attend_packed(q, k, v, edits, scale, left, right, packed)


def _edits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor | None,
    a: Tensor | None,
    g_m: Tensor | None,
    g_a: Tensor | None,
    packed: bool,
) -> Edits:
    rank, shape = (3, "(tokens, heads, head_dim)") if packed else (4, "(batch, heads, tokens, head_dim)")
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.tensor(OP, name, t)
        if t.dim() != rank:
            raise ValueError(f"{OP}: {name} must be {shape}, got shape {tuple(t.shape)}")
        if t.dtype != q.dtype:
            raise TypeError(f"{OP}: {name} must have q's dtype {q.dtype}, got {t.dtype}")
        checks.same_device(OP, name, t, "q", q)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{OP}: k must have q's head_dim {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{OP}: v must have k's shape but for head_dim, {tuple(k.shape[:-1])}, got {tuple(v.shape[:-1])}"
        )
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"{OP}: k must have q's batch size {q.shape[0]}, got {k.shape[0]}")
    heads, size = q.shape[1], v.shape[-1]
    if m is None and a is None:
        raise ValueError(f"{OP}: at least one of m and a is needed, got None for both")
    for name, edit, expected in (
        ("m", m, (heads, size)),
        ("a", a, (heads, size)),
        ("g_m", g_m, (heads,)),
        ("g_a", g_a, (heads,)),
    ):
        if edit is not None:
            checks.tensor(OP, name, edit)
            if edit.shape != expected:
                raise ValueError(f"{OP}: {name} must have shape {expected}, got {tuple(edit.shape)}")
            checks.same_device(OP, name, edit, "q", q)
    for name, gate, edit in (("g_m", g_m, m), ("g_a", g_a, a)):
        if gate is not None and edit is None:
            raise ValueError(f"{OP}: {name} gates {name[2:]}, which is None; give both or neither")
    return checks.widened(m), checks.widened(a), checks.widened(g_m), checks.widened(g_a)


def _mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if not isinstance(mask, Tensor):
        raise TypeError(f"{OP}: attn_mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        checks.tensor(OP, "attn_mask", mask)
        if mask.requires_grad:
            raise ValueError(f"{OP}: attn_mask gets no gradient, but requires one; detach it")
    checks.same_device(OP, "attn_mask", mask, "q", q)
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(sizes) != 4 or any(have not in (1, want) for have, want in zip(sizes, shape)):
        raise ValueError(f"{OP}: attn_mask must broadcast to (B, H, T, S) = {shape}, got shape {tuple(mask.shape)}")
    return mask.expand(shape)


def _packed(cu_seqlens: Tensor | tuple[Tensor, Tensor], max_seqlen: int | tuple[int, int] | None, q: Tensor) -> Packed:
    starts = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    for t in starts:
        if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64) or t.dim() != 1 or t.shape[0] < 2:
            got = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{OP}: cu_seqlens must be int32 or int64 of shape (B + 1,), got {got}")
        checks.same_device(OP, "cu_seqlens", t, "q", q)
    if starts[0].shape != starts[1].shape:
        raise ValueError(
            f"{OP}: cu_seqlens of queries and keys must name as many sequences, got {starts[0].shape[0] - 1} and "
            f"{starts[1].shape[0] - 1}"
        )
    if max_seqlen is None:
        longest = tuple(int(t.diff().max()) for t in starts)
    else:
        longest = max_seqlen if isinstance(max_seqlen, tuple) else (max_seqlen, max_seqlen)
    return Packed(starts[0].int(), starts[1].int(), longest[0], longest[1])
