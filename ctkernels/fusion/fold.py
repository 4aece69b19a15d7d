"""BatchNorm as a scale and a shift per channel, computed in every call.

A cache would have to detect changed weights, and version counters miss writes through ``.data``, or through an array that
shares the memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def is_eval(norm: Any) -> bool:
    """True if ``norm`` uses its running statistics."""
    return not norm.training and norm._buffers["running_mean"] is not None


def affine(norm: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) with norm(z) = scale * z + shift, per channel of dimension 1.

    In training they come from the statistics of ``z``, and the running statistics are updated. They are float64: their
    gradients, sums over uncentred ``z``, nearly cancel.
    """
    weights, buffers = norm._parameters, norm._buffers
    if is_eval(norm):
        mean, variance = buffers["running_mean"], buffers["running_var"]
    else:
        mean, variance = _of_batch(norm, z)
    return _affine(mean, variance, weights["weight"], weights["bias"], norm.eps)


def normalise(norm: Any, z: Tensor) -> Tensor:
    """norm(z) with running statistics, without the activation that a subclass may call."""
    weights, buffers = norm._parameters, norm._buffers  # faster than norm.weight, which goes through __getattr__
    mean, variance = buffers["running_mean"], buffers["running_var"]
    return F.batch_norm(z, mean, variance, weights["weight"], weights["bias"], False, 0.0, norm.eps)


def _affine(
    mean: Tensor, variance: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if variance.device.type == "mps" else torch.float64
    scale = torch.rsqrt(variance.to(wide) + eps)
    if gain is not None:
        scale = scale * gain
    if offset is None:
        return scale, -mean * scale
    return scale, torch.addcmul(offset.to(wide), mean.to(wide), scale, value=-1)


def _of_batch(norm: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    norm._check_input_dim(z)
    F._verify_batch_size(z.size())  # type: ignore[attr-defined]
    running_mean, running_var, momentum = None, None, norm.momentum or 0.0
    if norm.training and norm.track_running_stats:
        running_mean, running_var = norm.running_mean, norm.running_var
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
    return _Statistics.apply(z, running_mean, running_var, momentum)


class _Statistics(torch.autograd.Function):
    """Mean and (biased) variance per channel. Saves ``z``, which the following unit saves too."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
    ) -> tuple[Tensor, Tensor]:
        mean, variance = torch.ops.aten.batch_norm_update_stats(z, running_mean, running_var, momentum)
        ctx.save_for_backward(z, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> tuple[Tensor | None, ...]:
        z, mean = ctx.saved_tensors
        count = z.numel() // z.shape[1]
        slope = d_variance * (2 / count)
        offset = d_mean / count - slope * mean
        shape = [1, -1] + [1] * (z.dim() - 2)
        return torch.addcmul(offset.view(shape), z, slope.view(shape)).to(z.dtype), None, None, None
