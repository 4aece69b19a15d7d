"""The CT unit at 40 digits, from the paper's formula, and the official module's expression."""

from __future__ import annotations

from dataclasses import dataclass

import mpmath as mp
import torch
import torch.nn.functional as F
from torch import Tensor

mp.mp.dps = 40
CUBIC = mp.mpf("0.044715")  # of GELU's tanh approximation


@dataclass
class Value:
    """A quantity and the sum of the magnitudes of its terms, the natural unit of its rounding error."""

    value: mp.mpf
    terms: mp.mpf


def logistic(t: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-t))


def unit(x: float, beta: float, coeff: float, activation: str = "relu") -> dict[str, Value]:
    """phi and its partial derivatives at doubles taken as exact, for beta < 1."""
    b = mp.mpf(beta)
    return _unit(mp.mpf(x), b, 1 - b, mp.mpf(coeff), activation)


def unit_of_logit(x: float, logit: float, coeff: float, activation: str = "relu") -> dict[str, Value]:
    """The same with beta the sigmoid of ``logit``; the derivative by the logit replaces the one by beta."""
    b, s = logistic(mp.mpf(logit)), logistic(-mp.mpf(logit))
    values = _unit(mp.mpf(x), b, s, mp.mpf(coeff), activation)
    return values | {"beta": Value(values["beta"].value * b * s, values["beta"].terms * b * s)}


def _tanh_gate(t: mp.mpf) -> mp.mpf:
    """(1 + tanh(z)) / 2 = logistic(2 z), which is accurate in the tail."""
    t = max(min(t, 10**3), -(10**3))
    return logistic(mp.sqrt(8 / mp.pi) * (t + CUBIC * t**3))


def _unit(x: mp.mpf, b: mp.mpf, s: mp.mpf, c: mp.mpf, activation: str) -> dict[str, Value]:
    u = x / s
    t = b * u
    a = abs(u)
    if activation in ("gelu", "gelu_tanh"):
        cdf, pdf = (lambda v, f=f: f(max(min(v, 10**4), -(10**4))) for f in (mp.ncdf, mp.npdf))  # settled there
        gate, slope_u, bell, below = cdf(t), cdf(u), pdf(t), cdf(-abs(t))
        if activation == "gelu_tanh":
            gate, below = _tanh_gate(t), _tanh_gate(-abs(t))
            bell = gate * _tanh_gate(-t) * mp.sqrt(8 / mp.pi) * (1 + 3 * CUBIC * t**2)
        slope_t = t * bell
        soft, tail = [max(u, 0), pdf(u), -a * cdf(-a)], [abs(x) * below, s * pdf(u), -s * a * cdf(-a)]
        entropy = pdf(u)
    else:
        gate, slope_u = logistic(t), logistic(u)
        bell = gate * logistic(-t)
        slope_t = t * bell
        soft = [max(u, 0) + mp.log1p(mp.exp(-a))]
        tail = [abs(x) * logistic(-abs(t)), s * mp.log1p(mp.exp(-a))]
        entropy = mp.log1p(mp.exp(-a)) + a * logistic(-a)
    y = [c * x * gate, *((1 - c) * s * term for term in soft)]
    d_x = [c * gate, c * slope_t, (1 - c) * slope_u]
    d_beta = [c * u * u * bell, -(1 - c) * entropy]
    d_coeff = [-term for term in tail]  # x gate - s soft, without its cancellation
    return {
        name: Value(mp.fsum(terms), mp.fsum(abs(v) for v in terms))
        for name, terms in {"y": y, "x": d_x, "beta": d_beta, "coeff": d_coeff}.items()
    }


def official(x: Tensor, beta: Tensor | float, coeff: Tensor | float, eps: float = 1e-6) -> Tensor:
    """The expression of the authors' module, given beta and coeff instead of their logits."""
    rest = 1 - beta + eps
    return coeff * torch.sigmoid(beta * x / rest) * x + (1 - coeff) * F.softplus(x / rest, threshold=20) * rest
