"""The record of the gated product, and its reference: the CT unit's, times ``up``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import layout
from ..ctu import reference
from ..ctu.op import KINDS, CtuAttrs, CtuInputs, UnitInputs, by_parameter, widen
from ..record import Op, Reference
from ..registration import register


class CtuAndMulInputs(NamedTuple):
    """up: None if ``gate`` is packed, [gate | up] along the channels. All but gate and up are per-channel parameters."""

    gate: Tensor
    beta: Tensor
    coeff: Tensor
    slope: Tensor | None
    up: Tensor | None


def _unpacked(inputs: CtuAndMulInputs, channel_dim: int) -> tuple[Tensor, Tensor]:
    """gate and up."""
    return (inputs.gate, inputs.up) if inputs.up is not None else layout.halves(inputs.gate, channel_dim)


def _widen(inputs: CtuAndMulInputs, attrs: CtuAttrs) -> tuple[UnitInputs, Tensor]:
    """The unit's inputs and up, in the compute dtype and ready to broadcast."""
    gate, up = _unpacked(inputs, attrs.channel_dim)
    unit = widen(CtuInputs(gate, inputs.beta, inputs.coeff, inputs.slope, None, None, None), attrs)
    return unit, up.to(unit.w.dtype)


def _forward(inputs: CtuAndMulInputs, attrs: CtuAttrs) -> Tensor:
    unit, up = _widen(inputs, attrs)
    return (reference.forward(unit.w, unit.slope, unit.knobs, KINDS[attrs.kind]) * up).to(inputs.gate.dtype)


def _backward(dy: Tensor, inputs: CtuAndMulInputs, attrs: CtuAttrs, grad_mask: int) -> list[Tensor]:
    unit, up = _widen(inputs, attrs)
    partials = reference.partials(unit.w, unit.slope, unit.knobs, KINDS[attrs.kind])
    dy = dy.to(up.dtype)
    d_phi = dy * up
    d_gate = d_phi * partials.w

    def d_up() -> Tensor:
        return dy * reference.forward(unit.w, unit.slope, unit.knobs, KINDS[attrs.kind])

    grads = []
    for i, like in OP.requested(inputs, grad_mask):
        name = CtuAndMulInputs._fields[i]
        if name == "up":
            grads.append(d_up().to(like.dtype))
        elif name != "gate":
            grads.append(layout.reduce(by_parameter(name, d_phi, d_gate, unit, partials), like, attrs.channel_dim))
        elif inputs.up is None:
            grads.append(torch.cat([d_gate, d_up()], attrs.channel_dim).to(like.dtype))
        else:
            grads.append(d_gate.to(like.dtype))
    return grads


def _jvp(inputs: CtuAndMulInputs, attrs: CtuAttrs, tangents: CtuAndMulInputs) -> Tensor:
    unit, up = _widen(inputs, attrs)
    partials = reference.partials(unit.w, unit.slope, unit.knobs, KINDS[attrs.kind])
    total = torch.zeros_like(partials.w)
    t_gate, t_up = tangents.gate, tangents.up
    if inputs.up is None and t_gate is not None:
        t_gate, t_up = layout.halves(t_gate, attrs.channel_dim)
    if t_gate is not None:
        total = total + partials.w * t_gate.to(total.dtype)
    for name, tangent in zip(("beta", "coeff", "slope"), tangents[1:4]):
        if tangent is not None:
            g = layout.broadcast(tangent, unit.w, attrs.channel_dim).to(total.dtype)
            total = total + by_parameter(name, g, partials.w * g, unit, partials)
    total = total * up
    if t_up is not None:
        phi = reference.forward(unit.w, unit.slope, unit.knobs, KINDS[attrs.kind])
        total = total + phi * t_up.to(total.dtype)
    return total.to(inputs.gate.dtype)


_REST = "Tensor beta, Tensor coeff, Tensor? slope, Tensor? up, int channel_dim, int kind, bool raw, float eps"

OP = register(
    Op(
        schema=f"ctu_and_mul(Tensor gate, {_REST}) -> Tensor",
        inplace_schema=f"ctu_and_mul_(Tensor(a!) gate, {_REST}) -> ()",
        backward_schema=f"ctu_and_mul_backward(Tensor dy, Tensor gate, {_REST}, int grad_mask) -> Tensor[]",
        inputs=CtuAndMulInputs,
        attrs=CtuAttrs,
        elementwise=frozenset({"gate", "up"}),
        factor="up",
        reference=Reference(_forward, _backward, _jvp),
        triton=f"{__package__}.triton_math",
        portable=f"{__package__}.portable",
    )
)
