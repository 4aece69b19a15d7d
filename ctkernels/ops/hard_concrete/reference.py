"""Hard-concrete gates in plain torch, for log_alpha and noise of one shape (Louizos, Welling, Kingma 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Modes: a sample, the published deterministic gate, the expectation, the probability that the gate is not 0.
SAMPLE, CLIP, MEAN, OPEN = range(4)
MAX_MEAN_TEMPERATURE = 10.0  # bounds the quadrature of MEAN: 2,500 points
SETTLED = 38.0  # beyond this magnitude the derivative of the sigmoid is below 1e-16


def uniform(seed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in (0, 1): 23 random bits (52 for float64) plus a half. Word 0 (and 1) of Philox 4x32-10 (Salmon et al.
    2011) with the 64-bit ``seed`` as key and the element's index as counter; the same on every device and in every kernel."""
    mask = 0xFFFFFFFF
    index = torch.arange(math.prod(shape), device=seed.device)
    zero = torch.zeros_like(index)
    c0, c1, c2, c3 = index & mask, index >> 32, zero, zero
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        p, q = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around but keeps all 64 bits
        c0, c1, c2, c3 = (q >> 32 & mask) ^ c1 ^ k0, q & mask, (p >> 32 & mask) ^ c3 ^ k1, p & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    if dtype == torch.float64:
        values = ((c0 << 20 | c1 >> 12).double() + 0.5) * 2.0**-52
    else:
        values = ((c0 >> 9).double() + 0.5) * 2.0**-23
    return values.reshape(shape).to(dtype)


def forward(log_alpha: Tensor, noise: Tensor | None, mode: int, temperature: float, low: float, high: float) -> Tensor:
    if mode == MEAN:
        terms = (weight * torch.sigmoid(log_alpha - shift) for shift, weight in thresholds(temperature, low, high))
        return sum(terms, torch.zeros_like(log_alpha)).clamp(max=1)  # rounding may exceed 1
    s = torch.sigmoid(_logit(log_alpha, noise, mode, temperature, low, high))
    return s if mode == OPEN else (s * (high - low) + low).clamp(0, 1)


def slopes(
    log_alpha: Tensor, noise: Tensor | None, mode: int, temperature: float, low: float, high: float
) -> tuple[Tensor, Tensor | None]:
    """dg / d log_alpha and dg / d noise."""
    if mode == MEAN:
        terms = (w * _sigmoid_slope(log_alpha - shift) for shift, w in thresholds(temperature, low, high))
        return sum(terms, torch.zeros_like(log_alpha)), None
    logit = _logit(log_alpha, noise, mode, temperature, low, high)
    if mode == OPEN:
        return _sigmoid_slope(logit), None
    stretched = torch.sigmoid(logit) * (high - low) + low
    settled = (stretched <= 0) | (stretched >= 1)  # false for NaN
    rate = 1 / temperature if mode == SAMPLE else 1.0
    slope = torch.where(settled, 0, (high - low) * rate * _sigmoid_slope(logit))
    if mode != SAMPLE:
        return slope, None
    assert noise is not None
    return slope, torch.where(settled, 0, slope / torch.where(settled, 1, noise * (1 - noise)))


def _logit(log_alpha: Tensor, noise: Tensor | None, mode: int, temperature: float, low: float, high: float) -> Tensor:
    """The argument of the sigmoid."""
    if mode == SAMPLE:
        assert noise is not None
        return (torch.logit(noise) + log_alpha) / temperature
    return log_alpha - temperature * math.log(-low / high) if mode == OPEN else log_alpha


def _sigmoid_slope(x: Tensor) -> Tensor:
    """The derivative of the sigmoid."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def span(low: float, high: float) -> tuple[float, float]:
    """y = log((v - low) / (high - v)) at v = 0, and the distance to v = 1, both limited to |y| <= SETTLED."""
    first = math.log(-low / high)
    start = max(first, -SETTLED)
    return start, min(math.log1p((high - low) / (high - 1) / -low) - (start - first), SETTLED - start)


def thresholds(temperature: float, low: float, high: float) -> list[tuple[float, float]]:
    """(c, w) with E[g] = sum of w sigma(log_alpha - c).

    E[g] is the integral of P(g > v) over v in [0, 1], computed by Gauss-Legendre quadrature in y = log((v - low) / (high - v)):
    in y it is smooth however close low and high are to 0 and 1. Panels are at most 2.5 / pi times the distance to the nearest
    singularities long, with 12 points each (the kernels use 16 points on panels twice as long).
    """
    # the 12-point rule on [-1, 1]; symmetric
    nodes = (0.1252334085114689, 0.3678314989981802, 0.5873179542866175, 0.7699026741943047, 0.9041172563704749,
             0.9815606342467193)  # fmt: skip
    weights = (0.2491470458134028, 0.2334925365383548, 0.2031674267230659, 0.1600783285433462, 0.1069393259953184,
               0.0471753363865118)  # fmt: skip
    start, length = span(low, high)
    panels = max(1, math.ceil(length * max(1.0, temperature) / 2.5))
    half = length / panels / 2
    out = []
    for panel in range(panels):
        for node, weight in zip(nodes, weights):
            for y in (start + (2 * panel + 1 + sign * node) * half for sign in (-1, 1)):
                density = (high - low) / (2 + math.exp(y) + math.exp(-y))
                out.append((temperature * y, weight * half * density))
    return out
