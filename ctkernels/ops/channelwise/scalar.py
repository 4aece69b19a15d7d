"""Scalar Triton functions shared by several ops. Imported only if Triton is installed.

All inline PTX of the Triton kernels is here, each piece beside plain Triton for targets that are not NVIDIA's.
"""

import struct

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import cuda_capability_geq, is_cuda


@triton.jit
def reciprocal(x):
    """1 / x for a normal float64 x, or NaN; an IEEE division in double is a subroutine call on NVIDIA's GPUs."""
    if is_cuda():
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)
        y = tl.fma(y, tl.fma(-x, y, 1.0), y)  # 20 correct bits at first; every step doubles them
        return tl.fma(y, tl.fma(-x, y, 1.0), y)
    else:
        return 1.0 / x


@triton.jit
def rcp(x):
    """1 / x in float32, to 1 ulp; an IEEE division is a subroutine call on NVIDIA's GPUs."""
    if is_cuda():
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def ex2(x):
    """2^x in float32, to 2 ulp."""
    if is_cuda():
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both to full precision."""
    e = libdevice.exp(-tl.abs(x))
    large = reciprocal(1.0 + e)
    small = e * large
    return tl.where(x > 0, large, small), tl.where(x > 0, small, large)


def horner(*coefficients: float) -> tl.constexpr:
    """A polynomial for :func:`polynomial`: PTX that evaluates it for two floats at once in Blackwell's packed instructions, half
    as many to issue, then the coefficients, highest power first."""
    words = [struct.unpack("<I", struct.pack("<f", c))[0] for c in coefficients]
    first, *rest = [f"0x{word:08x}{word:08x}" for word in words]
    steps = " ".join(f"mov.b64 c, {c}; fma.rn.f32x2 p, p, x, c;" for c in rest)
    code = f"{{ .reg .b64 x, p, c; mov.b64 x, {{$2, $3}}; mov.b64 p, {first}; {steps} mov.b64 {{$0, $1}}, p; }}"
    return tl.constexpr((code, *coefficients))


@triton.jit
def polynomial(x, C: tl.constexpr):
    """Evaluates polynomial C at the float32 x. The same bits on every GPU."""
    if cuda_capability_geq(10) and x.type.is_block():
        return tl.inline_asm_elementwise(C[0], "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        p = tl.fma(x, C[1], C[2])
        for i in tl.static_range(3, len(C)):
            p = tl.fma(p, x, C[i])
        return p
