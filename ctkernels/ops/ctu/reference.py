"""The CT unit in plain torch: textbook forward, and closed-form partial derivatives.

Everything is elementwise and differentiable, broadcasts, and computes in its arguments' dtype. The forward deliberately
uses other algebra than the kernels (two branches, ``erfc``): the tests rest on the agreement of two independent
implementations. The partials are closed forms because autograd through the textbook expression loses up to every digit of
d/dbeta near beta = 1 (see this folder's README).

No intermediate of a finite result overflows, here or in decompositions of these functions in exported graphs: exponentials
take negative arguments, and ratios are clamped where everything that uses them has converged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

INV_SQRT2 = math.sqrt(0.5)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
TANH_LINEAR = math.sqrt(8.0 / math.pi)
TANH_CUBIC = 0.044715 * TANH_LINEAR
FAR = 1e3  # exp(-FAR) and erfc(FAR) are 0 in float64


class Knobs(NamedTuple):
    """beta, s = 1 - beta (+ eps), coeff, 1 - coeff, and the derivatives of beta and coeff by the op's parameters."""

    beta: Tensor
    s: Tensor
    coeff: Tensor
    coeff1: Tensor
    dbeta: Tensor | float
    dcoeff: Tensor | float
    eps: float

    def to(self, dtype: torch.dtype) -> Knobs:
        return Knobs(*(v.to(dtype) if isinstance(v, Tensor) else v for v in self))  # type: ignore[arg-type]


def knobs(beta: Tensor, coeff: Tensor, raw: bool, eps: float) -> Knobs:
    """In the parameters' precision. 1 - sigmoid(rho) has no digits left at rho > 17; sigmoid(-rho) has them all."""
    if not raw:
        return Knobs(beta, (1 - beta) + eps, coeff, 1 - coeff, 1.0, 1.0, eps)
    b, c, b1, c1 = torch.sigmoid(beta), torch.sigmoid(coeff), torch.sigmoid(-beta), torch.sigmoid(-coeff)
    return Knobs(b, b1 + eps, c, c1, b * b1, c * c1, eps)


class _Point(NamedTuple):
    """w, u = w / s and t = beta u; all 0 where the unit is the ``plain`` activation."""

    w: Tensor
    u: Tensor
    t: Tensor
    plain: Tensor


def _point(w: Tensor, k: Knobs) -> _Point:
    """The unit is plain where s = 0 or w is infinite; NaN is not plain."""
    sharp = k.s <= 0
    plain = sharp | torch.isinf(w)
    w, s = torch.where(plain, 0, w), torch.where(sharp, 1, k.s)
    largest = torch.finfo(w.dtype).max
    eta = (k.beta / s).clamp(max=largest)
    return _Point(w, (w / s).clamp(-largest, largest), (w * eta).clamp(-FAR, FAR), plain)


# At 0, both of these use the piece for w > 0: pieces that continue each other smoothly then have the right derivatives there, of
# any order, in sums and products as well.


def _positive(w: Tensor) -> Tensor:
    return torch.where(w < 0, 0, w)


def _magnitude(w: Tensor) -> Tensor:
    return torch.where(w < 0, -w, w)


def _distance(p: _Point) -> Tensor:
    """|u|, clamped to FAR, for functions that are constant beyond."""
    return _magnitude(p.u).clamp(max=FAR)


def _no_effect(*knobs: Tensor) -> Tensor:
    """0, or NaN if a knob is NaN: the contribution of knobs without effect."""
    return sum((knob * 0 for knob in knobs[1:]), knobs[0] * 0)


def logistic_forward(w: Tensor, k: Knobs) -> Tensor:
    """c w sigma(beta u) + (1 - c) s softplus(u): equation 8 of the Curvature Tuning paper."""
    p = _point(w, k)
    soft = _positive(p.w) + k.s * torch.log1p(torch.exp(-_distance(p)))
    y = k.coeff * p.w * torch.sigmoid(p.t) + k.coeff1 * soft
    return torch.where(p.plain, torch.relu(w) + _no_effect(k.s, k.coeff), y)


def gaussian_forward(w: Tensor, k: Knobs) -> Tensor:
    """c w Phi(beta u) + (1 - c) s (u Phi(u) + phi(u)): the GELU member of the family, exact at coeff=1, beta=1/2."""
    return _gelu_forward(w, k, _normal_cdf)


def tanh_forward(w: Tensor, k: Knobs) -> Tensor:
    """:func:`gaussian_forward` with GELU's tanh approximation of Phi(beta u): exactly that GELU at coeff=1, beta=1/2."""
    return _gelu_forward(w, k, lambda t: torch.sigmoid(tanh_gate_exponent(t)))


def tanh_gate_exponent(t: Tensor) -> Tensor:
    """g with sigmoid(g) = (1 + tanh(sqrt(2 / pi) (t + 0.044715 t^3))) / 2, the approximation of Phi(t)."""
    return t * (TANH_LINEAR + TANH_CUBIC * (t * t))


def _gelu_forward(w: Tensor, k: Knobs, gate: Callable[[Tensor], Tensor]) -> Tensor:
    p = _point(w, k)
    a = _distance(p)
    soft = _positive(p.w) + k.s * (_normal_pdf(a) - a * _normal_cdf(-a))
    y = k.coeff * p.w * gate(p.t) + k.coeff1 * soft
    return torch.where(p.plain, torch.relu(w) + _no_effect(k.s, k.coeff), y)


def _normal_cdf(u: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-u * INV_SQRT2)


def _normal_pdf(u: Tensor) -> Tensor:
    return INV_SQRT_2PI * torch.exp(-0.5 * u * u)


class Factors(NamedTuple):
    """A number small * large + rest - minus, factored so that its product with 0 is 0 even if small * large overflows."""

    small: Tensor
    large: Tensor
    rest: Tensor
    minus: Factors | None = None

    def scaled(self, g: Tensor | float) -> Factors:
        minus = None if self.minus is None else self.minus.scaled(g)
        return Factors(self.small * g, self.large, self.rest * g, minus)

    def times(self, g: Tensor) -> Tensor:
        value = g * self.small * self.large + g * self.rest
        if self.minus is None:
            return value
        other = self.minus.times(g)
        return torch.where(torch.isinf(value) & (value == other), 0, value - other)


class Partials(NamedTuple):
    """Derivatives of a unit by w, beta, coeff and slope. ``one_less_w``: 1 - d/dw, without cancellation."""

    w: Tensor
    one_less_w: Tensor
    beta: Factors
    coeff: Tensor
    slope: Tensor | None = None


def logistic_partials(w: Tensor, k: Knobs) -> Partials:
    """Of :func:`logistic_forward`."""
    p = _point(w, k)
    t, a = _magnitude(p.t), _distance(p)
    small, large = torch.sigmoid(-t), torch.sigmoid(t)
    rising, falling = torch.sigmoid(p.t), torch.sigmoid(-p.t)
    bend = p.t * rising * falling
    log_term = torch.log1p(torch.exp(-a))
    return _partials(
        w,
        k,
        p,
        k.coeff * (rising + bend) + k.coeff1 * torch.sigmoid(p.u),
        k.coeff * (falling - bend) + k.coeff1 * torch.sigmoid(-p.u),
        Factors(p.u * small, p.u * large, log_term + a * torch.sigmoid(-a)),
        -(_magnitude(p.w) * small + k.s * log_term),
    )


def gaussian_partials(w: Tensor, k: Knobs) -> Partials:
    """Of :func:`gaussian_forward`."""
    return _gelu_partials(w, k, _normal_cdf, _normal_pdf)


def tanh_partials(w: Tensor, k: Knobs) -> Partials:
    """Of :func:`tanh_forward`."""

    def gate(t: Tensor) -> Tensor:
        return torch.sigmoid(tanh_gate_exponent(t))

    def density(t: Tensor) -> Tensor:
        return gate(t) * gate(-t) * (TANH_LINEAR + 3 * TANH_CUBIC * (t * t))

    return _gelu_partials(w, k, gate, density)


def _gelu_partials(
    w: Tensor, k: Knobs, gate: Callable[[Tensor], Tensor], density: Callable[[Tensor], Tensor]
) -> Partials:
    p = _point(w, k)
    a = _distance(p)
    pdf_a, pdf_t = _normal_pdf(a), density(p.t)
    bend = p.t * pdf_t
    return _partials(
        w,
        k,
        p,
        k.coeff * (gate(p.t) + bend) + k.coeff1 * _normal_cdf(p.u),
        k.coeff * (gate(-p.t) - bend) + k.coeff1 * _normal_cdf(-p.u),
        Factors(p.u * pdf_t, p.u, pdf_a),
        -(_magnitude(p.w) * gate(-_magnitude(p.t)) + k.s * (pdf_a - a * _normal_cdf(-a))),
    )


def _partials(
    w: Tensor, k: Knobs, p: _Point, d_w: Tensor, one_less_d_w: Tensor, beta: Factors, d_coeff: Tensor
) -> Partials:
    """Completes the derivatives of a smooth unit with those of the plain one. ``beta``: of d/dbeta, without coeff factors."""
    none = torch.where(torch.isnan(w), w, 0)
    step = torch.where(torch.isnan(w), w, (w > 0).to(w.dtype)) + _no_effect(k.s, k.coeff)
    rest = torch.where(p.plain, none + _no_effect(k.s, k.coeff), -k.coeff1 * beta.rest)
    return Partials(
        torch.where(p.plain, step, d_w),
        torch.where(p.plain, 1 - step, one_less_d_w),
        Factors(k.coeff * (1 + k.eps) * beta.small, beta.large, rest),
        torch.where(p.plain, none + _no_effect(k.s), d_coeff),
    )


def _excess(w: Tensor, k: Knobs) -> Tensor:
    """phi(w) - relu(w) of the logistic unit, without cancellation: an even function that vanishes away from 0."""
    p = _point(w, k)
    soft = k.s * torch.log1p(torch.exp(-_distance(p)))
    delta = k.coeff1 * soft - k.coeff * _magnitude(p.w) * torch.sigmoid(-_magnitude(p.t))
    return torch.where(p.plain, _no_effect(k.s, k.coeff), delta)


def _leaky(slope: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """slope, 1 - slope (subtracted in the slope's precision), and a sign: -1 for slopes above 1, where max(slope x, x) becomes
    min(slope x, x)."""
    sign = torch.where(slope > 1, -torch.ones_like(slope), torch.ones_like(slope))
    return slope.to(dtype), (1 - slope).to(dtype), sign.to(dtype)


def forward(w: Tensor, slope: Tensor | None, k: Knobs, kind: str) -> Tensor:
    """The unit of member ``kind`` at pre-activation ``w``."""
    if kind == "gaussian":
        return gaussian_forward(w, k)
    if kind == "tanh":
        return tanh_forward(w, k)
    if kind == "leaky":
        assert slope is not None
        slope, rest, sign = _leaky(slope, w.dtype)
        plain = (k.s <= 0) | torch.isinf(w)
        within = torch.where(plain, 0, w)
        y = slope * within + sign * logistic_forward(sign * rest * within, k)
        return torch.where(plain, torch.where(w > 0, w, slope * w) + _no_effect(k.s, k.coeff, slope), y)
    if kind == "relu6":
        base = torch.where(w < 0, 0, torch.where(w >= 6, 6, w))
        return base + (_excess(w, k) - _excess(w - 6, k))
    return logistic_forward(w, k)


def partials(w: Tensor, slope: Tensor | None, k: Knobs, kind: str) -> Partials:
    """Of :func:`forward`, with respect to the op's parameters (logits if ``knobs`` was raw)."""
    if kind == "gaussian":
        d = gaussian_partials(w, k)
    elif kind == "tanh":
        d = tanh_partials(w, k)
    elif kind == "leaky":
        assert slope is not None
        d = _leaky_partials(w, slope, k)
    elif kind == "relu6":
        low, high = logistic_partials(w, k), logistic_partials(w - 6, k)
        d = Partials(low.w - high.w, 1 - low.w + high.w, low.beta._replace(minus=high.beta), low.coeff - high.coeff)
    else:
        d = logistic_partials(w, k)
    return d._replace(beta=d.beta.scaled(k.dbeta), coeff=d.coeff * k.dcoeff)


def _leaky_partials(w: Tensor, slope: Tensor, k: Knobs) -> Partials:
    slope, rest, sign = _leaky(slope, w.dtype)
    infinite = torch.isinf(w)
    within = torch.where(infinite, 0, w)
    d = logistic_partials(torch.where(infinite, w + _no_effect(slope), sign * rest * within), k)
    d_slope = torch.where(infinite & (w < 0), w, within * d.one_less_w) + _no_effect(k.s, k.coeff, slope)
    return Partials(slope + rest * d.w, rest * d.one_less_w, d.beta.scaled(sign), sign * d.coeff, d_slope)
