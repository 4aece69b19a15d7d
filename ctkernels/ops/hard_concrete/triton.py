"""Hard-concrete gates in Triton: any number of gates in one launch. Imported only if Triton is installed.

Arithmetic is double, as in csrc/hard_concrete.h: models have thousands of gates, not millions, and a launch costs more
than double precision. Noise is an input, or made from a seed by Philox 4x32-10, as in `reference.uniform`: two launches,
forward and backward, replace some 370 operations.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .. import launcher, layout
from ..channelwise.scalar import reciprocal, sigmoids
from .op import HardConcreteAttrs
from .reference import span

SAMPLE = tl.constexpr(0)
CLIP = tl.constexpr(1)
MEAN = tl.constexpr(2)
OPEN = tl.constexpr(3)
LANES = 128

# 16-point Gauss-Legendre on [-1, 1].
_HALF_NODES = (0.0950125098376374402, 0.2816035507792589132, 0.4580167776572273863, 0.6178762444026437484,
               0.7554044083550030339, 0.8656312023878317439, 0.9445750230732325761, 0.9894009349916499326)  # fmt: skip
_HALF_WEIGHTS = (0.1894506104550684963, 0.1826034150449235889, 0.1691565193950025382, 0.1495959888165767321,
                 0.1246289712555338720, 0.0951585116824927848, 0.0622535239386478929, 0.0271524594117540949)  # fmt: skip
NODES = tuple(sign * node for node in _HALF_NODES for sign in (-1.0, 1.0))
WEIGHTS = tuple(weight for weight in _HALF_WEIGHTS for _ in (0, 1))


@triton.jit
def _uniform(seed, i, DOUBLES: tl.constexpr):
    """Number i of the stream: 52 or 23 random bits plus a half, so that neither 0 nor 1 occurs."""
    a, b, _, _ = tl.philox(seed, i.to(tl.uint32), (i >> 32).to(tl.uint32), (i * 0).to(tl.uint32), (i * 0).to(tl.uint32))
    if DOUBLES:
        bits = (a.to(tl.int64) << 20) | (b >> 12).to(tl.int64)
        return (bits.to(tl.float64) + 0.5) * 2.0**-52
    else:
        return ((a >> 9).to(tl.float64) + 0.5) * 2.0**-23


@triton.jit
def gate_kernel(
    log_alpha, noise, dy, out, dnoise, n,
    ATTRS: tl.constexpr, PANELS: tl.constexpr, NODES: tl.constexpr, WEIGHTS: tl.constexpr, SEEDED: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """out: the gates or, with ``dy``, the gradient of log_alpha. dnoise: the gradient of the noise. Null: not requested.
    PANELS: (start, length, count) of the quadrature panels of E[g], see csrc/hard_concrete.h; for P(g != 0), start is used.
    NODES, WEIGHTS: of a panel from -1 to 1."""
    MODE: tl.constexpr = ATTRS[0]
    TEMPERATURE: tl.constexpr = ATTRS[1]
    RATE: tl.constexpr = 1.0 / TEMPERATURE
    LOW: tl.constexpr = ATTRS[2]
    WIDTH: tl.constexpr = ATTRS[3] - ATTRS[2]
    DOUBLES: tl.constexpr = log_alpha.dtype.element_ty == tl.float64
    i = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = i < n
    logit = tl.load(log_alpha + i, mask=live, other=0.0).to(tl.float64)
    u = tl.zeros_like(logit) + 0.5
    if MODE == MEAN:
        value, slope = tl.zeros_like(logit), tl.zeros_like(logit)
        HALF: tl.constexpr = 0.5 * PANELS[1]
        for panel in tl.range(PANELS[2]):
            middle = PANELS[0] + (tl.zeros_like(logit) + panel + 0.5) * PANELS[1]
            for j in tl.static_range(len(NODES)):
                y = middle + NODES[j] * HALF
                v, rest_v = sigmoids(y)
                s, rest = sigmoids(logit - TEMPERATURE * y)
                weight = (WEIGHTS[j] * HALF * WIDTH) * (v * rest_v)
                value += weight * s
                slope += weight * (s * rest)
        value = tl.where(value > 1.0, 1.0, value)  # rounding may exceed 1
    elif MODE == OPEN:
        value, rest = sigmoids(logit - TEMPERATURE * PANELS[0])
        slope = value * rest
    else:
        if MODE == SAMPLE:
            if SEEDED:
                u = _uniform(tl.load(noise), i, DOUBLES)
            else:
                u = tl.load(noise + i, mask=live, other=0.5).to(tl.float64)
            odds = tl.where(u == 1.0, float("inf"), u * reciprocal(1.0 - u))
            logit = (libdevice.log(odds) + logit) * RATE
        s, rest = sigmoids(logit)
        stretched = s * WIDTH + LOW
        settled = (stretched <= 0.0) | (stretched >= 1.0)  # false for NaN
        value = tl.where(stretched > 1.0, 1.0, tl.where(stretched < 0.0, 0.0, stretched))
        slope = tl.where(settled, 0.0, WIDTH * (RATE if MODE == SAMPLE else 1.0) * s * rest)
    if dy is None:
        tl.store(out + i, value.to(out.dtype.element_ty), mask=live)
    else:
        up = tl.load(dy + i, mask=live, other=0.0).to(tl.float64)
        if out is not None:
            tl.store(out + i, (up * slope).to(out.dtype.element_ty), mask=live)
        if dnoise is not None:
            rate_u = tl.where(slope == 0.0, 0.0, slope * reciprocal(u * (1.0 - u)))
            tl.store(dnoise + i, (up * rate_u).to(dnoise.dtype.element_ty), mask=live)


def _panels(mode: int, temperature: float, low: float, high: float) -> tuple[float, float, int]:
    """(start, length, count) of the panels of the quadrature."""
    if mode != MEAN.value:
        return math.log(-low / high), 0.0, 0
    start, length = span(low, high)
    count = max(1, math.ceil(length * max(1.0, temperature) / 5))
    return start, length / count, count


def _launch(args: tuple[Any, ...], dy: Tensor | None, out: Tensor | None, dnoise: Tensor | None) -> None:
    log_alpha, noise, attrs = args[0], args[1], HardConcreteAttrs(*args[2:])
    n = log_alpha.numel()
    if n == 0:
        return
    values: dict[str, Any] = {
        "log_alpha": log_alpha.contiguous(),
        "noise": None if noise is None else noise.contiguous(),
    }
    values |= {"dy": None if dy is None else dy.contiguous(), "out": out, "dnoise": dnoise, "n": n}
    meta: dict[str, Any] = {"ATTRS": tuple(attrs[1:]), "PANELS": _panels(*attrs[1:]), "LANES": LANES}
    meta |= {"NODES": NODES, "WEIGHTS": WEIGHTS}
    meta |= {"SEEDED": noise is not None and not noise.is_floating_point(), "num_warps": LANES // 32}
    with launcher.guard(log_alpha):
        launcher.launch(gate_kernel, triton.cdiv(n, LANES), values, meta)


def forward(*args: Any) -> Tensor:
    gates = layout.parameter_like(args[0])
    _launch(args, None, gates, None)
    return layout.conform(gates, args[0])


def backward(dy: Tensor, *args: Any) -> list[Tensor]:
    log_alpha, grad_mask = args[0], args[-1]
    grads = [layout.parameter_like(log_alpha) if grad_mask >> i & 1 else None for i in (0, 1)]
    _launch(args[:-1], dy, *grads)
    return [layout.conform(g, log_alpha) for g in grads if g is not None]
