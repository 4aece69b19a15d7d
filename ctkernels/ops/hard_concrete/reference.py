"""Hard-concrete gates in plain torch, for log_alpha and noise of one shape (Louizos, Welling, Kingma 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# How a gate is read off its logit: sampled, deterministic as published, its expectation, its probability of being open.
SAMPLE, CLIP, MEAN, OPEN = range(4)
HOTTEST_MEAN = 10.0  # temperature of an expectation, which takes 2,500 points at worst
SETTLED = 38.0  # the derivative of the sigmoid is below 1e-16 there


def uniform(seed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Numbers in (0, 1), 23 random bits and a half (52 for float64): word 0 (and 1) of Philox 4x32-10 (Salmon et al. 2011)
    with the 64-bit ``seed`` as key and an element's index as counter. The same on every device and in every kernel."""
    mask = 0xFFFFFFFF
    index = torch.arange(math.prod(shape), device=seed.device)
    zero = torch.zeros_like(index)
    c0, c1, c2, c3 = index & mask, index >> 32, zero, zero
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        p, q = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around, and keeps all 64 bits
        c0, c1, c2, c3 = (q >> 32 & mask) ^ c1 ^ k0, q & mask, (p >> 32 & mask) ^ c3 ^ k1, p & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    if dtype == torch.float64:
        values = ((c0 << 20 | c1 >> 12).double() + 0.5) * 2.0**-52
    else:
        values = ((c0 >> 9).double() + 0.5) * 2.0**-23
    return values.reshape(shape).to(dtype)


def _simple(x: Tensor, low: float, high: float) -> Tensor:
    return (x * (high - low) + low).clamp(0, 1)


def forward(log_alpha: Tensor, noise: Tensor | None, mode: int, temperature: float, low: float, high: float) -> Tensor:
    if mode == MEAN:
        terms = (weight * torch.sigmoid(log_alpha - shift) for shift, weight in thresholds(temperature, low, high))
        return sum(terms, torch.zeros_like(log_alpha)).clamp(max=1)  # rounding may lead beyond
    s = torch.sigmoid(_logit(log_alpha, noise, mode, temperature, low, high))
    return s if mode == OPEN else _simple(s, low, high)


def slopes(
    log_alpha: Tensor, noise: Tensor | None, mode: int, temperature: float, low: float, high: float
) -> tuple[Tensor, Tensor | None]:
    """dg / d log_alpha and dg / d noise."""
    if mode == MEAN:
        terms = (w * _bell(log_alpha - shift) for shift, w in thresholds(temperature, low, high))
        return sum(terms, torch.zeros_like(log_alpha)), None
    logit = _logit(log_alpha, noise, mode, temperature, low, high)
    if mode == OPEN:
        return _bell(logit), None
    stretched = torch.sigmoid(logit) * (high - low) + low
    settled = (stretched <= 0) | (stretched >= 1)  # a NaN is not
    rate = 1 / temperature if mode == SAMPLE else 1.0
    slope = torch.where(settled, 0, (high - low) * rate * _bell(logit))
    if mode != SAMPLE:
        return slope, None
    assert noise is not None
    return slope, torch.where(settled, 0, slope / torch.where(settled, 1, noise * (1 - noise)))


def _logit(log_alpha: Tensor, noise: Tensor | None, mode: int, temperature: float, low: float, high: float) -> Tensor:
    """What the sigmoid is taken of."""
    if mode == SAMPLE:
        assert noise is not None
        return (torch.logit(noise) + log_alpha) / temperature
    return log_alpha - temperature * math.log(-low / high) if mode == OPEN else log_alpha


def _bell(x: Tensor) -> Tensor:
    """The derivative of the sigmoid."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def span(low: float, high: float) -> tuple[float, float]:
    """Where y = log((v - low) / (high - v)) is at v = 0, and how far from there to v = 1, within what counts."""
    first = math.log(-low / high)
    start = max(first, -SETTLED)
    return start, min(math.log1p((high - low) / (high - 1) / -low) - (start - first), SETTLED - start)


def thresholds(temperature: float, low: float, high: float) -> list[tuple[float, float]]:
    """(c, w) with E[g] = sum of w sigma(log_alpha - c).

    E[g] is the integral over v in [0, 1] of P(g > v), here by Gauss-Legendre in y = log((v - low) / (high - v)), in which it is
    smooth however close low and high come to 0 and 1: on panels of at most 2.5 of the distance of the nearest singularities
    over pi, with twelve points, where the kernels use sixteen points on panels twice as long.
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
