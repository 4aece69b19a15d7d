"""torch's attention followed by the head edit: for every device and dtype, and where torch's kernel is faster.

Without gradients the edit is in place: one pass over the attention output and no memory. With gradients it saves the
attention output, which torch's backward pass keeps anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, memory
from ..autograd import in_forward_mode
from . import edit, reference
from .problem import Edits, Packed
from .reference import UNBOUNDED


def attend(
    q: Tensor, k: Tensor, v: Tensor, edits: Edits, mask: Tensor | None, scale: float, left: int, right: int
) -> Tensor:
    """q (B, H, T, D), k (B, G, S, D), v (B, G, S, E)."""
    tokens, keys = q.shape[2], k.shape[2]
    if backends.forced() == "reference" or in_forward_mode():  # torch's fast kernels have no forward mode
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        mask = reference.combine(mask, reference.visible(tokens, keys, left, right, q.device))
        m, a, g_m, g_a = (None if t is None else t.to(wide) for t in edits)
        widened = (m, a, g_m, g_a)
        return reference.forward(q.to(wide), k.to(wide), v.to(wide), widened, mask, scale).to(q.dtype)
    causal = right == 0 and left == UNBOUNDED and mask is None
    if causal and tokens == 1:  # one query, aligned with the last key, sees them all
        z = _sdpa(q, k, v, None, scale)
    elif causal and tokens == keys:
        z = _sdpa(q, k, v, None, scale, is_causal=True)
    else:
        z = _sdpa(q, k, v, reference.combine(mask, reference.visible(tokens, keys, left, right, q.device)), scale)
    return edit.apply(z, edits)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False) -> Tensor:
    # torch's CPU kernel gives its result the layout a dense q would have, and assumes that the last dimension is innermost. If
    # elements of q share memory it may not be, and part of the result would never be written.
    eager = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and not q.is_contiguous() and memory.overlaps_itself(q.shape, q.stride()):
        q = q.contiguous()
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, edits: Edits, scale: float, left: int, right: int, packed: Packed
) -> Tensor:
    """q (T, H, D), k (S, G, D), v (S, G, E): the sequences padded to the longest, attended, and packed again."""
    at_q, real_q = _padded_indices(packed.starts_q, packed.longest_q, q.shape[0])
    at_k, real_k = _padded_indices(packed.starts_k, packed.longest_k, k.shape[0])
    padded_q, padded_k, padded_v = (t[at].transpose(1, 2) for t, at in ((q, at_q), (k, at_k), (v, at_k)))
    seen = real_q[:, None, :, None] & real_k[:, None, None, :]
    lengths_q, lengths_k = (starts.diff()[:, None, None, None] for starts in (packed.starts_q, packed.starts_k))
    if left != UNBOUNDED or right != UNBOUNDED:
        j = torch.arange(packed.longest_k, device=q.device)
        distance = j - torch.arange(packed.longest_q, device=q.device)[:, None] - (lengths_k - lengths_q)
        if right != UNBOUNDED:
            seen = seen & (distance <= right)
        if left != UNBOUNDED:
            seen = seen & (distance >= -left)
    y = attend(padded_q, padded_k, padded_v, edits, seen, scale, UNBOUNDED, UNBOUNDED).transpose(1, 2)
    t = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(packed.starts_q, t.to(packed.starts_q.dtype), right=True) - 1
    return y[sequence, t - packed.starts_q[sequence]]


def _padded_indices(starts: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """(B, longest) indices into a packed dimension, and which of them are no padding."""
    at = starts[:-1, None] + torch.arange(longest, device=starts.device)
    return at.clamp(max=max(total - 1, 0)), at < starts[1:, None]
