"""The ops of this library in terms of torch's operations, for programs that must run without it.

Values are floats for constants that are one number, and proxies for other constants and for tensors of the program. A
constant that switches a part off removes that part.

No intermediate of a finite result overflows. Where the unit is sharp, s = 1 - beta is ``SHARPEST``: exponentials of w / s
are then 0, or capped, and the unit is the plain activation to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.ctu.reference import tanh_gate_exponent

SHARPEST = 1e-30  # its reciprocal is finite in float32
CAP = 60.0  # softplus(u) = u in float64 from 37 on, and exp(60) is finite in float32
LEAST_GATE = 0.25  # see `swish`

Value = Any  # a proxy, or a float


class Knobs(NamedTuple):
    """``eta`` = beta / s and ``sharpness`` = 1 / s. ``least_eta``: the smallest eta; None if unknown."""

    coeff: Value
    s: Value
    sharpness: Value
    eta: Value
    least_eta: float | None


def derive(beta: Any, coeff: Any, raw: bool, eps: float) -> tuple[Any, Any, Any, Any]:
    """(coeff, s, 1 / s, beta / s) from the parameters of ``ctkernels::ctu``, tensors or proxies."""
    if raw:  # 1 - sigmoid(beta) has no digits left where beta is large
        s, beta, coeff = torch.sigmoid(-beta), torch.sigmoid(beta), torch.sigmoid(coeff)
    else:
        s = 1 - beta
    s = torch.clamp(s + eps, min=SHARPEST)
    return coeff, s, 1 / s, beta / s


def unit(w: Value, slope: Value, k: Knobs, kind: str) -> Value:
    """The CT unit of member ``kind`` at pre-activation ``w``."""
    if kind == "gaussian":
        return _mix(k, lambda: _gelu(w, k.eta), lambda: _soft_gaussian(w, k))
    if kind == "tanh":
        return _mix(k, lambda: _gelu_tanh(w, k), lambda: _soft_gaussian(w, k))
    if kind == "relu6":
        return torch.clamp(torch.relu(w), max=6.0) + (_excess(w, k) - _excess(w - 6, k))
    if kind == "leaky":
        return _leaky(w, slope, k)
    return _logistic(w, k)


def factors(m: Any, a: Any, g_m: Any, g_a: Any) -> tuple[Any, Any]:
    """(1 + g_m m, g_a a) of the head edit; None without m, or a."""
    p = None if m is None else 1 + (m if g_m is None else g_m * m)
    return p, a if a is None or g_a is None else g_a * a


def times(value: Value, factor: Value) -> Value:
    """``value * factor``, without an operation if the factor is the number 1."""
    return value if isinstance(factor, float) and factor == 1.0 else value * factor


def plus(value: Value, offset: Value) -> Value:
    """``value + offset``, without an operation if the offset is the number 0."""
    return value if isinstance(offset, float) and offset == 0.0 else value + offset


def _mix(k: Knobs, first: Callable[[], Value], second: Callable[[], Value]) -> Value:
    """coeff * first + (1 - coeff) * second."""
    if isinstance(k.coeff, float):
        if k.coeff == 1.0:
            return first()
        if k.coeff == 0.0:
            return second()
        if k.coeff == 0.5:  # one operation less
            return (first() + second()) * 0.5
    return first() * k.coeff + second() * (1 - k.coeff)


def _logistic(w: Value, k: Knobs) -> Value:
    return _mix(k, lambda: swish(w, k), lambda: _soft(w, k))


def swish(w: Value, k: Knobs) -> Value:
    """w sigmoid(eta w).

    Sigmoids of runtimes have errors of up to 1.5e-7 where they are nearly 0, while w is up to 17 / eta there; exponentials are
    accurate to the last bits everywhere. If exp(-eta w) is infinite, the quotient is 0.
    """
    return _gated(w, times(w, k.eta), k)


def _gated(w: Value, t: Value, k: Knobs) -> Value:
    """w sigmoid(t)."""
    if k.least_eta is not None and k.least_eta < LEAST_GATE:
        return w / (1 + torch.exp(-t))
    return w * torch.sigmoid(t)


def _soft(w: Value, k: Knobs) -> Value:
    """s softplus(w / s). Above CAP it is w, the larger of the two."""
    bent = torch.log1p(torch.exp(torch.clamp(times(w, k.sharpness), max=CAP)))
    return torch.maximum(times(bent, k.s), w)


def _excess(w: Value, k: Knobs) -> Value:
    """The unit minus relu(w), without cancellation: an even function that vanishes away from 0."""
    below = -torch.abs(w)
    return _mix(k, lambda: swish(below, k), lambda: times(torch.log1p(torch.exp(times(below, k.sharpness))), k.s))


def _leaky(w: Value, slope: Value, k: Knobs) -> Value:
    """slope w + sign u(|1 - slope| w), u the logistic unit; above slope 1, max(slope w, w) becomes a minimum."""
    if isinstance(slope, float):
        bent = _logistic(times(w, abs(1 - slope)), k)
        return times(w, slope) + bent if slope <= 1 else times(w, slope) - bent
    sign = 1 - 2 * torch.gt(slope, 1)
    return w * slope + sign * _logistic(w * torch.abs(1 - slope), k)


def _gelu(w: Value, eta: Value) -> Value:
    return w * (1 + torch.erf(times(w, times(eta, math.sqrt(0.5))))) * 0.5


def _gelu_tanh(w: Value, k: Knobs) -> Value:
    return _gated(w, tanh_gate_exponent(times(w, k.eta)), k)


def _soft_gaussian(w: Value, k: Knobs) -> Value:
    """w Phi(u) + s phi(u), u = w / s."""
    u = times(w, k.sharpness)
    return _gelu(w, k.sharpness) + times(torch.exp(u * u * -0.5), times(k.s, 1 / math.sqrt(2 * math.pi)))


def aligned(param: Any, shape: torch.Size, x: Tensor, channel_dim: int) -> Any:
    """:func:`ctkernels.ops.layout.broadcast` for a proxy ``param`` of ``shape``."""
    size = [1] * x.dim()
    count = int(shape[-1]) if len(shape) else 1
    if channel_dim >= 0 and count != 1:
        channels = int(x.shape[channel_dim])
        if count != channels:
            param = torch.repeat_interleave(param, channels // count, -1)
        size[channel_dim] = channels
    if len(shape) == 2 and shape[0] != 1:
        if isinstance(x.shape[0], int) and int(shape[0]) != x.shape[0]:
            param = param.repeat(x.shape[0] // int(shape[0]), 1)
        size[0] = -1
    return torch.reshape(param, size)
