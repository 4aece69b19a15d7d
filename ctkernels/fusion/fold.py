"""What a BatchNorm becomes: other weights of the layer before it, or a scale and a shift per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packing


def is_eval(norm: Any) -> bool:
    """Whether ``norm`` uses its running statistics."""
    return not norm.training and norm.running_mean is not None


def affine(norm: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) with norm(z) = scale * z + shift, per channel of dimension 1.

    In training they come from the statistics of ``z``, and the running statistics move on. They are float64: their
    gradients, sums over ``z`` that is not centred, nearly cancel.
    """
    mean, variance = (t.double() for t in (_running(norm) if is_eval(norm) else _of_batch(norm, z)))
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _running(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var


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
    """The mean and the (biased) variance of every channel. Keeps ``z``, which the unit after it keeps too."""

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


class Folded:
    """``source`` with ``norm`` (in evaluation) folded into its weight and bias, which are kept until one of them changes."""

    def __init__(self, source: Any, norm: Any) -> None:
        self.source, self.norm = source, norm
        self.forget()

    def forget(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.value: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "norm": self.norm, "key": None, "value": None}

    def parameters(self) -> list[Tensor]:
        found = [self.source.weight, self.source.bias]
        if self.norm is not None:
            found += [self.norm.weight, self.norm.bias, *_running(self.norm)]
        return [t for t in found if t is not None]

    def __call__(self, x: Tensor, needs_grad: bool) -> Tensor:
        """The layer and the norm, of which nothing needs a gradient; ``needs_grad``: whether ``x`` does."""
        source = self.source
        if self.norm is None:
            return _frozen(source, x, source.weight, source.bias, needs_grad)
        if (
            torch.compiler.is_compiling()
        ):  # the compiler sees the fold, and does it ahead of time where it freezes weights
            return _frozen(source, x, *self._fold(_memory_format(x)), needs_grad)
        # A backward pass wants the weights as they are, so packing would mean to keep them twice.
        packed = not needs_grad and packing.can_pack(source, x)
        weight, bias = self._get(x, packed)
        return packing.call(source, x, weight, bias) if packed else _frozen(source, x, weight, bias, needs_grad)

    def _get(self, x: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
        """(weight, bias) for a call on ``x``: packed, or laid out as ``x`` is."""
        layout = _memory_format(x)
        watched = [*self.parameters(), self.norm.num_batches_tracked]  # the last: moving statistics keep their versions
        key = (layout, packed, *((t.data_ptr(), t._version) for t in watched if t is not None))
        if key != self.key:
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = self._fold(layout)
                self.value = packing.pack(self.source, x, weight) if packed else weight, bias
                self.key = key
        assert self.value is not None
        return self.value

    def _fold(self, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
        weight = self.source.weight
        scale, shift = affine(self.norm, weight)
        if self.source.bias is not None:
            shift = shift + scale * self.source.bias.double()
        wide = torch.promote_types(weight.dtype, torch.float32)
        folded = (weight.to(wide) * scale.view(-1, *[1] * (weight.dim() - 1)).to(wide)).to(weight.dtype)
        return folded.contiguous(memory_format=layout), shift.to(weight.dtype)


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _memory_format(x: Tensor) -> torch.memory_format:
    last = _LAST.get(x.dim())
    return last if last is not None and x.is_contiguous(memory_format=last) else torch.contiguous_format


class _FrozenConv(torch.autograd.Function):
    """A convolution whose weights need no gradient. It keeps them, and not its input, which torch's own keeps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any], groups: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.layout, ctx.geometry, ctx.groups = x.shape, _memory_format(x), geometry, groups
        stride, padding, dilation = geometry
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * (x.dim() - 2), groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Only its shape is read; but on the CPU, what is not laid out as expected would be copied first.
        if g.is_cpu:
            x = torch.empty(ctx.shape, dtype=g.dtype, memory_format=ctx.layout)
        else:
            x = g.new_empty(1).expand(ctx.shape)
        mask = [True, False, False]
        dx, _, _ = torch.ops.aten.convolution_backward(
            g, x, weight, None, *ctx.geometry, False, [0] * (g.dim() - 2), ctx.groups, mask
        )
        return dx, None, None, None, None


def _frozen(source: Any, x: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: bool) -> Tensor:
    """``source(x)`` with other weights, which need no gradient."""
    if isinstance(source, nn.Linear):
        return F.linear(x, weight, bias)
    own = needs_grad and not torch.compiler.is_compiling() and x.dim() == weight.dim()
    if not own or source.padding_mode != "zeros" or isinstance(source.padding, str):
        return source._conv_forward(x, weight, bias)
    return _FrozenConv.apply(x, weight, bias, (source.stride, source.padding, source.dilation), source.groups)
