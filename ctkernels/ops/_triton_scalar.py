"""Scalar Triton functions in double that several ops use. Imported only where Triton is installed."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def reciprocal(x):
    """1 / x for a normal x, or NaN; an IEEE division in double is a subroutine call on the GPU."""
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)
    y = tl.fma(y, tl.fma(-x, y, 1.0), y)  # 2^-20 at first, squared by every step
    return tl.fma(y, tl.fma(-x, y, 1.0), y)


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both to full precision."""
    e = libdevice.exp(-tl.abs(x))
    large = reciprocal(1.0 + e)
    small = e * large
    return tl.where(x > 0, large, small), tl.where(x > 0, small, large)
