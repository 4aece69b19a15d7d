"""Hard-concrete gates in plain torch, for log_alpha and noise of one shape (Louizos, Welling, Kingma 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# How a gate is read off its logit: sampled, deterministic as published, its expectation, its probability of being open.
SAMPLE, CLIP, MEAN, OPEN = range(4)


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
    if mode == SAMPLE:
        assert noise is not None
        return _simple(torch.sigmoid((torch.logit(noise) + log_alpha) / temperature), low, high)
    if mode == CLIP:
        return _simple(torch.sigmoid(log_alpha), low, high)
    if mode == OPEN:
        return torch.sigmoid(log_alpha - temperature * math.log(-low / high))
    terms = (w * torch.sigmoid(log_alpha - c) for c, w in thresholds(temperature, low, high))
    return sum(terms, torch.zeros_like(log_alpha))


def slopes(
    log_alpha: Tensor, noise: Tensor | None, mode: int, temperature: float, low: float, high: float
) -> tuple[Tensor, Tensor | None]:
    """dg / d log_alpha and dg / d noise."""
    if mode == OPEN:
        p = forward(log_alpha, None, OPEN, temperature, low, high)
        return p * (1 - p), None
    if mode == MEAN:
        terms = ((w, torch.sigmoid(log_alpha - c)) for c, w in thresholds(temperature, low, high))
        return sum((w * p * (1 - p) for w, p in terms), torch.zeros_like(log_alpha)), None
    if mode == CLIP:
        s, rate = torch.sigmoid(log_alpha), 1.0
    else:
        assert noise is not None
        s, rate = torch.sigmoid((torch.logit(noise) + log_alpha) / temperature), 1.0 / temperature
    stretched = s * (high - low) + low
    inside = (stretched > 0) & (stretched < 1)
    slope = torch.where(inside, (high - low) * rate * s * (1 - s), torch.zeros_like(s))
    return slope, None if noise is None or mode != SAMPLE else slope / (noise * (1 - noise)).clamp_min(1e-38)


def thresholds(temperature: float, low: float, high: float) -> list[tuple[float, float]]:
    """(c, w) with E[g] = sum of w sigma(log_alpha - c): E[g] is the integral over v in [0, 1] of P(g > v), here by
    Gauss-Legendre on two panels, where the kernels use sixteen points on one."""
    # the 12-point rule on [-1, 1]; symmetric
    nodes = (0.1252334085114689, 0.3678314989981802, 0.5873179542866175, 0.7699026741943047, 0.9041172563704749,
             0.9815606342467193)  # fmt: skip
    weights = (0.2491470458134028, 0.2334925365383548, 0.2031674267230659, 0.1600783285433462, 0.1069393259953184,
               0.0471753363865118)  # fmt: skip
    out = []
    for panel in (0.0, 0.5):
        for node, weight in zip(nodes, weights):
            for sign in (-1.0, 1.0):
                v = panel + 0.25 * (1 + sign * node)
                out.append((temperature * math.log((v - low) / (high - v)), 0.25 * weight))
    return out
