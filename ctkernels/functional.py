"""The public functions. Each is checked here, once, and then handed to its op."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _backend, _check
from .ops._layout import NO_CHANNEL
from .ops.ctu import ACTIVATIONS
from .ops.ctu import OP as _CTU

__all__ = ["ctu"]


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
    r"""The Curvature Tuning unit, fused: an activation whose curvature is one knob.

    With s = 1 - beta (+ eps), u = w / s and w = scale * x + shift + residual,

        y = coeff * w * sigmoid(beta * u) + (1 - coeff) * s * softplus(u)

    (equation 8 of the Curvature Tuning paper). beta = 1 is the plain activation, exactly; towards 0 the unit gets smoother.

    Args:
        x: float32, float64, bfloat16 or float16; any shape and strides, empty included.
        beta: the curvature knob in [0, 1]: a number, or a tensor that is 0-d, of size 1, or of size
            ``x.shape[channel_dim]`` (one value per channel). float32 or wider is kept; narrower is widened.
        coeff: the mix in [0, 1] of the two smoothings: 1 is the SiLU-like branch, 0 the softplus branch. As ``beta``.
        channel_dim: the dimension of ``x`` that per-channel tensors belong to. Needed if there are any.
        raw: ``beta`` and ``coeff`` are logits, mapped by the sigmoid inside the kernel without losing digits of 1 - beta.
        activation: ``"relu"``, ``"leaky_relu"``, ``"prelu"``, ``"relu6"``, ``"silu"`` or ``"gelu"`` (the exact, Gaussian
            form). The ReLU family equals the plain activation at beta = 1; SiLU and GELU at beta = 0.5, coeff = 1.
        negative_slope: of ``leaky_relu`` and ``prelu``; a number or a tensor as ``beta`` (learned slopes).
        scale, shift: per-channel (or size-1) tensors of the affine map before the unit, a folded BatchNorm say.
        residual: tensor of ``x``'s shape added before the unit.
        inplace: write the result over ``x``. Not possible where a gradient is needed: the backward pass starts from ``x``.
        eps: added to 1 - beta. The official implementation has 1e-6 there; 0 here.

    Returns:
        A tensor of ``x``'s shape, in the wider of the dtypes of ``x`` and ``residual``. Arithmetic is float32 (float64 for
        float64). Differentiable in every tensor argument, to any order, in forward and reverse mode; the backward pass
        keeps ``x`` (and ``residual``) and nothing else.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: for ``inplace=True`` where a gradient is needed.

    Example:
        >>> y = ctkernels.functional.ctu(x, 0.9)                                # one knob for all
        >>> y = ctkernels.functional.ctu(x, beta, coeff, channel_dim=1)          # a knob per channel
    """
    _check.tensor("ctu", "x", x)
    kind = ACTIVATIONS.get(activation, -1)
    if kind < 0:
        _check.choice("ctu", "activation", activation, ACTIVATIONS)
    channel = None if channel_dim is None else _check.dimension("ctu", "channel_dim", channel_dim, x)
    eps = _check.number("ctu", "eps", eps)
    if eps < 0:
        raise ValueError(f"ctu: eps must not be negative, got {eps}")
    beta = _knob("beta", beta, x, channel, raw)
    coeff = _knob("coeff", coeff, x, channel, raw)
    slope = _param("negative_slope", negative_slope, x, channel) if kind == 1 else None
    if scale is not None:
        scale = _param("scale", scale, x, channel)
    if shift is not None:
        shift = _param("shift", shift, x, channel)
    if residual is not None:
        _check.tensor("ctu", "residual", residual)
        _check.same_shape("ctu", "residual", residual, "x", x)
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            if inplace and dtype != x.dtype:
                raise TypeError(f"ctu: residual must have x's dtype {x.dtype} when inplace=True, got {residual.dtype}")
            x, residual = x.to(dtype), residual.to(dtype)
    _backend.forced_refusal(x)
    inputs = (x, beta, coeff, slope, scale, shift, residual)
    static = (NO_CHANNEL if channel is None else channel, kind, raw, eps)
    if not inplace:
        return _CTU(inputs, static)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise RuntimeError(
            "ctu: inplace=True would overwrite x, which the backward pass needs; use inplace=False, or torch.no_grad()"
        )
    return _CTU.call_(inputs, static)


def _knob(name: str, value: float | Tensor, x: Tensor, channel_dim: int | None, raw: bool) -> Tensor:
    if not raw and not isinstance(value, Tensor):
        _check.unit_interval("ctu", name, _check.number("ctu", name, value))
    return _param(name, value, x, channel_dim)


def _param(name: str, value: float | Tensor, x: Tensor, channel_dim: int | None, op: str = "ctu") -> Tensor:
    """A per-channel parameter as the ops take it: float32 or float64, 0-d or 1-D, on x's device."""
    if not isinstance(value, Tensor):
        # float64, so that 1 - beta keeps every digit the user wrote
        return torch.scalar_tensor(_check.number(op, name, value), dtype=torch.float64, device=x.device)
    _check.tensor(op, name, value)
    count = value.numel()
    if value.dim() > 1:
        raise ValueError(f"{op}: {name} must have at most one dimension, got shape {tuple(value.shape)}")
    if count != 1 or value.dim():
        if count != 1:
            _check.channel_count(op, name, count, x, channel_dim)
    if value.device != x.device:
        if value.dim():
            _check.same_device(op, name, value, "x", x)
        value = value.to(x.device)
    if value.dtype not in (torch.float32, torch.float64):
        value = value.float()
    return value
