"""``ctkernels.functional.ctu``: argument checks, and the call of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import autograd, backends, checks, eager
from ..layout import NO_CHANNEL
from .op import ACTIVATIONS, LEAKY, OP, CtuAttrs

_EAGER, _EAGER_IN_PLACE = eager.entry("ctu"), eager.entry("ctu_")


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
    index: Tensor | None = None,
    inplace: bool = False,
    eps: float = 0.0,
) -> Tensor:
    r"""The Curvature Tuning unit, fused: an activation with tunable curvature.

    With s = 1 - beta (+ eps), u = w / s and w = scale * x + shift + residual,

        y = coeff * w * sigmoid(beta * u) + (1 - coeff) * s * softplus(u)

    beta = 1 is exactly the plain activation; smaller values are smoother.

    Args:
        x: float32, float64, bfloat16 or float16; any shape and strides, empty included.
        beta: the curvature, in [0, 1]: a number, or a tensor that is 0-d, of size 1, or of size
            ``x.shape[channel_dim]`` (one value per channel). float32 or wider is kept; narrower is widened.
        coeff: the mix of the two smoothings, in [0, 1]: 1 is the SiLU-like branch, 0 the softplus branch. Types as ``beta``.
        channel_dim: the dimension of ``x`` that per-channel tensors belong to. Required if there are any.
        raw: ``beta`` and ``coeff`` are logits: the kernel applies the sigmoid, without losing digits of 1 - beta.
        activation: ``"relu"``, ``"leaky_relu"``, ``"prelu"``, ``"relu6"``, ``"silu"``, ``"gelu"`` (the exact, Gaussian
            form) or ``"gelu_tanh"`` (its approximation by tanh). The ReLU family equals the plain activation at beta = 1; SiLU
            and both GELUs at beta = 0.5, coeff = 1.
        negative_slope: of ``leaky_relu`` and ``prelu``; a number, or a tensor as ``beta`` (learned slopes).
        scale, shift: per-channel (or size-1) tensors of an affine map before the unit, such as a folded BatchNorm.
        residual: tensor of ``x``'s shape, added before the unit.
        index: (B,) integers: sample b, along dimension 0 of ``x``, uses row ``index[b]`` of ``beta`` and ``coeff``, which are
            then tensors (A, C), or (A, 1) for one value for all channels.
        inplace: write the result over ``x``, with the version count of torch's in-place operations. Not possible if a gradient
            is needed (the backward pass reads ``x``), nor if ``x`` overlaps itself or another argument's memory;
            ``residual`` may be ``x``.
        eps: added to 1 - beta; between 0 and 1. The paper's own code uses 1e-6.

    Returns:
        A tensor of ``x``'s shape, in the wider of the dtypes of ``x`` and ``residual``. Arithmetic is float32 (float64 for
        float64). Differentiable in every tensor argument, to any order, in forward and reverse mode; the backward pass
        saves only ``x`` (and ``residual``).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: for ``inplace=True`` if a gradient is needed, or on an inference tensor outside inference mode.

    Examples:
        >>> x = torch.randn(2, 8, 16, 16)
        >>> y = ctkernels.functional.ctu(x, 0.9)  # one beta for all channels
        >>> beta, coeff = torch.full((8,), 0.9), torch.full((8,), 0.5)
        >>> y = ctkernels.functional.ctu(x, beta, coeff, channel_dim=1)  # one per channel

    Source: Hu et al. 2025, Curvature Tuning, arXiv 2502.07783, equation 8.
    """
    kind = ACTIVATIONS.get(activation, -1) if isinstance(activation, str) else -1
    if index is None and not torch.compiler.is_compiling():
        slope = negative_slope if kind == LEAKY else None
        call = _EAGER_IN_PLACE if inplace else _EAGER
        y = call(x, beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps)
        if y is None:
            dim = NO_CHANNEL if channel_dim is None else channel_dim % x.dim()
            beta, coeff = _as_tensor(beta, x), _as_tensor(coeff, x)
            slope = None if slope is None else _as_tensor(slope, x)
            attrs = CtuAttrs(dim, kind, raw, eps)
            y = autograd.ReverseForward.apply(OP, attrs, x, beta, coeff, slope, scale, shift, residual)
        if y is not NotImplemented:
            return y
    checks.tensor("ctu", "x", x)
    kind = kind_of("ctu", activation)
    channel = None if channel_dim is None else checks.dimension("ctu", "channel_dim", channel_dim, x)
    eps = checks.unit_interval("ctu", "eps", eps)
    if index is None:
        beta, coeff = knob("ctu", "beta", beta, x, channel, raw), knob("ctu", "coeff", coeff, x, channel, raw)
    else:
        checks.sample_index("ctu", index, "x", x, (beta, coeff))
        if channel == 0:
            raise ValueError("ctu: index gives the samples of dimension 0 their knobs, so channel_dim must not be 0")
        beta, coeff = (
            knob_rows("ctu", "beta", beta, x, channel, index),
            knob_rows("ctu", "coeff", coeff, x, channel, index),
        )
    slope = checks.parameter("ctu", "negative_slope", negative_slope, x, channel) if kind == LEAKY else None
    if scale is not None:
        scale = checks.parameter("ctu", "scale", scale, x, channel)
    if shift is not None:
        shift = checks.parameter("ctu", "shift", shift, x, channel)
    if residual is not None:
        checks.tensor("ctu", "residual", residual)
        checks.same_shape("ctu", "residual", residual, "x", x)
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            if inplace and dtype != x.dtype:
                raise TypeError(f"ctu: residual must have x's dtype {x.dtype} when inplace=True, got {residual.dtype}")
            x, residual = x.to(dtype), residual.to(dtype)
    backends.check_forced_backend(x)
    inputs = (x, beta, coeff, slope, scale, shift, residual)
    attrs = CtuAttrs(NO_CHANNEL if channel is None else channel, kind, raw, eps)
    return OP.call_(inputs, attrs) if inplace else OP(inputs, attrs)


def _as_tensor(value: float | Tensor, x: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else checks.scalar_tensor(value, x)


def kind_of(op: str, activation: str) -> int:
    """The member of the family (csrc/ctu.h) that an activation is."""
    kind = ACTIVATIONS.get(activation, -1) if isinstance(activation, str) else -1
    if kind < 0:
        checks.choice(op, "activation", activation, ACTIVATIONS)
    return kind


def knob(op: str, name: str, value: float | Tensor, x: Tensor, channel_dim: int | None, raw: bool) -> Tensor:
    """Converts beta or coeff to an op's input. A number must be in [0, 1] unless it is a logit."""
    if isinstance(value, Tensor):
        return checks.parameter(op, name, value, x, channel_dim)
    check = checks.number if raw else checks.unit_interval
    return checks.scalar_tensor(check(op, name, value), x)


def knob_rows(op: str, name: str, value: float | Tensor, x: Tensor, channel_dim: int | None, index: Tensor) -> Tensor:
    """The row of ``value`` for each sample: float32 or float64, (B, C) or (B, 1)."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{op}: with index, {name} must be a tensor of shape (rows, channels), got {got}")
    checks.tensor(op, name, value)
    checks.same_device(op, name, value, "x", x)
    if value.shape[1] != 1:
        checks.channel_count(op, name, value.shape[1], x, channel_dim)
    return checks.widened(value).index_select(0, index)
