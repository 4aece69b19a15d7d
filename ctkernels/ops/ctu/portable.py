"""The portable form of the CT unit, see :mod:`ctkernels.ops.portable`.

Where the unit is sharp, s = 1 - beta is ``SHARPEST``: exponentials of w / s are then 0, or capped, and the unit is the plain
activation to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..portable import Operands, Value, plus, times
from .op import KINDS, CtuAttrs, CtuInputs
from .reference import tanh_gate_exponent

SHARPEST = 1e-30  # its reciprocal is finite in float32
CAP = 60.0  # softplus(u) = u in float64 from 37 on, and exp(60) is finite in float32
LEAST_GATE = 0.25  # see `swish`


def lower(operands: Operands, inputs: CtuInputs, attrs: CtuAttrs) -> Value:
    """The unit; an affine map that is constant goes into the weights of a layer before it."""
    x, beta, coeff, slope, scale, shift, residual = inputs
    if attrs.channel_dim in (-1, 1) and operands.fold(x, scale, shift):
        scale = shift = None
    w = times(operands.wide(x), 1.0 if scale is None else operands.parameter(scale, "scale"))
    w = plus(w, 0.0 if shift is None else operands.parameter(shift, "shift"))
    w = plus(w, 0.0 if residual is None else operands.wide(residual))
    return activated(operands, w, beta, coeff, slope, attrs)


def activated(operands: Operands, w: Value, beta: Any, coeff: Any, slope: Any, attrs: CtuAttrs) -> Value:
    """The unit at pre-activation ``w``, with its parameters as nodes."""
    least: list[float] = []

    def derived(b: Any, c: Any) -> tuple[Any, ...]:
        values = derive(b, c, bool(attrs.raw), float(attrs.eps))
        least.extend([float(values[3].min())] if isinstance(b, Tensor) else [])
        return values

    coeff, s, sharpness, eta = operands.computed(derived, [beta, coeff], ("coeff", "s", "sharpness", "eta"))
    slope = None if slope is None else operands.parameter(slope, "slope")
    return unit(w, slope, Knobs(coeff, s, sharpness, eta, least[0] if least else None), KINDS[attrs.kind])


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
