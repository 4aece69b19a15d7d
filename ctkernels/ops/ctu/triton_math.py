"""The CT unit as scalar Triton functions: bump formulation, constants and sums as in csrc/ctu.h.

Imported only if Triton is installed. Three precisions of arithmetic: DOUBLE for float64, EXACT for float32, and FAST for
16-bit results, the only one that uses the approximate exponential (2 ulp, at most 2^-22 relative; half an ulp of a 16-bit result
is 2^-12 at best). EXACT and FAST use an approximate reciprocal, good to 1 ulp.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..channelwise.kernels import DOUBLE, EXACT, FAST, Math
from ..channelwise.scalar import ex2, horner, polynomial, rcp, reciprocal, sigmoids

LOGISTIC = tl.constexpr(0)
LEAKY = tl.constexpr(1)
RELU6 = tl.constexpr(2)
GAUSSIAN = tl.constexpr(3)
TANH = tl.constexpr(4)

_LOG2E_HI = tl.constexpr(1.44269502162933349609375)
_LOG2E_LO = tl.constexpr(1.92596299112661746887e-8)
_HALF_LOG2E = tl.constexpr(0.72134752)
_HALF_LOG2E_LO = tl.constexpr(9.6298149e-9)
# TanhGate of csrc/scalar.h: the gate is 1 / (1 + e^-(linear t + cubic t^3)); then times log2(e), in pairs of floats.
_GATE_LINEAR = tl.constexpr(1.5957691216057308)
_GATE_CUBIC = tl.constexpr(0.07135481627260025)
_GATE_SLOPE = tl.constexpr(3 * 0.07135481627260025)
_LINEAR = tl.constexpr(2.30220794677734375)
_LINEAR_LO = tl.constexpr(2.5136697e-7)
_CUBIC = tl.constexpr(0.10294324159622192)
_CUBIC_LO = tl.constexpr(-2.0161985e-9)
# Polynomials, highest power first: 2^f on [-1/2, 1/2], log(1 + e) / e on [0, 1], Phi(-t) / (v e^(-t^2/2)), v = 1/(1 + 0.35 t).
_EXP2 = horner(0.00132764727275, 0.00967554132619, 0.0555071327119, 0.240221197242, 0.693146967066, 1.00000007165)
_LOG1P = horner(
    -0.00853920997913, 0.0440896366184, -0.107681719451, 0.177452418669, -0.24495462964, 0.332754797946, -0.499974053971,
    0.999999805667,
)  # fmt: skip
_LOG1P_FAST = horner(0.041347300758, -0.157427203911, 0.306300927591, -0.496977805093, 0.999943277947)
_MILLS = horner(
    -0.0291206648984, 0.143846442622, -0.255450152319, 0.158865701548, -0.0228922507591, 0.105413403751, 0.119857536284,
    0.139858354813, 0.139621613095,
)  # fmt: skip
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
_LARGEST = tl.constexpr(3.4028234e38)
_LARGEST_DOUBLE = tl.constexpr(1.7976931348623157e308)
_FLAT = tl.constexpr(2.0**60)  # kFlat of csrc/ctu.h: the two bumps of relu6 cancel there, and its square is finite
_SMALLEST_S = tl.constexpr(2.0**-120)  # a lower bump is flushed to 0, so that its rate stays finite


@triton.constexpr_function
def _has_tails(kind):
    """Whether a member has the branches of GELU: has_tails of csrc/ctu.h."""
    return kind in (GAUSSIAN.value, TANH.value)


@triton.jit
def _smaller(a, b):
    """min(a, b), NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


# ---- once per channel ------------------------------------------------------------------------------------------------


@triton.jit
def _knobs(beta, coeff, RAW: tl.constexpr, EPS: tl.constexpr):
    """beta, s, coeff, 1 - coeff, and the derivatives of beta and coeff by their parameters, in float64."""
    beta, coeff = beta.to(tl.float64), coeff.to(tl.float64)
    if RAW:
        b, b1 = sigmoids(beta)
        c, c1 = sigmoids(coeff)
        return b, b1 + EPS, c, c1, b * b1, c * c1
    else:
        one = beta * 0.0 + 1.0
        return beta, (1.0 - beta) + EPS, coeff, 1.0 - coeff, one, one


@triton.jit
def _split(v):
    """Splits a float64 into an unevaluated sum of two float32."""
    hi = v.to(tl.float32)
    return hi, (v - hi.to(tl.float64)).to(tl.float32)


@triton.jit
def _product(x_hi, x_lo, y_hi, y_lo):
    """Product of two unevaluated sums."""
    hi = x_hi * y_hi
    return hi, tl.fma(x_hi, y_lo, tl.fma(x_lo, y_hi, tl.fma(x_hi, y_hi, -hi)))


@triton.jit
def _reach(r, LEAST: tl.constexpr):
    """1 - slope, but not 0 at slope 1, so that infinity stays infinite."""
    return tl.where(r == 0.0, LEAST, r)


@triton.jit
def precompute(p, PRECISION: tl.constexpr, ATTRS: tl.constexpr):
    """(rate hi, lo, limit) of both decays, coeff, 1 - coeff, (1 - coeff) s, eta = beta / s, slope, 1 - slope."""
    KIND: tl.constexpr = ATTRS[0]
    RAW: tl.constexpr = ATTRS[1]
    EPS: tl.constexpr = ATTRS[2]
    beta, coeff, slope = p[0], p[1], p[2]
    if PRECISION == DOUBLE:
        b, s, c, c1, _db, _dc = _knobs(beta, coeff, RAW, EPS)
        smooth = ~(s <= 1e-300)  # true for NaN, which propagates
        u = 1.0 / tl.where(smooth, s, 1.0)
        t = b * u
        gone: tl.constexpr = 37.0 if _has_tails(KIND) else 700.0
        t_gone: tl.constexpr = 21.05 if KIND == TANH else gone
        t_limit = tl.where(t > 1e-300, t_gone / tl.where(t > 1e-300, t, 1.0), 1.7e308)
        if KIND == RELU6:
            t_limit = tl.minimum(t_limit, _FLAT)
        t_limit = tl.where(smooth, t_limit, -1.0)
        u_limit = tl.where(smooth, gone / u, -1.0)
        slope = slope.to(tl.float64)
        reach = _reach(1.0 - slope, 4.9406564584124654e-324)
        return t, t, t_limit, u, u, u_limit, c, c1, c1 * s, tl.where(smooth, t, 0.0), slope, reach
    else:
        if RAW or EPS != 0.0 or beta.dtype == tl.float64 or coeff.dtype == tl.float64:
            b64, s64, c64, c164, _db, _dc = _knobs(beta, coeff, RAW, EPS)
            b, b_lo = _split(b64)
            s, s_lo = _split(s64)
            c, c1 = c64.to(tl.float32), c164.to(tl.float32)
        else:
            b, b_lo = beta, beta * 0.0
            s = 1.0 - beta
            s_lo = (1.0 - s) - beta  # the rounding error of the subtraction
            c, c1 = coeff, 1.0 - coeff
        smooth = ~(s <= _SMALLEST_S)  # true for NaN, which propagates
        c1s = c1 * s
        safe = tl.where(smooth, s, 1.0)
        r = rcp(safe)
        r_lo = r * tl.fma(-tl.where(smooth, s_lo, 0.0), r, tl.fma(-safe, r, 1.0))
        eta, eta_lo = _product(b, b_lo, r, r_lo)
        if _has_tails(KIND):
            t, t_lo, u, u_lo = eta, eta_lo, r, r_lo
        else:
            t, t_lo = _product(eta, eta_lo, _LOG2E_HI, _LOG2E_LO)
            u, u_lo = _product(r, r_lo, _LOG2E_HI, _LOG2E_LO)
        vanished: tl.constexpr = 13.16 if _has_tails(KIND) else 125.0
        t_vanished: tl.constexpr = 9.97 if KIND == TANH else vanished
        furthest: tl.constexpr = _FLAT if KIND == RELU6 else _LARGEST
        t_limit = tl.where(smooth, tl.minimum(t_vanished * rcp(t), furthest), -1.0)
        u_limit = tl.where(smooth, tl.minimum(vanished * rcp(u), furthest), -1.0)
        eta = tl.where(smooth, eta, 0.0)
        if PRECISION == FAST:  # ex2.approx takes every magnitude; without a bump the coefficients are 0
            t_limit, u_limit = furthest, furthest
            # At least the smallest float, so that infinity decays to 0 at beta = 0 too (a literal would be a double).
            t = tl.maximum(t.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
            has_bump = tl.where(smooth, 1.0, 0.0)  # a factor, so that NaN stays NaN
            c, c1, c1s = has_bump * c, has_bump * c1, has_bump * c1s
        reach = _reach((1.0 - slope).to(tl.float32), 1.4012984643e-45)  # subtracted in the slope's precision
        return t, t_lo, t_limit, u, u_lo, u_limit, c, c1, c1s, eta, slope.to(tl.float32), reach


# ---- per element -----------------------------------------------------------------------------------------------------


@triton.jit
def _exp2_scaled(f, z):
    """2^f, f in [-1/2, 1/2] (8e-8 relative), times 2^k, where k is the integer that adding _MAGIC left in z's low bits."""
    q = polynomial(f, _EXP2)
    return (q.to(tl.int32, bitcast=True) + (z.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _decay(a, hi, lo, limit, PRECISION: tl.constexpr):
    """e^(-rate a), 0 beyond the limit; and a, capped at the limit so that their product is 0 and not NaN."""
    if PRECISION == DOUBLE:
        ac = tl.where(limit < a, limit, a)
        return tl.where(a > limit, 0.0, libdevice.exp(-ac * hi)), ac
    elif PRECISION == EXACT:
        ac = _smaller(a, limit)
        z = tl.fma(-ac, hi, _MAGIC)
        f = tl.fma(-ac, lo, tl.fma(-ac, hi, _MAGIC - z))
        return tl.where(a > limit, 0.0, _exp2_scaled(f, z)), ac
    else:
        return ex2(-a * hi), _smaller(a, limit)


@triton.jit
def _inverse(x, PRECISION: tl.constexpr):
    if PRECISION == DOUBLE:
        return reciprocal(x)
    else:
        return rcp(x)


@triton.jit
def _log1p(e, PRECISION: tl.constexpr):
    """log(1 + e) on [0, 1]; EXACT: 2e-7 relative, FAST: 6e-5."""
    if PRECISION == DOUBLE:
        r = e * reciprocal(2.0 + e)  # log(1 + e) = 2 artanh(r), r <= 1/3: the first omitted term is below 2^-61
        p = r * 0.0 + 1.0 / 35
        for k in tl.static_range(17):
            p = p * (r * r) + 1.0 / (33 - 2 * k)
        return 2.0 * r * p
    elif PRECISION == EXACT:
        return polynomial(e, _LOG1P) * e
    else:
        return polynomial(e, _LOG1P_FAST) * e


@triton.jit
def _tail(a, hi, lo, limit, PRECISION: tl.constexpr):
    """phi(t) and Phi(-t) at t = rate a >= 0; and a, capped where both are 0."""
    if PRECISION == DOUBLE:
        ac = tl.where(limit < a, limit, a)
        t = ac * hi
        pdf = tl.where(a > limit, 0.0, 0.39894228040143267794 * libdevice.exp(-0.5 * t * t))
        return pdf, tl.where(a > limit, 0.0, 0.5 * libdevice.erfc(t * 0.70710678118654752440)), ac
    else:
        ac = _smaller(a, limit)
        if PRECISION == EXACT:
            t = ac * hi
            y = t * t
            t_lo = tl.fma(ac, lo, tl.fma(ac, hi, -t))
            y_lo = tl.fma(2.0 * t, t_lo, tl.fma(t, t, -y))
            z = tl.fma(-y, _HALF_LOG2E, _MAGIC)
            f = tl.fma(-y, _HALF_LOG2E, _MAGIC - z)
            f = tl.fma(-y_lo, _HALF_LOG2E, tl.fma(-y, _HALF_LOG2E_LO, f))
            e = tl.where(a > limit, 0.0, _exp2_scaled(f, z))
        else:
            t = a * hi
            e = ex2(-t * t * _HALF_LOG2E)
        v = rcp(tl.fma(t, 0.35, 1.0))
        return 0.3989422804 * e, e * (polynomial(v, _MILLS) * v), ac


@triton.jit
def _tanh_gate(a, hi, lo, limit, PRECISION: tl.constexpr):
    """S'(t) and S(-t) at t = rate a >= 0, S the gate of GELU's tanh approximation; and a, capped where both are 0."""
    if PRECISION == DOUBLE:
        ac = tl.where(limit < a, limit, a)
        t = ac * hi
        y = t * t
        e = tl.where(a > limit, 0.0, libdevice.exp(-t * (y * _GATE_CUBIC + _GATE_LINEAR)))
    elif PRECISION == EXACT:
        ac = _smaller(a, limit)
        t = ac * hi
        y = t * t
        t_lo = tl.fma(ac, lo, tl.fma(ac, hi, -t))
        y_lo = tl.fma(t, t, -y)
        m = tl.fma(y, _CUBIC, _LINEAR)
        m_lo = tl.fma(y_lo, _CUBIC, tl.fma(y, _CUBIC_LO, tl.fma(y, _CUBIC, _LINEAR - m) + _LINEAR_LO))
        z = tl.fma(-t, m, _MAGIC)
        f = tl.fma(-t, m_lo, tl.fma(-t, m, _MAGIC - z))
        f = tl.fma(-t_lo, tl.fma(y, 3.0 * _CUBIC, _LINEAR), f)
        e = tl.where(a > limit, 0.0, _exp2_scaled(f, z))
    else:
        ac = _smaller(a, limit)
        t = _smaller(a * hi, 16.0)  # where e is 0, and the square finite
        y = t * t
        e = ex2(-t * tl.fma(y, _CUBIC, _LINEAR))
    p = _inverse(1.0 + e, PRECISION)
    q = e * p
    return p * q * (y * _GATE_SLOPE + _GATE_LINEAR), q, ac


@triton.jit
def _bump(a, k, PRECISION: tl.constexpr, KIND: tl.constexpr):
    """The bump, minus its derivative, and the four terms of the parameter gradients, the first as two factors whose product may
    overflow. The compiler drops unused ones.

    Every product starts from a q or a phi, which are 0 where a is huge.
    """
    t_hi, t_lo, t_limit, u_hi, u_lo, u_limit, c, c1, c1s, eta, _slope, _reach = k
    if _has_tails(KIND):
        if KIND == TANH:
            pdf_t, cdf_t, at = _tanh_gate(a, t_hi, t_lo, t_limit, PRECISION)
        else:
            pdf_t, cdf_t, at = _tail(a, t_hi, t_lo, t_limit, PRECISION)
        pdf_u, cdf_u, au = _tail(a, u_hi, u_lo, u_limit, PRECISION)
        ap, aq, uq = at * pdf_t, at * cdf_t, au * cdf_u
        delta = tl.fma(c1s, pdf_u, tl.fma(-c, aq, -(c1 * uq)))
        h = tl.fma(c, tl.fma(-eta, ap, cdf_t), c1 * cdf_u)
        return delta, h, ap, at, aq, pdf_u, uq
    else:
        et, at = _decay(a, t_hi, t_lo, t_limit, PRECISION)
        eu, au = _decay(a, u_hi, u_lo, u_limit, PRECISION)
        pt, pu = _inverse(1.0 + et, PRECISION), _inverse(1.0 + eu, PRECISION)
        qt, qu, log_term = et * pt, eu * pu, _log1p(eu, PRECISION)
        aq = at * qt
        apq = aq * pt
        delta = tl.fma(c1s, log_term, -(c * aq))
        h = tl.fma(c, tl.fma(-eta, apq, qt), c1 * qu)
        return delta, h, apq, at, aq, log_term, au * qu


@triton.jit
def forward(w, k, PRECISION: tl.constexpr, ATTRS: tl.constexpr):
    KIND: tl.constexpr = ATTRS[0]
    if KIND == RELU6:
        low, _h, _i, _o, _s1, _s2, _s3 = _bump(tl.abs(w), k, PRECISION, KIND)
        high, _h, _i, _o, _s1, _s2, _s3 = _bump(tl.abs(w - 6.0), k, PRECISION, KIND)
        return tl.where(w > 6.0, 6.0, tl.where(w < 0.0, 0.0, w)) + (low - high)
    elif KIND == LEAKY:
        slope, reach = k[10], k[11]
        delta, _h, _i, _o, _s1, _s2, _s3 = _bump(tl.abs(reach) * tl.abs(w), k, PRECISION, KIND)
        return tl.where(w > 0.0, w, slope * w) + tl.where(reach < 0.0, -delta, delta)
    else:
        delta, _h, _i, _o, _s1, _s2, _s3 = _bump(tl.abs(w), k, PRECISION, KIND)
        return tl.maximum(w, 0.0) + delta


@triton.jit
def gradients(w, dy, k, PRECISION: tl.constexpr, ATTRS: tl.constexpr):
    """The gradient of w, and the terms of the sums for `parameter_gradients`. ``dy`` is the first factor of every product: later
    factors may be infinite, and a ``dy`` of 0 gives 0."""
    KIND: tl.constexpr = ATTRS[0]
    if KIND == RELU6:
        _d, low, low_i, low_o, l1, l2, l3 = _bump(tl.abs(w), k, PRECISION, KIND)
        _d, high, high_i, high_o, h1, h2, h3 = _bump(tl.abs(w - 6.0), k, PRECISION, KIND)
        step = tl.where(w > 0.0, 1.0 - low, low) - tl.where(w > 6.0, 1.0 - high, high)
        s0 = dy * (low_i * low_o - high_i * high_o)  # finite: see _FLAT
        return dy * step, s0, dy * (l1 - h1), dy * (l2 - h2), dy * (l3 - h3), s0
    elif KIND == LEAKY:
        slope, reach = k[10], k[11]
        _d, h, inner, outer, s1, s2, s3 = _bump(tl.abs(reach) * tl.abs(w), k, PRECISION, KIND)
        up = w > 0.0
        step = tl.where(up, 1.0 - reach * h, slope + reach * h)
        finite = _smaller(w, _LARGEST_DOUBLE if PRECISION == DOUBLE else _LARGEST)  # h is 0 where this caps
        s4 = dy * (finite * tl.where(up, h, 1.0 - h))
        return dy * step, dy * inner * outer, dy * s1, dy * s2, dy * s3, s4
    else:
        _d, h, inner, outer, s1, s2, s3 = _bump(tl.abs(w), k, PRECISION, KIND)
        s0 = dy * inner * outer
        return dy * tl.where(w > 0.0, 1.0 - h, h), s0, dy * s1, dy * s2, dy * s3, s0


@triton.jit
def parameter_gradients(p, s, ATTRS: tl.constexpr):
    """Gradients of (beta, coeff, slope, scale, shift) from the sums of one channel, in float64."""
    KIND: tl.constexpr = ATTRS[0]
    RAW: tl.constexpr = ATTRS[1]
    EPS: tl.constexpr = ATTRS[2]
    s0, s1, s2, s3 = s[0].to(tl.float64), s[1].to(tl.float64), s[2].to(tl.float64), s[3].to(tl.float64)
    _b, width, c, c1, d_beta, d_coeff = _knobs(p[0], p[1], RAW, EPS)
    smooth = ~(width <= _SMALLEST_S)  # true for NaN, which propagates
    inv = 1.0 / tl.where(smooth, width, 1.0)
    silu = c * (1.0 + EPS) * inv * inv * s0
    if _has_tails(KIND):
        beta = silu - c1 * s2
        coeff = -(s1 + width * s2 - s3)
    else:
        beta = silu - c1 * (s2 + inv * s3)
        coeff = -(s1 + width * s2)
    # Without a bump the knobs have no effect; above slope 1 the bump changes its sign.
    sign = tl.where(smooth, 1.0, 0.0)
    if KIND == LEAKY:
        sign = tl.where(p[2].to(tl.float64) > 1.0, -sign, sign)
    return sign * beta * d_beta, sign * coeff * d_coeff, s[4], s[5], s[6]


MATH = Math(
    "ctu", precompute, forward, gradients, parameter_gradients,
    fallbacks=(1.0, 0.5, 0.0, 1.0, 0.0), sums=(15, 15, 16, 32, 64), prologue=True,
)  # fmt: skip
