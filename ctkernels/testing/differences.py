"""Finite differences with a bound on their error: truncation, kinks and rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Terms = Callable[[dict[str, Tensor]], Tensor]  # maps float64 leaves, by name, to float64 terms (n,) of a sum
EPS = torch.finfo(torch.float64).eps
STEP = EPS ** (1 / 3)  # balances truncation and rounding for a function with a length scale of 1
SHRINK = (1, 16, 256)  # smaller steps, for shorter length scales or many kinks
POINTS = 16


def central_difference(
    terms: Terms, leaves: dict[str, Tensor], name: str, direction: Tensor, here: Tensor, noise: float
) -> tuple[Tensor, float]:
    """Central differences D(h/2) of ``terms`` along a direction of one leaf, and a bound on the error of their sum.

    Let f_k be a term k half steps away, D(h) = (f_2 - f_-2) / 2h and D(h/2) = (f_1 - f_-1) / h.

    - Truncation: h^2 / 6 times the third derivative for D(h), a quarter of that for D(h/2): a third of their difference.
    - A kink at d < h/2, where the slope changes by J, moves D(h/2) by J (h - 2d) / 2h, the difference of the two by
      J d / 2h, and the fourth difference F = f_2 - 4 f_1 + 6 f_0 - 4 f_-1 + f_-2 by J (3d - h). As h - 2d <= d + |3d - h|,
      the difference plus |F| / 2h bounds the change of D(h/2).
    - Rounding: the possible difference of two values (``noise``, and the last rounding of every term), over h.

    Uses the step h with the smallest bound.

    Args:
        here: ``terms(leaves)``.
        noise: :func:`rounding_noise` of ``terms``.
    """
    leaf = leaves[name]
    best: tuple[Tensor, float] | None = None
    for shrink in SHRINK:
        h = STEP * (1 + float(leaf.abs().max())) / shrink
        f = {k: terms(leaves | {name: leaf + k * h / 2 * direction}) for k in (-2, -1, 1, 2)}
        wide, narrow = (f[2] - f[-2]) / (2 * h), (f[1] - f[-1]) / h
        fourth = f[2] - 4 * f[1] + 6 * here - 4 * f[-1] + f[-2]
        missed = float((wide - narrow).abs().sum() + fourth.abs().sum() / (2 * h))
        rounding = (noise + EPS * float(here.abs().sum()) + torch.finfo(torch.float64).tiny) / h
        if best is None or missed + rounding < best[1]:
            best = (narrow, missed + rounding)
    assert best is not None
    return best


def rounding_noise(terms: Terms, leaves: dict[str, Tensor], seed: int = 0) -> float:
    """Largest difference between two values of the sum of ``terms`` due to rounding alone, measured term by term.

    Fits a cubic to values at random points on a line, as close together as those of the smallest step, and takes the residuals
    (roundings at equally spaced points can lie on a line, too). Two values differ by at most twice the largest rounding; with
    4 coefficients fitted to n points, the residuals keep (n - 4) / n of the variance.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = {}
    for name, leaf in leaves.items():
        if leaf.numel():
            sign = torch.randint(0, 2, leaf.shape, generator=generator) * 2 - 1
            steps[name] = STEP / SHRINK[-1] * (1 + leaf.abs().max()) * sign.to(leaf.device)
    points = 2 * torch.rand(POINTS, generator=generator, dtype=torch.float64) - 1
    values = torch.stack(
        [terms(leaves | {n: leaves[n] + k * step for n, step in steps.items()}) for k in points.tolist()]
    )
    basis = torch.linalg.qr(torch.vander(points, 4)).Q
    residuals = values - basis @ (basis.T @ values)
    residuals = residuals - basis @ (basis.T @ residuals)  # again, for the rounding of the first projection
    return 2 * math.sqrt(POINTS / (POINTS - 4)) * float(residuals.abs().amax(0).sum())
