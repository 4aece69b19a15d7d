"""The public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.ctu import reference


def ctu(
    x: Tensor,
    beta: float | Tensor,
    coeff: float | Tensor = 0.5,
    *,
    channel_dim: int | None = None,
    raw: bool = False,
    activation: str = "relu",
    negative_slope: float | Tensor = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    inplace: bool = False,
    eps: float = 0.0,
) -> Tensor:
    kind = {"relu": "relu", "silu": "relu", "leaky_relu": "leaky", "prelu": "leaky", "relu6": "relu6", "gelu": "gaussian"}[activation]

    def param(p: float | Tensor) -> Tensor:
        p = torch.as_tensor(p, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        return p.reshape([-1 if d == (channel_dim or 0) % x.dim() else 1 for d in range(x.dim())]) if p.numel() > 1 else p.reshape(())

    w = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        w = w * param(scale)
    if shift is not None:
        w = w + param(shift)
    if residual is not None:
        w = w + residual
    slope = param(negative_slope) if kind == "leaky" else None
    y = reference.forward(w, slope, reference.knobs(param(beta), param(coeff), raw, eps), kind).to(x.dtype)
    return x.copy_(y) if inplace else y


