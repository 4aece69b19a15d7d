"""Recomputes a BatchNorm's output in the backward pass instead of saving it, for a unit after a residual sum.

BatchNorm saves its input in any case. Only the unit needs its output again: one cheap pass saves a tensor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Normalisation(NamedTuple):
    """The input and weights of a BatchNorm in training, from which its output is recomputed bit for bit."""

    z: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    versions: list[int]

    @classmethod
    def of(cls, norm: Any, z: Tensor) -> _Normalisation:
        weight, bias = (None if t is None else t.detach() for t in (norm.weight, norm.bias))
        return cls(z.detach(), weight, bias, norm.eps, [t._version for t in (z, weight, bias) if t is not None])

    def recompute(self) -> Tensor:
        if [t._version for t in self[:3] if t is not None] != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                "input or a weight of a BatchNorm"
            )
        with torch.no_grad():
            return F.batch_norm(self.z, None, None, self.weight, self.bias, training=True, eps=self.eps)


def normalised(norm: Any, z: Tensor) -> Tensor:
    """``norm(z)``, marked with how to recompute it if ``norm`` uses the statistics of ``z`` and autograd records it."""
    y = norm(z)
    in_training = isinstance(norm, torch.nn.modules.batchnorm._BatchNorm) and norm.training and y.dtype == z.dtype
    if in_training and y.requires_grad:
        y._ctkernels_normalisation = _Normalisation.of(norm, z)
    return y


def recomputed(y: Tensor | None) -> AbstractContextManager[Any]:
    """Context in which autograd saves how to recompute ``y``, a result of :func:`normalised`, instead of ``y``."""
    normalisation = getattr(y, "_ctkernels_normalisation", None)
    if y is None or normalisation is None or not torch.is_grad_enabled() or y._version != 0:
        return nullcontext()
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # such as those of checkpointing
        return nullcontext()

    address, shape = y.data_ptr(), y.shape  # a hook that refers to y would keep it alive

    def pack(t: Tensor) -> Any:
        return normalisation if t.data_ptr() == address and t.shape == shape else (t, t._version)

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, _Normalisation):
            return saved.recompute()
        t, version = saved
        if t._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {list(t.shape)} that a CT unit keeps is at version {t._version}; expected {version}"
            )
        return t

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
