"""What a BatchNorm becomes: a scale and a shift per channel, or other weights of the layer before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def is_eval(norm: Any) -> bool:
    """Whether ``norm`` uses its running statistics."""
    return not norm.training and norm.running_mean is not None


def affine(norm: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) with norm(z) = scale * z + shift, per channel of dimension 1.

    In training they come from the statistics of ``z``, and the running statistics move on. They are float64: their
    gradients, sums over ``z`` that is not centred, nearly cancel.
    """
    mean, variance = (norm.running_mean, norm.running_var) if is_eval(norm) else _of_batch(norm, z)
    return _affine(mean, variance, norm.weight, norm.bias, norm.eps)


def _affine(
    mean: Tensor, variance: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(variance.double() + eps)
    if gain is not None:
        scale = scale * gain.double()
    shift = -mean.double() * scale
    return scale, shift if offset is None else shift + offset.double()


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


class Frozen(NamedTuple):
    """A layer and the BatchNorm (in evaluation) after it, none of which needs a gradient.

    ``gain`` and ``offset`` are the BatchNorm's weight and bias, ``counter`` is its count of batches. Without a BatchNorm,
    ``mean`` and ``variance`` are None.
    """

    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None = None
    offset: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    counter: Tensor | None = None
    eps: float = 0.0

    @classmethod
    def of(cls, source: Any, norm: Any) -> Frozen:
        weight, bias = _tensor(source, "weight"), _tensor(source, "bias")
        if norm is None:
            return cls(weight, bias)
        gain, offset = _tensor(norm, "weight"), _tensor(norm, "bias")
        return cls(weight, bias, gain, offset, norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.eps)

    def floats(self) -> list[Tensor]:
        return [t for t in self[:-2] if t is not None]

    def fold(
        self, layout: torch.memory_format = torch.contiguous_format, wide_bias: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the layer that does what both do. ``wide_bias``: the bias in float32 at least."""
        weight = self.weight
        if self.mean is None or self.variance is None:
            bias = self.bias
            if bias is not None and wide_bias:
                bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
            return weight, bias
        scale, shift = _affine(self.mean, self.variance, self.gain, self.offset, self.eps)
        if self.bias is not None:
            shift = shift + scale * self.bias.double()
        wide = torch.promote_types(weight.dtype, torch.float32)
        folded = (weight.to(wide) * scale.view(-1, *[1] * (weight.dim() - 1)).to(wide)).to(weight.dtype)
        return folded.contiguous(memory_format=layout), shift.to(wide if wide_bias else weight.dtype)

    def folded(
        self,
        layout: torch.memory_format,
        order: Callable[[Tensor], Tensor] | None = None,
        settings: Any = None,
        wide_bias: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`fold`, kept until a tensor changes. ``order`` is applied to the weight; ``settings`` are what it depends on."""
        if self.mean is None:
            return self.fold(layout, wide_bias)
        # The counter is watched since moving statistics keep their versions.
        try:
            versions = [None if t is None else (t.data_ptr(), t._version) for t in self[:-1]]
        except RuntimeError:  # inference tensors do not say when they change
            return self.fold(layout, wide_bias)
        key, place = (layout, self.eps, settings, wide_bias, versions), self._place()
        kept = _KEPT.get(place)
        if kept is None or kept.key != key or kept.owner.expired():
            from torch.multiprocessing.reductions import StorageWeakRef  # which imports much

            for other in [k for k, v in _KEPT.items() if v.owner.expired()]:
                del _KEPT[other]
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = self.fold(layout, wide_bias)
                value = weight if order is None else order(weight), bias
            kept = _KEPT[place] = _Kept(StorageWeakRef(self.weight.untyped_storage()), key, value)
        return kept.value

    def forget(self) -> None:
        """Give up what :meth:`folded` keeps."""
        _KEPT.pop(self._place(), None)

    def _place(self) -> tuple[int, ...]:
        return self.weight.data_ptr(), 0 if self.mean is None else self.mean.data_ptr()


def _tensor(module: Any, name: str) -> Any:
    """A parameter, without the time that a module takes to look for it; what it is parametrized by is looked for."""
    return module._parameters[name] if name in module._parameters else getattr(module, name)


class _Kept(NamedTuple):
    owner: Any  # a weak reference to the storage of the layer's weight: what is kept goes with it
    key: tuple[Any, ...]
    value: tuple[Tensor, Tensor | None]


_KEPT: dict[tuple[int, ...], _Kept] = {}
