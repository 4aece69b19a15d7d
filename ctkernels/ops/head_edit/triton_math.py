"""The head edit as scalar Triton functions: y = scale w + offset, as in csrc/head_edit.h. Imported only if Triton is."""

import triton
import triton.language as tl

from ..channelwise.kernels import DOUBLE, Math


@triton.jit
def precompute(p, PRECISION: tl.constexpr, ATTRS: tl.constexpr):
    """1 + g_m m and g_a a, computed in the parameters' own precision."""
    m, a, g_m, g_a, _ = p
    dtype: tl.constexpr = tl.float64 if PRECISION == DOUBLE else tl.float32
    return (1.0 + g_m * m).to(dtype), (g_a * a).to(dtype)


@triton.jit
def forward(w, k, PRECISION: tl.constexpr, ATTRS: tl.constexpr):
    return tl.fma(w, k[0], k[1])


@triton.jit
def gradients(w, dy, k, PRECISION: tl.constexpr, ATTRS: tl.constexpr):
    """The gradient of w, and the terms of S1 = sum dy w and S0 = sum dy."""
    none = tl.zeros_like(w)
    return dy * k[0], dy * w, dy, none, none, none


@triton.jit
def parameter_gradients(p, s, ATTRS: tl.constexpr):
    """Gradients of (m, a, g_m, g_a) from S1 and S0 of one channel."""
    m, a, g_m, g_a, _ = p
    s1, s0 = s[0].to(tl.float64), s[1].to(tl.float64)
    return g_m * s1, g_a * s0, m * s1, a * s0, s0


MATH = Math(
    "head_edit", precompute, forward, gradients, parameter_gradients,
    fallbacks=(0.0, 0.0, 1.0, 1.0, 0.0), sums=(1, 2, 1, 2, 0), prologue=False,
)  # fmt: skip
