"""The record of the head edit. Channels are the last dimension: heads times head_dim, or head_dim with one row of
parameters per head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import eager, layout
from ..record import Op, Reference
from ..registration import register
from . import reference


class HeadEditInputs(NamedTuple):
    z: Tensor
    m: Tensor | None
    a: Tensor | None
    g_m: Tensor | None
    g_a: Tensor | None


class HeadEditAttrs(NamedTuple):
    channel_dim: int


def _widen(inputs: HeadEditInputs, attrs: HeadEditAttrs) -> HeadEditInputs:
    """Inputs ready to broadcast: z in the compute dtype, parameters in that or wider."""
    z, *params = inputs
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32

    def widen(p: Tensor) -> Tensor:
        return layout.broadcast(p, z, attrs.channel_dim).to(torch.promote_types(p.dtype, dtype))

    ready = [None if p is None else widen(p) for p in params]
    return HeadEditInputs(z.to(dtype), *ready)


def _forward(inputs: HeadEditInputs, attrs: HeadEditAttrs) -> Tensor:
    y = reference.forward(*_widen(inputs, attrs))
    return y.to(inputs.z.dtype).expand(inputs.z.shape)


def _backward(dy: Tensor, inputs: HeadEditInputs, attrs: HeadEditAttrs, grad_mask: int) -> list[Tensor]:
    wide = _widen(inputs, attrs)
    partials = reference.partials(*wide)
    dy = dy.to(wide.z.dtype)
    grads = []
    for i, like in OP.requested(inputs, grad_mask):
        values = dy * partials[i]
        grads.append(values.to(like.dtype) if i == 0 else layout.reduce(values, like, attrs.channel_dim))
    return grads


def _jvp(inputs: HeadEditInputs, attrs: HeadEditAttrs, tangents: HeadEditInputs) -> Tensor:
    wide = _widen(inputs, attrs)
    partials = reference.partials(*wide)
    total = torch.zeros_like(wide.z)
    for i, tangent in enumerate(tangents):
        if tangent is not None:
            wider = tangent if i == 0 else layout.broadcast(tangent, inputs.z, attrs.channel_dim)
            total = total + partials[i] * wider.to(total.dtype)
    return total.to(inputs.z.dtype)


_PARAMETERS = "Tensor? m, Tensor? a, Tensor? g_m, Tensor? g_a"

OP = register(
    Op(
        schema=f"head_edit(Tensor z, {_PARAMETERS}, int channel_dim) -> Tensor",
        inplace_schema=f"head_edit_(Tensor(a!) z, {_PARAMETERS}, int channel_dim) -> ()",
        backward_schema=f"head_edit_backward(Tensor dy, Tensor z, {_PARAMETERS}, int channel_dim, int grad_mask) -> Tensor[]",
        inputs=HeadEditInputs,
        attrs=HeadEditAttrs,
        elementwise=frozenset({"z"}),
        reference=Reference(_forward, _backward, _jvp),
        triton=f"{__package__}.triton_math",
        portable=f"{__package__}.portable",
        eager=eager.Entries("head_edit"),
    )
)
