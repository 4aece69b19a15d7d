"""The CT unit in plain torch: the textbook forward, and the closed-form partial derivatives.

Everything here is elementwise and differentiable, broadcasts, and works in the dtype it is given. The forward is written
with other algebra than the kernels (``logaddexp``, ``erfc``), on purpose: agreement between two independent writings is
what the tests rest on. The partials are closed forms because autograd through the textbook expression loses up to every
digit of d/dbeta near beta = 1 (see this folder's README).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

INV_SQRT2 = math.sqrt(0.5)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)


class Knobs(NamedTuple):
    """beta, s = 1 - beta (+ eps) and coeff, with the chain factors from the given parameters to (beta, coeff)."""

    beta: Tensor
    s: Tensor
    coeff: Tensor
    dbeta: Tensor | float
    dcoeff: Tensor | float
    eps: float

    def to(self, dtype: torch.dtype) -> Knobs:
        beta, s, coeff, dbeta, dcoeff = (v.to(dtype) if isinstance(v, Tensor) else v for v in self[:5])
        return Knobs(beta, s, coeff, dbeta, dcoeff, self.eps)  # type: ignore[arg-type]


def knobs(beta: Tensor, coeff: Tensor, raw: bool, eps: float) -> Knobs:
    if not raw:
        return Knobs(beta, (1 - beta) + eps, coeff, 1.0, 1.0, eps)
    b, c = torch.sigmoid(beta), torch.sigmoid(coeff)
    one_minus_b, one_minus_c = (
        torch.sigmoid(-beta),
        torch.sigmoid(-coeff),
    )  # 1 - sigmoid(rho) has no digits left at rho > 17
    return Knobs(b, one_minus_b + eps, c, b * one_minus_b, c * one_minus_c, eps)


def _ratio(w: Tensor, k: Knobs) -> tuple[Tensor, Tensor]:
    """u = w / s where s > 0 (0 elsewhere), kept finite, and the mask of entries where the unit is smooth."""
    smooth = (k.s > 0).expand(torch.broadcast_shapes(w.shape, k.s.shape))
    u = w / torch.where(k.s > 0, k.s, torch.ones_like(k.s))
    limit = torch.finfo(w.dtype).max ** 0.45  # u * u must not overflow
    return torch.where(smooth, u.clamp(-limit, limit), torch.zeros_like(u)), smooth & ~torch.isinf(w)


def logistic_forward(w: Tensor, k: Knobs) -> Tensor:
    """c w sigma(beta u) + (1 - c) s softplus(u): equation 8 of the Curvature Tuning paper."""
    u, smooth = _ratio(w, k)
    soft = torch.logaddexp(u, torch.zeros_like(u))
    y = k.coeff * w * torch.sigmoid(k.beta * u) + (1 - k.coeff) * k.s * soft
    return torch.where(smooth, y, torch.relu(w))


def gaussian_forward(w: Tensor, k: Knobs) -> Tensor:
    """c w Phi(beta u) + (1 - c) s (u Phi(u) + phi(u)): the GELU member of the family, exact at coeff=1, beta=1/2."""
    u, smooth = _ratio(w, k)
    soft = u * _normal_cdf(u) + _normal_pdf(u)
    y = k.coeff * w * _normal_cdf(k.beta * u) + (1 - k.coeff) * k.s * soft
    return torch.where(smooth, y, torch.relu(w))


def _normal_cdf(u: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-u * INV_SQRT2)


def _normal_pdf(u: Tensor) -> Tensor:
    return INV_SQRT_2PI * torch.exp(-0.5 * u * u)


def logistic_partials(w: Tensor, k: Knobs) -> tuple[Tensor, Tensor, Tensor]:
    """(d/dw, d/dbeta, d/dcoeff) of the logistic unit, at the (beta, coeff) in ``k``."""
    u, smooth = _ratio(w, k)
    t = k.beta * u
    p, q = torch.sigmoid(t), torch.sigmoid(-t)
    a = u.abs()
    log_term = torch.log1p(torch.exp(-a))
    entropy = log_term + a * torch.sigmoid(-a)
    d_w = k.coeff * (p + t * p * q) + (1 - k.coeff) * torch.sigmoid(u)
    d_beta = k.coeff * (u * u * p * q) * (1 + k.eps) - (1 - k.coeff) * entropy
    d_coeff = -(k.s * (a * torch.sigmoid(-t.abs()) + log_term))
    return _at_kink(w, smooth, d_w, d_beta, d_coeff)


def gaussian_partials(w: Tensor, k: Knobs) -> tuple[Tensor, Tensor, Tensor]:
    """(d/dw, d/dbeta, d/dcoeff) of the Gaussian unit, at the (beta, coeff) in ``k``."""
    u, smooth = _ratio(w, k)
    t = k.beta * u
    a = u.abs()
    pdf_u, pdf_t = _normal_pdf(u), _normal_pdf(t)
    d_w = k.coeff * (_normal_cdf(t) + t * pdf_t) + (1 - k.coeff) * _normal_cdf(u)
    d_beta = k.coeff * (u * u * pdf_t) * (1 + k.eps) - (1 - k.coeff) * pdf_u
    d_coeff = -(k.s * (a * _normal_cdf(-t.abs()) + pdf_u - a * _normal_cdf(-a)))
    return _at_kink(w, smooth, d_w, d_beta, d_coeff)


def _at_kink(w: Tensor, smooth: Tensor, d_w: Tensor, d_beta: Tensor, d_coeff: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where s = 0 (or w is infinite) the unit is the ReLU and the knobs have no effect; NaN stays NaN."""
    zero = torch.where(torch.isnan(w), w, torch.zeros_like(w))
    step = torch.where(torch.isnan(w), w, (w > 0).to(w.dtype))
    return torch.where(smooth, d_w, step), torch.where(smooth, d_beta, zero), torch.where(smooth, d_coeff, zero)


def _excess(w: Tensor, k: Knobs) -> Tensor:
    """phi(w) - relu(w) of the logistic unit without the cancellation: an even function that vanishes away from 0."""
    u, smooth = _ratio(w, k)
    a = u.abs()
    delta = k.s * ((1 - k.coeff) * torch.log1p(torch.exp(-a)) - k.coeff * a * torch.sigmoid(-k.beta * a))
    return torch.where(smooth, delta, torch.zeros_like(delta))


def _orientation(slope: Tensor) -> Tensor:
    """+1 up to slope 1, -1 above: max(slope x, x) turns into min(slope x, x) there."""
    return torch.where(slope > 1, -torch.ones_like(slope), torch.ones_like(slope))


def forward(w: Tensor, slope: Tensor | None, k: Knobs, kind: str) -> Tensor:
    """The unit of family member ``kind`` at pre-activation ``w``."""
    if kind == "gaussian":
        return gaussian_forward(w, k)
    if kind == "leaky":
        assert slope is not None
        smooth = (k.s > 0) & ~torch.isinf(w)
        y = slope * w + _orientation(slope) * logistic_forward((1 - slope).abs() * w, k)
        return torch.where(smooth, y, torch.where(w > 0, w, slope * w))
    if kind == "relu6":
        return w.clamp(0, 6) + _excess(w, k) - _excess(w - 6, k)
    return logistic_forward(w, k)


def partials(w: Tensor, slope: Tensor | None, k: Knobs, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(d/dw, d/dparam_beta, d/dparam_coeff, d/dslope), the middle two with the chain factor of raw parameters applied."""
    d_slope = None
    if kind == "gaussian":
        d_w, d_beta, d_coeff = gaussian_partials(w, k)
    elif kind == "leaky":
        assert slope is not None
        sign = _orientation(slope)
        d_v, d_beta, d_coeff = logistic_partials((1 - slope).abs() * w, k)
        d_w, d_slope = slope + (1 - slope) * d_v, w * (1 - d_v)
        d_beta, d_coeff = sign * d_beta, sign * d_coeff
    elif kind == "relu6":
        (low_w, low_b, low_c), (high_w, high_b, high_c) = logistic_partials(w, k), logistic_partials(w - 6, k)
        d_w, d_beta, d_coeff = low_w - high_w, low_b - high_b, low_c - high_c
    else:
        d_w, d_beta, d_coeff = logistic_partials(w, k)
    return d_w, d_beta * k.dbeta, d_coeff * k.dcoeff, d_slope
