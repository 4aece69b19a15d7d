"""The CT unit as an op. Formula, limits and error bounds: README.md in this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from ..record import Inputs, Op, Static, register
from . import reference

# Family members, in the numbering of csrc/ctu.h. SiLU is the logistic unit at another neutral point.
KINDS = ("logistic", "leaky", "relu6", "gaussian")
ACTIVATIONS = {"relu": 0, "silu": 0, "leaky_relu": 1, "prelu": 1, "relu6": 2, "gelu": 3}


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _unpack(inputs: Inputs, static: Static) -> tuple[list[Tensor | None], Tensor, reference.Knobs, str]:
    """Inputs in the compute dtype and ready to broadcast, the pre-activation w, the knobs, and the family member."""
    x = inputs[0]
    assert x is not None
    channel_dim, kind, raw, eps = static
    dtype = _compute_dtype(x)
    elementwise = (True, False, False, False, False, False, True)
    ready = [
        t if t is None else (t.to(dtype) if e else layout.broadcast(t, x, channel_dim))
        for t, e in zip(inputs, elementwise)
    ]
    w, beta, coeff, _, _, _, residual = ready
    assert w is not None
    assert beta is not None
    assert coeff is not None
    # 1 - beta and the sigmoids in the parameters' own precision where that is higher, then in the compute dtype
    beta, coeff = (p.to(torch.promote_types(p.dtype, dtype)) for p in (beta, coeff))
    knobs = reference.knobs(beta, coeff, raw, eps).to(dtype)
    ready[1:6] = [p if p is None else p.to(dtype) for p in ready[1:6]]
    scale, shift = ready[4], ready[5]
    if scale is not None:
        w = w * scale
    if shift is not None:
        w = w + shift
    if residual is not None:
        w = w + residual
    return ready, w, knobs, KINDS[kind]


def _forward(inputs: Inputs, static: Static) -> Tensor:
    ready, w, knobs, kind = _unpack(inputs, static)
    assert inputs[0] is not None
    return reference.forward(w, ready[3], knobs, kind).to(inputs[0].dtype)


def _partials(inputs: Inputs, static: Static) -> tuple[list[Tensor | None], reference.Partials]:
    ready, w, knobs, kind = _unpack(inputs, static)
    return ready, reference.partials(w, ready[3], knobs, kind)


def _by_knob(name: str, partials: reference.Partials, g: Tensor) -> Tensor:
    """``g`` times the derivative by beta, coeff or slope."""
    if name == "beta":
        return partials.beta.times(g)
    partial = partials.coeff if name == "coeff" else partials.slope
    assert partial is not None
    return g * partial


def _backward(dy: Tensor, inputs: Inputs, static: Static, needs: int) -> list[Tensor]:
    ready, partials = _partials(inputs, static)
    dy = dy.to(partials.w.dtype)
    g = dy * partials.w
    x, scale = ready[0], ready[4]
    assert x is not None
    grads = []
    for i in OP.wanted(needs):
        name, like = OP.inputs[i], inputs[i]
        assert like is not None
        if name == "x":
            grads.append((g if scale is None else g * scale).to(like.dtype))
        elif name == "residual":
            grads.append(g.to(like.dtype, copy=True))
        else:
            values = g * x if name == "scale" else g if name == "shift" else _by_knob(name, partials, dy)
            grads.append(layout.reduce(values, like, static[0]))
    return grads


def _jvp(inputs: Inputs, static: Static, tangents: Inputs) -> Tensor:
    ready, partials = _partials(inputs, static)
    x, scale = ready[0], ready[4]
    assert inputs[0] is not None
    assert x is not None
    total = torch.zeros_like(partials.w)
    for name, tangent in zip(OP.inputs, tangents):
        if tangent is None:
            continue
        g = (tangent if name in OP.elementwise else layout.broadcast(tangent, inputs[0], static[0])).to(total.dtype)
        if name in ("beta", "coeff", "slope"):
            total = total + _by_knob(name, partials, g)
        else:
            factor = scale if name == "x" else x if name == "scale" else None
            total = total + partials.w * (g if factor is None else g * factor)
    return total.to(inputs[0].dtype)


OP = register(
    Op(
        name="ctu",
        inputs=("x", "beta", "coeff", "slope", "scale", "shift", "residual"),
        optional=frozenset({"slope", "scale", "shift", "residual"}),
        elementwise=frozenset({"x", "residual"}),
        static=("int channel_dim", "int kind", "bool raw", "float eps"),
        reference_forward=_forward,
        reference_backward=_backward,
        reference_jvp=_jvp,
        triton="ctkernels.ops.ctu.triton_math",
        twin=("residual", "x", "scale"),
    )
)
