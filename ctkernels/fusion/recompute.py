"""Recomputes a BatchNorm's output in the backward pass, for the unit behind a sum, instead of saving it.

BatchNorm keeps its input in any case. Its output is needed again only by the unit: a tensor saved for one cheap pass.
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

    def again(self) -> Tensor:
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
    known = isinstance(norm, torch.nn.modules.batchnorm._BatchNorm) and norm.training and y.dtype == z.dtype
    if known and y.requires_grad:
        y._ctkernels_made_by = _Normalisation.of(norm, z)
    return y


def recomputed(y: Tensor | None) -> AbstractContextManager[Any]:
    """In this context autograd saves, in the place of ``y``, how to recompute it, if :func:`normalised` made it."""
    made_by = getattr(y, "_ctkernels_made_by", None)
    if y is None or made_by is None or not torch.is_grad_enabled() or y._version != 0:
        return nullcontext()
    if (
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):  # checkpoints and the like decide for themselves
        return nullcontext()

    address, shape = y.data_ptr(), y.shape  # a hook that held y would keep it

    def pack(t: Tensor) -> Any:
        return made_by if t.data_ptr() == address and t.shape == shape else (t, t._version)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, _Normalisation):
            return kept.again()
        t, version = kept
        if t._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {list(t.shape)} that a CT unit keeps is at version {t._version}; expected {version}"
            )
        return t

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
