"""Expected results: the textbook formulas in numpy's long double (64-bit mantissa, decimal exponents to 4932).

Every quantity has an allowed error from the documented precision: a fraction of the magnitudes of its terms
(ctkernels/ops/ctu/README.md), plus the effect of rounding in a prologue. Written from the papers, independent of the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

Array = np.ndarray
WIDE = np.longdouble
FLUSHED = WIDE(2) ** -118  # magnitudes below 2^-120 are flushed to zero; of float64 those below 2^-960


@dataclass
class Exact:
    """An expected result. ``error``: allowed error before rounding to its dtype. ``free``: where any value is allowed."""

    value: Array
    error: Array
    free: Array


@dataclass
class Grade:
    """The documented precision of a dtype: the allowed error as a fraction ``share`` of the terms' magnitudes, and of rounding.

    exponent: allowed relative error of an exponent, as a multiple of ``share``. The kernels keep exponents as unevaluated sums.
    The reference rounds them: up to 7 half ulps of t = beta (1 - slope) w / s, for beta, s, 1 - slope (two), the quotient and
    the products; a Gaussian squares it. 4 eps suffices for both: e^-t changes by 7/2 eps t, and e^(-t^2 / 2), which has no
    slope, by (2 * 4 + 1)/2 eps t^2 / 2.

    cubic: the same for the exponent of the tanh gate, whose square, sum and product are rounded too: 6 eps. In float64 the
    kernels round it as well.
    """

    share: float
    eps: float
    largest: float
    least: float
    exponent: float = 0.0
    cubic: float = 0.0

    @staticmethod
    def of(dtype: torch.dtype, reference: bool = False) -> Grade:
        if dtype == torch.float64:
            share, eps = 4e-13, 2.0**-52
            grade = Grade(share, eps, float(np.finfo(np.float64).max), float(WIDE(2) ** -958), cubic=6 * eps / share)
        else:
            share = 1e-5 if dtype == torch.float32 else 2e-4
            grade = Grade(share, 2.0**-23, float(np.finfo(np.float32).max), float(FLUSHED))
        rounding = grade.eps / grade.share
        return replace(grade, exponent=4 * rounding, cubic=6 * rounding) if reference else grade


def wide(t: torch.Tensor) -> Array:
    with torch.no_grad():
        plain = t.detach().as_subclass(torch.Tensor).double().resolve_neg()
    return plain.numpy().astype(WIDE)


@dataclass
class Values:
    """The tensors of a call as long doubles, with their torch ``dtypes``. ``reference``: whether plain torch computes it."""

    arrays: dict[str, Array]
    dtypes: dict[str, torch.dtype]
    reference: bool = False


def _sigmoid(t: Array) -> Array:
    e = np.exp(-np.abs(t))
    return np.where(t < 0, e, WIDE(1)) / (1 + e)


# ---- the CT unit ------------------------------------------------------------------------------------------------------


@dataclass
class _Terms:
    """A unit and its derivatives by w, beta and coeff: of each the value and the sum of the terms' magnitudes, plus the tails'
    errors from their exponents, of ``exponent`` relative to these."""

    y: Array
    w: Array
    beta: Array
    coeff: Array
    y_terms: Array
    w_terms: Array
    beta_terms: Array
    coeff_terms: Array


@dataclass
class _Knobs:
    """``s`` and ``c1``: 1 - beta + eps and 1 - c. ``exponent``, ``cubic``: of :class:`Grade`."""

    beta: Array
    s: Array
    c: Array
    c1: Array
    eps: float
    exponent: float
    cubic: float


_CUBIC = WIDE(0.044715)
_erfc = np.frompyfunc(lambda t: math.erfc(t), 1, 1)


def _cdf(t: Array) -> Array:
    if not t.size:
        return t
    return WIDE(0.5) * np.asarray(_erfc(np.asarray(-t / np.sqrt(WIDE(2)), np.float64)), WIDE)


def _pdf(t: Array) -> Array:
    return np.exp(-t * t / 2) / np.sqrt(2 * WIDE(np.pi))


def _logistic(w: Array, k: _Knobs) -> _Terms:
    beta, s, c, c1, exponent = k.beta, k.s, k.c, k.c1, k.exponent
    u = w / s
    t, a = beta * u, np.abs(u)
    p, q = _sigmoid(t), _sigmoid(-t)
    log_term = np.log1p(np.exp(-a))
    soft = np.maximum(u, 0) + log_term
    entropy = log_term + a * _sigmoid(-a)
    bell = c * u * u * p * q * (1 + WIDE(k.eps))
    d_c = np.abs(w) * _sigmoid(-np.abs(t)) + s * log_term
    y = c * w * p + c1 * s * soft
    off_t, off_u = exponent * np.abs(t) * p * q, exponent * a * _sigmoid(-a)  # errors of sigma(t) and of the log term
    return _Terms(
        y,
        c * (p + t * p * q) + c1 * _sigmoid(u),
        bell - c1 * entropy,
        -d_c,
        np.abs(c * w * p) + c1 * s * soft + c * np.abs(w) * off_t + c1 * s * off_u,
        # q: 1 - h, where it is read off from h
        c * (p + np.abs(t) * p * q) + c1 * _sigmoid(u) + q + c * (1 + np.abs(t)) * off_t + c1 * off_u,
        bell * (1 + exponent * np.abs(t)) + c1 * (entropy + a * off_u),
        d_c + np.abs(w) * off_t + s * off_u,
    )


def _tanh_gate(t: Array) -> Array:
    return _sigmoid(np.sqrt(8 / WIDE(np.pi)) * t * (1 + _CUBIC * t * t))


def _tanh_density(t: Array) -> Array:
    return _tanh_gate(t) * _tanh_gate(-t) * np.sqrt(8 / WIDE(np.pi)) * (1 + 3 * _CUBIC * t * t)


def _gelu(w: Array, k: _Knobs, tanh: bool) -> _Terms:
    beta, s, c, c1, exponent = k.beta, k.s, k.c, k.c1, k.exponent
    u = w / s
    t, a = np.clip(beta * u, -1e3, 1e3), np.abs(u)  # settled there
    gate, density = (_tanh_gate, _tanh_density) if tanh else (_cdf, _pdf)
    bell = c * u * u * density(t) * (1 + WIDE(k.eps))
    # w gate - s soft without its cancellation: both are relu(w) but for tails
    tails = [np.abs(w) * gate(-np.abs(t)), s * _pdf(u), -s * a * _cdf(-a)]
    y_terms = [c * w * gate(t), c1 * s * np.maximum(u, 0), c1 * s * _pdf(u), -c1 * s * a * _cdf(-a)]
    w_terms = [c * gate(t), c * t * density(t), c1 * _cdf(u)]
    # How far off t may be, the gate by |t| times its density, and the density by `steep` times itself.
    off, steep = (k.cubic, 3 + np.abs(t) * (1.6 + 0.2141 * t * t)) if tanh else (exponent, t * t)
    off_t, off_u = off * np.abs(t) * density(t), exponent * a * _pdf(u)
    return _Terms(
        sum(y_terms),
        sum(w_terms),
        bell - c1 * _pdf(u),
        -sum(tails),
        sum(np.abs(v) for v in y_terms) + c * np.abs(w) * off_t + 2 * c1 * s * a * off_u,
        sum(np.abs(v) for v in w_terms) + gate(-np.abs(t)) + c * (1 + steep) * off_t + c1 * off_u,
        bell * (1 + off * steep) + c1 * (_pdf(u) + a * off_u),
        sum(np.abs(v) for v in tails) + np.abs(w) * off_t + 2 * s * a * off_u,
    )


def _excess(w: Array, k: _Knobs, reach: Array | float = 1.0) -> _Terms:
    """The logistic unit minus the ReLU at ``reach`` w, without cancellation for large w. The sign of w decides the side of 0,
    also for a ``reach`` of 0."""
    beta, s, c, c1, exponent = k.beta, k.s, k.c, k.c1, k.exponent
    found = _logistic(reach * w, k)
    a = np.abs(reach * w)
    parts = [c1 * s * np.log1p(np.exp(-a / s)), -c * a * _sigmoid(-beta * a / s)]
    t = beta * a / s
    off = exponent * np.stack([a / s, t])
    found.y, found.y_terms = sum(parts), sum(np.abs(p) * (1 + o) for p, o in zip(parts, off))
    h = c * _sigmoid(-t) * (1 - t * _sigmoid(t)) + c1 * _sigmoid(-a / s)
    found.w = np.where(w > 0, -h, h)
    return found


def _unit(member: str, w: Array, slope: Array, k: _Knobs) -> tuple[_Terms, Array, Array]:
    """Return (the smooth unit, its derivative by the slope, the terms of that derivative)."""
    zero = np.zeros_like(w)
    if member in ("gelu", "gelu_tanh"):
        return _gelu(w, k, member == "gelu_tanh"), zero, zero
    if member in ("leaky_relu", "prelu"):
        sign, up, reach = np.where(slope > 1, WIDE(-1), WIDE(1)), (w > 0).astype(WIDE), np.abs(1 - slope)
        inner = _excess(w, k, reach)
        base = np.where(w > 0, w, slope * w)
        terms = _Terms(
            base + sign * inner.y,
            np.where(w > 0, WIDE(1), slope) + (1 - slope) * inner.w,
            sign * inner.beta,
            sign * inner.coeff,
            np.abs(slope * w) + np.abs(reach * w) + inner.y_terms + np.abs(w),
            np.abs(slope) + reach * inner.w_terms + 1,
            inner.beta_terms,
            inner.coeff_terms,
        )
        return terms, (1 - up) * w - w * inner.w, np.abs(w) * (1 + inner.w_terms)
    if member == "relu6":
        low, high = (_excess(v, k) for v in (w, w - 6))
        base, step = np.clip(w, 0, 6), (w > 0).astype(WIDE) - (w > 6).astype(WIDE)
        terms = _Terms(
            base + low.y - high.y,
            step + low.w - high.w,
            low.beta - high.beta,
            low.coeff - high.coeff,
            base + low.y_terms + high.y_terms,
            low.w_terms + high.w_terms + 1,
            low.beta_terms + high.beta_terms,
            low.coeff_terms + high.coeff_terms,
        )
        return terms, zero, zero
    return _logistic(w, k), zero, zero


def _plain(member: str, w: Array, slope: Array) -> tuple[Array, Array, Array]:
    """The plain activation for beta = 1 or infinite w, its derivative, and its derivative by the slope."""
    up = (w > 0).astype(WIDE)
    if member == "relu6":
        return np.clip(w, 0, 6), up - (w > 6), np.zeros_like(w)
    if member in ("leaky_relu", "prelu"):
        return np.where(w > 0, w, slope * w), np.where(w > 0, WIDE(1), slope), np.where(w > 0, WIDE(0), w)
    return np.where(w > 0, w, WIDE(0)), up, np.zeros_like(w)


def ctu(values: Values, options: dict[str, Any], dy: Array | None) -> dict[str, Exact]:
    """Return "y" and, with ``dy``, the gradient of every argument."""
    given, kinds = values.arrays, values.dtypes
    x = given["x"]
    member, raw, eps = options.get("activation", "relu"), options.get("raw", False), options.get("eps", 0.0)
    dtype = kinds["x"]
    if "residual" in kinds:
        dtype = torch.promote_types(dtype, kinds["residual"])
    grade = Grade.of(dtype, values.reference)
    dim = options.get("channel_dim")

    def along(p: Array) -> Array:
        """A parameter in a shape that broadcasts with x."""
        if p.size == 1:
            return np.broadcast_to(p.reshape(()), x.shape)
        shape = [1] * x.ndim
        shape[dim] = p.size
        return np.broadcast_to(p.reshape(shape), x.shape)

    def reduced(v: Array, p: Array) -> Array:
        if p.size == 1:
            return v.sum().reshape(p.shape)
        return np.moveaxis(v, dim, 0).reshape(p.size, v.size // max(p.size, 1)).sum(1).reshape(p.shape)

    beta_in, coeff_in = along(given["beta"]), along(given.get("coeff", np.asarray(WIDE(0.5))))
    slope = along(given.get("negative_slope", np.asarray(WIDE(0.01))))
    if raw:
        beta, s0, c, c1 = _sigmoid(beta_in), _sigmoid(-beta_in), _sigmoid(coeff_in), _sigmoid(-coeff_in)
        d_beta_in, d_coeff_in = beta * s0, c * c1
    else:
        beta, s0, c, c1 = beta_in, 1 - beta_in, coeff_in, 1 - coeff_in
        d_beta_in = d_coeff_in = np.ones_like(x)
    s = s0 + WIDE(eps)
    w, prologue = x, np.zeros_like(x)
    if "scale" in given:
        w = w * along(given["scale"])
        prologue = np.abs(w)
    for name in ("shift", "residual"):
        if name in given:
            part = along(given[name]) if name == "shift" else given[name]
            w, prologue = w + part, np.maximum(prologue, np.abs(w)) + np.abs(part)
    leaky = member in ("leaky_relu", "prelu")
    lost = np.isnan(w) | np.isnan(beta) | np.isnan(c) | (np.isnan(slope) if leaky else False)
    smooth = (s > 0) & np.isfinite(w) & ~lost
    fields = (np.where(smooth, v, other) for v, other in ((beta, 0), (s, 1), (c, 0), (c1, 0)))
    knobs = _Knobs(*fields, eps, grade.exponent, grade.cubic)
    terms, d_slope, slope_terms = _unit(member, np.where(smooth, w, WIDE(0)), np.where(smooth, slope, 0), knobs)
    hard_y, hard_w, hard_slope = _plain(member, w, slope)
    nan = WIDE(np.nan)

    def chosen(soft: Array, hard: Any) -> Array:
        return np.where(smooth, soft, np.where(lost, nan, hard))

    # Rounding in the prologue changes w, and u = w / s by that over s. Slopes are at most about 1.2. An infinite w is exact.
    off_w = 3 * grade.eps * np.where(np.isinf(w), 0, prologue) * (1 + np.abs(1 - slope) if leaky else 1)
    with np.errstate(invalid="ignore"):
        off_u = np.where(smooth, off_w / np.where(s > 0, s, 1), 0)
    off_w, off_u = np.nan_to_num(off_w), np.nan_to_num(off_u)
    steep = np.minimum(off_u, 2) * (1 + np.abs(1 - slope) if leaky else 1)
    steep = np.nan_to_num(steep)
    least = grade.least * np.maximum(1, np.nan_to_num(np.abs(w), posinf=0, neginf=0))
    y = chosen(terms.y, hard_y)
    # Any value is allowed where the order of operations decides (intermediate overflow, NaN parameters without effect).
    reach = np.maximum(np.maximum(prologue, np.abs(w)), np.abs(1 - slope) * np.abs(w) if leaky else 0)
    with np.errstate(invalid="ignore"):
        over = np.isfinite(x) & (reach > grade.largest / 16)
        over |= np.isinf(w) & np.isfinite(x)
        for name in ("scale", "shift", "negative_slope"):
            if name in given:  # infinite in the working precision
                over |= (np.abs(along(given[name])) > grade.largest / 16) & ~np.isinf(along(given[name]))
    ineffective = (np.isnan(beta) | np.isnan(c)) & ~((s > 0) & np.isfinite(w)) & ~np.isnan(w) & ~np.isnan(beta)
    ineffective |= np.isnan(beta) & np.isinf(w)
    # infinity times a slope or a scale that is 0, or underflows to 0 in the working precision
    free = over | ineffective | (np.isinf(w) & leaky & ((np.abs(slope) <= grade.least) | ~np.isfinite(slope)))
    if "scale" in given:
        free |= np.isinf(x) & (np.abs(along(given["scale"])) <= grade.least)
    if leaky:
        free |= np.isinf(slope)
    # coeff and 1 - coeff may be rounded to the working precision
    with np.errstate(invalid="ignore"):
        reach_u = np.where(smooth, np.abs(w) / np.where(s > 0, s, 1) * (np.abs(1 - slope) if leaky else 1), 0)
    mixed = 2 * grade.eps * np.where(smooth, np.abs(w) * (np.abs(1 - slope) if leaky else 1) + s, 0)
    found = {
        "y": Exact(
            y, grade.share * np.where(smooth, terms.y_terms, 0) + 1.3 * off_w + np.nan_to_num(mixed) + least, free
        )
    }
    if dy is None:
        return found
    least = least * np.maximum(1, np.nan_to_num(reach_u * reach_u))
    d_w = chosen(terms.w, hard_w)
    # The gradient at a kink may be either side's where rounding decides the side.
    kink = ~smooth & (np.abs(w) <= off_w)
    kink |= (np.abs(w) <= 1e3 * grade.least) & (s < 1e3 * grade.least)  # flushed: s is taken for 0
    if member == "relu6":
        kink |= ~smooth & (np.abs(w - 6) <= off_w + grade.eps * 6)
    partial = {
        "beta": (
            chosen(terms.beta, 0) * d_beta_in,
            np.where(smooth, terms.beta_terms, 0) * d_beta_in,
            steep * d_beta_in,
        ),
        "coeff": (
            chosen(terms.coeff, 0) * d_coeff_in,
            np.where(smooth, terms.coeff_terms, 0) * d_coeff_in,
            off_w * d_coeff_in,
        ),
    }
    w_terms = np.where(smooth, terms.w_terms, np.abs(np.nan_to_num(hard_w)) + 1)
    scale = along(given["scale"]) if "scale" in given else np.ones_like(x)
    partial["x"] = (d_w * scale, w_terms * np.abs(scale), 2 * steep * np.abs(scale))
    partial["residual"] = partial["shift"] = (d_w, w_terms, 2 * steep)
    partial["scale"] = (d_w * x, w_terms * np.abs(x), 2 * steep * np.abs(x))
    far = np.where(smooth, slope_terms, np.abs(w))
    partial["negative_slope"] = (chosen(d_slope, hard_slope), far, 2 * steep * np.abs(w) + off_w)
    # The derivative by coeff does not depend on coeff; for 0 times NaN, the order of operations decides.
    unsure = free | kink
    for name, (value, magnitude, moved) in partial.items():
        if name not in given:
            continue
        loose = unsure.copy()
        if name == "coeff":
            loose |= np.isnan(coeff_in)
        if name in ("scale", "x"):
            loose |= np.isinf(x) | ~np.isfinite(scale)
        if name in ("beta", "coeff") and raw:
            loose |= np.isinf(beta_in) | np.isinf(coeff_in)
        with np.errstate(invalid="ignore"):
            loose |= np.abs(dy) * magnitude > grade.largest / 16
        # an upstream gradient of 0 gives 0, whatever it is multiplied with
        error = np.abs(dy) * (grade.share * magnitude + moved) + least * np.maximum(1, np.abs(dy))
        product = dy * value
        if name in ("x", "residual"):
            found[f"d{name}"] = Exact(product, error, loose)
            continue
        p = given[name]
        total = reduced(np.abs(np.nan_to_num(dy)) * np.nan_to_num(magnitude, posinf=0), p)
        summed = reduced(np.where(loose, 0, product), p)
        loosened = reduced(loose.astype(WIDE), p) > 0
        # one certain NaN makes the sum NaN
        certain = reduced((np.isnan(product) & ~loose).astype(WIDE), p) > 0
        allowed = reduced(np.nan_to_num(error), p) + 64 * grade.eps * total + reduced(np.ones_like(x), p) * grade.least
        found[f"d{name}"] = Exact(
            np.where(certain, nan, summed), allowed, (loosened & ~certain) | (total > grade.largest / 16)
        )
    return found


def ctu_and_mul(values: Values, options: dict[str, Any], dy: Array | None) -> dict[str, Exact]:
    """The unit times up; the gradient of a packed gate contains both."""
    given, kinds = dict(values.arrays), dict(values.dtypes)
    gate, up, dtype = given.pop("gate"), given.pop("up", None), kinds.pop("gate")
    packed, dim = up is None, options.get("channel_dim", -1)
    if up is None:
        gate, up = np.split(gate, 2, dim)
    dtype = torch.promote_types(dtype, kinds.pop("up", dtype))
    grade = Grade.of(dtype, values.reference)
    unit = Values(given | {"x": gate}, kinds | {"x": dtype}, values.reference)
    phi = ctu(unit, options, None)["y"]

    def times(factor: Array) -> Exact:
        value, size = phi.value * factor, np.nan_to_num(np.abs(factor), nan=0, posinf=0)
        error = phi.error * size + grade.eps * np.nan_to_num(np.abs(value), nan=0, posinf=0) + grade.least
        free = phi.free & ~np.isnan(factor)
        free = free | (np.isinf(factor) & (np.abs(phi.value) <= 2 * phi.error + grade.least))
        over = (np.abs(value) > grade.largest / 16) & np.isfinite(value)
        return Exact(value, error, free | over)

    found = {"y": times(up)}
    if dy is None:
        return found
    upstream = dy * up
    over = np.isfinite(upstream) & (np.abs(upstream) > grade.largest / 16)
    rounded = (
        np.isfinite(upstream) & (np.abs(upstream) < grade.least) & (upstream != 0)
    )  # upstream gradients that underflow
    through = ctu(unit, options, upstream)
    d_gate, d_up = through.pop("dx"), times(dy)
    through.pop("y")
    unsure = over | rounded
    nan = np.isnan(upstream)
    d_gate = Exact(np.where(nan, WIDE(np.nan), d_gate.value), d_gate.error, (d_gate.free & ~nan) | unsure)
    if packed:
        parts = zip(*((np.broadcast_to(v, gate.shape) for v in (e.value, e.error, e.free)) for e in (d_gate, d_up)))
        found["dgate"] = Exact(*(np.concatenate(pair, dim) for pair in parts))
    else:
        found |= {"dgate": d_gate, "dup": d_up}
    for name, exact in through.items():
        free = exact.free | bool(unsure.any()) | bool(nan.any())
        found[name] = Exact(exact.value, exact.error + 4 * grade.eps * np.abs(np.nan_to_num(exact.value)), free)
    return found


# ---- the head edit ----------------------------------------------------------------------------------------------------


def head_edit(values: Values, options: dict[str, Any], dy: Array | None) -> dict[str, Exact]:
    given = values.arrays
    z = given["z"]
    grade = Grade.of(values.dtypes["z"])
    share = 4 * grade.eps
    edit = given.get("m", given.get("a"))
    assert edit is not None
    *rows, heads, dim = edit.shape
    axis = options.get("head_axis")
    if axis is None:
        split = z.reshape(*z.shape[:-1], heads, dim) if z.shape[-1] == heads * dim else z
        undo: Callable[[Array], Array] = lambda v: v.reshape(z.shape)  # noqa: E731
    else:
        split = np.moveaxis(z, axis, -2)
        undo = lambda v: np.moveaxis(v, -2, axis)  # noqa: E731
    index = given["index"].astype(int) if "index" in given else None

    def along(name: str, default: float) -> Array:
        p = given.get(name)
        if p is None:
            return np.broadcast_to(WIDE(default), split.shape)
        if name.startswith("g_"):
            p = p[..., None]
        if index is not None:
            p = p[index].reshape(len(index), *[1] * (split.ndim - 3), *p.shape[1:])
        return np.broadcast_to(p, split.shape)

    m, a = along("m", 0.0), along("a", 0.0)
    g_m, g_a = along("g_m", 1.0), along("g_a", 1.0)
    p, q = (1 + g_m * m if "m" in given else np.ones_like(m)), (g_a * a if "a" in given else np.zeros_like(a))
    y = p * split + q
    rounded = (1 + np.abs(g_m * m)) * np.abs(split) + np.abs(q)
    with np.errstate(invalid="ignore"):
        free = np.isfinite(split) & (rounded > grade.largest / 16)
        free |= (np.abs(p) > grade.largest / 16) | (np.abs(q) > grade.largest / 16)
    error = np.nan_to_num(share * rounded, posinf=0) + grade.least
    found = {"y": Exact(undo(y), undo(error), undo(free))}
    if dy is None:
        return found
    up = dy.reshape(split.shape) if axis is None else np.moveaxis(dy, axis, -2)
    size = 1 + np.abs(g_m * m)
    found["dz"] = Exact(
        undo(up * p), undo(np.nan_to_num(share * np.abs(up) * size, posinf=0) + grade.least), undo(free)
    )

    def summed(v: Array, name: str) -> Array:
        gate = name.startswith("g_")
        if index is None:
            v = v.reshape(math.prod(v.shape[:-2]), heads, dim).sum(0)
        else:
            each = v.reshape(len(index), math.prod(v.shape[1:-2]), heads, dim).sum(1)
            v = np.zeros((*rows, heads, dim), WIDE)
            np.add.at(v, index, each)
        return v.sum(-1) if gate else v

    for name, value in (("m", g_m * split), ("a", g_a), ("g_m", m * split), ("g_a", a)):
        if name not in given:
            continue
        product = up * value
        with np.errstate(invalid="ignore"):
            loose = np.isinf(product) | np.isnan(product) & ~np.isnan(value)
            loose |= np.isinf(split) | (np.abs(value) > grade.largest / 16)
            if name in ("m", "a"):  # the gate multiplies the sum or each term, so inf * 0 can be a term
                loose |= np.isinf(g_m if name == "m" else g_a)
        total = summed(np.nan_to_num(np.abs(product), posinf=0), name)
        certain = summed((np.isnan(product) & ~loose).astype(WIDE), name) > 0
        allowed, largest = (share + 64 * grade.eps) * total + grade.least, grade.largest
        if index is not None:  # a gradient per sample, in the parameter's dtype, summed by torch
            info = torch.finfo(values.dtypes[name])
            allowed, largest = allowed + max(4, len(index)) * info.eps * total, min(largest, info.max)
        exact = np.where(certain, WIDE(np.nan), summed(np.where(loose | np.isnan(product), 0, product), name))
        wild = ((summed(loose.astype(WIDE), name) > 0) | (total > largest / 16)) & ~certain
        # gates' gradients are sums over a head, of NaN times anything
        if name.startswith("g_"):
            wild |= certain & (summed(np.ones_like(product), name) == 0)
        found[f"d{name}"] = Exact(exact, allowed, wild)
    return found


# ---- hard-concrete gates ----------------------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def hard_concrete(values: Values, options: dict[str, Any], dy: Array | None) -> dict[str, Exact]:
    mode = "sample" if options["training"] else options.get("estimator", "clip")
    return _gate(mode, values, options, dy)


def expected_l0(values: Values, options: dict[str, Any], dy: Array | None) -> dict[str, Exact]:
    return _gate("open", values, options, dy)


def _gate(mode: str, values: Values, options: dict[str, Any], dy: Array | None) -> dict[str, Exact]:
    logits, kind = values.arrays["log_alpha"], values.dtypes["log_alpha"]
    temperature = WIDE(options.get("temperature", 0.33))
    low, high = (WIDE(v) for v in options.get("stretch", (-0.1, 1.1)))
    grade = Grade.of(torch.float64 if kind == torch.float64 else torch.float32)
    free = np.zeros(logits.shape, bool)
    slope_noise = None
    if mode in ("clip", "sample"):
        t, rate = logits, WIDE(1)
        off = grade.eps * np.abs(logits)
        if mode == "sample":
            noise = values.arrays["noise"]
            if kind != torch.float64:  # the noise has the logits' working precision
                noise = noise.astype(np.float32).astype(WIDE)
            else:
                noise = noise.astype(np.float64).astype(WIDE)
            with np.errstate(divide="ignore"):
                logit = np.log(noise) - np.log1p(-noise)
            rate = 1 / temperature
            t = (logit + logits) * rate
            off = 4 * grade.eps * (np.abs(logit) + np.abs(logits)) * rate
            free |= (noise <= 0) | (noise >= 1)
        p, q = _sigmoid(t), _sigmoid(-t)
        stretched = p * (high - low) + low
        y = np.clip(stretched, 0, 1)
        off = np.nan_to_num(off, posinf=0)
        error = (high - low) * (p * q * off + 4 * grade.eps * p) + 4 * grade.eps * (1 + high - low)
        inside = (stretched > 0) & (stretched < 1)
        slope = np.where(np.isnan(t), t, np.where(inside, (high - low) * rate * p * q, WIDE(0)))
        edge = np.minimum(np.abs(stretched), np.abs(stretched - 1)) <= 4 * error
        slope_error = slope * off + 16 * grade.eps * rate * (high - low) * p  # 1 - p is rounded as p is
        if mode == "sample":
            slope_noise = slope / (noise * (1 - noise))
    elif mode == "open":
        t = logits - temperature * np.log(-low / high)
        p, q = _sigmoid(t), _sigmoid(-t)
        off = 4 * grade.eps * (np.abs(np.nan_to_num(t, posinf=0, neginf=0)) + 1)
        y, error, slope = p, p * (q * off + 8 * grade.eps), p * q
        slope_error, edge = slope * 2 * off + 8 * grade.eps * p, np.zeros_like(free)
    else:
        v, weight = (_NODES.astype(WIDE) + 1) / 2, _WEIGHTS.astype(WIDE) / 2
        at = temperature * np.log((v - low) / (high - v))
        p = _sigmoid(logits[..., None] - at)
        y, slope = (p * weight).sum(-1), (p * (1 - p) * weight).sum(-1)
        quadrature = 1e-4  # quadrature: 2e-11 at the published stretch (tests/ops/test_gates.py), more near the edges
        if (float(low), float(high)) == (-0.1, 1.1) and float(temperature) <= 0.67:
            quadrature = 2e-9
        off = 8 * grade.eps * (1 + np.abs(np.nan_to_num(logits, posinf=0, neginf=0)))
        error, slope_error = quadrature + off * (slope + y), quadrature * 10 + off
        edge = np.zeros_like(free)
    found = {"y": Exact(y, error + grade.least, free)}
    if dy is None:
        return found
    loose = free | edge | np.isinf(logits)
    found["dlog_alpha"] = Exact(dy * slope, np.abs(dy) * np.nan_to_num(slope_error) + grade.least, loose)
    if slope_noise is not None:
        noise = values.arrays["noise"]
        steep = np.nan_to_num(slope_error + slope * 8 * grade.eps) / np.maximum(noise * (1 - noise), WIDE(1e-38))
        tiny = (noise < 1e-6) | (noise > 1 - 1e-6)
        found["dnoise"] = Exact(dy * slope_noise, np.abs(dy) * steep + grade.least, loose | tiny)
    return found


# ---- attention --------------------------------------------------------------------------------------------------------


def attention(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """Attention followed by the edit, from explicit scores, for tensors of one dtype; differentiable."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    heads, tokens, keys = q.shape[1], q.shape[2], k.shape[2]
    shared = heads // k.shape[1]
    k, v = (torch.stack([t[:, h // shared] for h in range(heads)], 1) for t in (k, v))
    scale = options.get("scale", 1 / math.sqrt(q.shape[-1]))
    scores = scale * torch.einsum("bhtd,bhsd->bhts", q, k)
    position = torch.arange(tokens)[:, None] + keys - tokens
    at = torch.arange(keys)
    seen = torch.ones(tokens, keys, dtype=torch.bool)
    if options.get("is_causal"):
        seen &= at <= position
    if "window" in options:
        seen &= at > position - options["window"]
        if not options.get("is_causal"):
            seen &= at < position + options["window"]
    if "attn_mask" in tensors:
        scores = scores + tensors["attn_mask"]
    scores = torch.where(seen, scores, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.where(blind, 0, torch.softmax(torch.where(blind, 0, scores), -1))
    z = torch.einsum("bhts,bhse->bhte", weights, v)
    if "m" in tensors:
        m = tensors["m"] if "g_m" not in tensors else tensors["g_m"][:, None] * tensors["m"]
        z = (1 + m)[:, None] * z
    if "a" in tensors:
        a = tensors["a"] if "g_a" not in tensors else tensors["g_a"][:, None] * tensors["a"]
        z = z + a[:, None]
    return z
