"""The kernel variants for the roofline, as launches that the library makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctkernels.ops import launcher
from ctkernels.ops.channelwise.launch import implementation
from ctkernels.ops.ctu import OP as CTU
from ctkernels.ops.ctu.op import ACTIVATIONS
from ctkernels.ops.ctu_and_mul import OP as CTU_AND_MUL
from ctkernels.ops.hard_concrete import MEAN, SAMPLE
from ctkernels.ops.hard_concrete import OP as GATES
from ctkernels.ops.head_edit import OP as HEAD_EDIT
from ctkernels.ops.record import Op

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# A ResNet's activations, a transformer's MLP, attention heads adjacent in memory and with tokens between them.
NCHW, NLC, HEADS, HEADS_OUTSIDE = (32, 64, 56, 56), (8, 197, 768), (8, 512, 32 * 128), (8 * 32, 512, 128)


@dataclass(frozen=True)
class Variant:
    """A launch. reads: number of elementwise tensors that it reads; itemsize: bytes per element. Not ``ours``: for comparison."""

    name: str
    kernel: Any
    args: dict[str, Any]
    meta: dict[str, Any]
    reads: int
    itemsize: int
    ours: bool = True


def _launches(kernel: Callable[..., Any], *args: Any) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    with mock.patch.object(launcher, "launch", lambda kernel, grid, args, meta: found.append((kernel, args, meta))):
        kernel(*args)
    return found


def _pair(
    op: Op, name: str, inputs: tuple[Tensor | None, ...], attrs: tuple[Any, ...], grad_mask: int, reads: int = 1
) -> Iterator[Variant]:
    """The forward and the backward pass."""
    x = inputs[0]
    assert x is not None
    kernel, args, meta = _launches(implementation(op).forward, *inputs, *attrs)[0]
    yield Variant(f"{op.name} forward {name}", kernel, args, meta, reads, x.element_size())
    dy = torch.empty(op.like(inputs, attrs).shape, dtype=x.dtype)
    kernel, args, meta = _launches(implementation(op).backward, dy, *inputs, *attrs, grad_mask)[0]
    yield Variant(f"{op.name} backward {name}", kernel, args, meta, reads + 1, x.element_size())


def _knobs(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(count, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(2)]


def _ctu(dtype_name: str, dtype: torch.dtype) -> Iterator[Variant]:
    layouts = (("NCHW", NCHW, 1), ("NLC", NLC, 2))
    for layout, shape, channel_dim in layouts if dtype_name in ("fp32", "bf16") else layouts[:1]:
        x = torch.empty(shape, dtype=dtype)
        knobs = _knobs(shape[channel_dim], dtype)
        inputs, attrs = (x, *knobs, None, None, None, None), (channel_dim, 0, False, 0.0)
        yield from _pair(CTU, f"{layout} {dtype_name}", inputs, attrs, 0b111)
        *_, frozen = _pair(CTU, f"frozen {layout} {dtype_name}", inputs, attrs, 0b1)
        yield frozen
    if dtype == torch.float64:
        return
    x = torch.empty(NCHW, dtype=dtype)
    knobs = _knobs(NCHW[1], dtype)
    for activation in ("prelu", "relu6", "gelu", "gelu_tanh"):
        slope = knobs[0] if activation == "prelu" else None
        grad_mask = 0b1111 if activation == "prelu" else 0b111
        inputs, attrs = (x, *knobs, slope, None, None, None), (1, ACTIVATIONS[activation], False, 0.0)
        yield from _pair(CTU, f"{activation} {dtype_name}", inputs, attrs, grad_mask)
    inputs = (x, *knobs, None, *knobs, torch.empty_like(x))
    yield from _pair(CTU, f"prologue {dtype_name}", inputs, (1, 0, False, 0.0), 0b1110111, reads=2)


def _ctu_and_mul(dtype_name: str, dtype: torch.dtype) -> Iterator[Variant]:
    batch, tokens, channels = NLC
    gate, packed = torch.empty(NLC, dtype=dtype), torch.empty(batch, tokens, 2 * channels, dtype=dtype)
    knobs = _knobs(channels, dtype)
    for name, first, up, mask in (("NLC", gate, torch.empty_like(gate), 0b10111), ("packed NLC", packed, None, 0b111)):
        inputs, attrs = (first, *knobs, None, up), (2, 0, False, 0.0)
        yield from _pair(CTU_AND_MUL, f"{name} {dtype_name}", inputs, attrs, mask, reads=2)


def _head_edit(dtype_name: str, dtype: torch.dtype) -> Iterator[Variant]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = {
        "(B, T, H D)": (HEADS, [(32 * 128,), (32 * 128,), (32,), (32,)]),
        "(B, H, T, D)": (HEADS_OUTSIDE, [(32, 128), (32, 128), (32, 1), (32, 1)]),
    }
    if dtype_name in ("fp32", "bf16"):
        cases["per sample"] = (HEADS, [(8, 32 * 128), (8, 32 * 128), (8, 32), (8, 32)])
    for name, (shape, parameters) in cases.items():
        z = torch.empty(shape, dtype=dtype)
        inputs = (z, *(torch.empty(p, dtype=wide) for p in parameters))
        yield from _pair(HEAD_EDIT, f"{name} {dtype_name}", inputs, (2,), 0b11111)


def _gates() -> Iterator[Variant]:
    log_alpha = torch.empty(1 << 12)
    for name, noise, mode in (
        ("given noise", torch.empty_like(log_alpha), SAMPLE),
        ("from a seed", torch.empty(1, dtype=torch.int64), SAMPLE),
        ("mean", None, MEAN),
    ):
        reads = 2 if name == "given noise" else 1
        yield from _pair(GATES, name, (log_alpha, noise), (-1, mode, 0.33, -0.1, 1.1), 1, reads)


def _followers() -> Iterator[Variant]:
    """The launches that reduce partial sums and gradients of shared parameters."""
    z = torch.empty(HEADS)
    parameters = [torch.empty(n) for n in (4096, 4096, 32, 32)]
    backward = implementation(HEAD_EDIT).backward
    _, partials, shared = _launches(backward, torch.empty_like(z), z, *parameters, 2, 0b11111)
    yield Variant("reduce partials", *partials, reads=1, itemsize=4)
    yield Variant("reduce shared", *shared, reads=1, itemsize=8)


@triton.jit
def naive_kernel(x, y, beta, coeff, n, LANES: tl.constexpr):
    """A direct translation of the published formula, with one beta and coeff."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    v, b, c = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), tl.load(beta), tl.load(coeff)
    u = v / (1.0 - b + 1e-6)
    soft = tl.where(u > 20.0, u, tl.log(1.0 + tl.exp(u)))
    value = c * tl.sigmoid(b * u) * v + (1.0 - c) * soft * (1.0 - b + 1e-6)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)


def _naive(dtype_name: str, dtype: torch.dtype) -> Variant:
    x, knob = torch.empty(1 << 20, dtype=dtype), torch.empty(1)
    args = {"x": x, "y": torch.empty_like(x), "beta": knob, "coeff": knob, "n": x.numel()}
    return Variant(
        f"naive formula forward {dtype_name}",
        naive_kernel,
        args,
        {"LANES": 1024, "num_warps": 4},
        1,
        x.element_size(),
        ours=False,
    )


def variants() -> Iterator[Variant]:
    """All variants."""
    for name, dtype in DTYPES.items():
        yield from _ctu(name, dtype)
        yield from _head_edit(name, dtype)
        if name in ("fp32", "bf16"):
            yield from _ctu_and_mul(name, dtype)
    yield from _gates()
    yield from _followers()
    for name in ("fp32", "bf16"):
        yield _naive(name, DTYPES[name])
