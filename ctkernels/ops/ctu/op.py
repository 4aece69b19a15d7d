"""The record of the CT unit, and its reference with widening, broadcasting, the affine map and the residual sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import eager, layout
from ..record import Op, Reference
from ..registration import register
from . import reference

# Members of the family, numbered as in csrc/ctu.h, and the activations they are at their neutral points.
KINDS = ("logistic", "leaky", "relu6", "gaussian", "tanh")
LEAKY = KINDS.index("leaky")  # the one that takes a slope
ACTIVATIONS = {"relu": 0, "leaky_relu": 1, "prelu": 1, "relu6": 2, "silu": 0, "gelu": 3, "gelu_tanh": 4}


class CtuInputs(NamedTuple):
    """w = scale * x + shift + residual is the pre-activation; all but x and residual are per-channel parameters."""

    x: Tensor
    beta: Tensor
    coeff: Tensor
    slope: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None


class CtuAttrs(NamedTuple):
    """kind: index into KINDS. raw: whether beta and coeff are logits. eps: added to 1 - beta."""

    channel_dim: int
    kind: int
    raw: bool
    eps: float


class UnitInputs(NamedTuple):
    """Inputs in the compute dtype, ready to broadcast. ``w``: the pre-activation."""

    x: Tensor
    slope: Tensor | None
    scale: Tensor | None
    w: Tensor
    knobs: reference.Knobs


def widen(inputs: CtuInputs, attrs: CtuAttrs) -> UnitInputs:
    dtype = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32

    def parameter(p: Tensor | None) -> Tensor | None:
        return None if p is None else layout.broadcast(p, inputs.x, attrs.channel_dim).to(dtype)

    def knob(p: Tensor) -> Tensor:
        """In the wider precision of the two: for 1 - beta, 1 - slope and the sigmoids."""
        return layout.broadcast(p, inputs.x, attrs.channel_dim).to(torch.promote_types(p.dtype, dtype))

    knobs = reference.knobs(knob(inputs.beta), knob(inputs.coeff), attrs.raw, attrs.eps).to(dtype)
    scale, shift = parameter(inputs.scale), parameter(inputs.shift)
    x = w = inputs.x.to(dtype)
    if scale is not None:
        w = w * scale
    if shift is not None:
        w = w + shift
    if inputs.residual is not None:
        w = w + inputs.residual.to(dtype)
    return UnitInputs(x, None if inputs.slope is None else knob(inputs.slope), scale, w, knobs)


def _forward(inputs: CtuInputs, attrs: CtuAttrs) -> Tensor:
    wide = widen(inputs, attrs)
    return reference.forward(wide.w, wide.slope, wide.knobs, KINDS[attrs.kind]).to(inputs.x.dtype)


def by_parameter(name: str, g: Tensor, d_w: Tensor, wide: UnitInputs, partials: reference.Partials) -> Tensor:
    """``g`` times the derivative with respect to an input. ``d_w``: ``g`` times the derivative with respect to w."""
    if name == "beta":
        return partials.beta.times(g)
    if name == "coeff":
        return g * partials.coeff
    if name == "slope":
        assert partials.slope is not None  # only the leaky unit takes a slope
        return g * partials.slope
    if name == "scale":
        return d_w * wide.x
    return d_w * wide.scale if name == "x" and wide.scale is not None else d_w


def _backward(dy: Tensor, inputs: CtuInputs, attrs: CtuAttrs, grad_mask: int) -> list[Tensor]:
    wide = widen(inputs, attrs)
    partials = reference.partials(wide.w, wide.slope, wide.knobs, KINDS[attrs.kind])
    dy = dy.to(partials.w.dtype)
    d_w = dy * partials.w
    grads = []
    for i, like in OP.requested(inputs, grad_mask):
        name = CtuInputs._fields[i]
        values = by_parameter(name, dy, d_w, wide, partials)
        if name in OP.elementwise:  # the residual's gradient may equal x's: copied, as results must not alias
            grads.append(values.to(like.dtype, copy=name == "residual"))
        else:
            grads.append(layout.reduce(values, like, attrs.channel_dim))
    return grads


def _jvp(inputs: CtuInputs, attrs: CtuAttrs, tangents: CtuInputs) -> Tensor:
    wide = widen(inputs, attrs)
    partials = reference.partials(wide.w, wide.slope, wide.knobs, KINDS[attrs.kind])
    total = torch.zeros_like(partials.w)
    for name, tangent in zip(CtuInputs._fields, tangents):
        if tangent is not None:
            wider = tangent if name in OP.elementwise else layout.broadcast(tangent, inputs.x, attrs.channel_dim)
            g = wider.to(total.dtype)
            total = total + by_parameter(name, g, partials.w * g, wide, partials)
    return total.to(inputs.x.dtype)


_PARAMETERS = "Tensor beta, Tensor coeff, Tensor? slope, Tensor? scale, Tensor? shift, Tensor? residual"
_ATTRS = "int channel_dim, int kind, bool raw, float eps"

OP = register(
    Op(
        schema=f"ctu(Tensor x, {_PARAMETERS}, {_ATTRS}) -> Tensor",
        inplace_schema=f"ctu_(Tensor(a!) x, {_PARAMETERS}, {_ATTRS}) -> ()",
        backward_schema=f"ctu_backward(Tensor dy, Tensor x, {_PARAMETERS}, {_ATTRS}, int grad_mask) -> Tensor[]",
        inputs=CtuInputs,
        attrs=CtuAttrs,
        elementwise=frozenset({"x", "residual"}),
        reference=Reference(_forward, _backward, _jvp),
        triton=f"{__package__}.triton_math",
        portable=f"{__package__}.portable",
        shared_grad=("residual", "x", "scale"),
        eager=eager.Entries("ctu"),
    )
)
