"""The gated affine edit of attention heads as an op. Channels are the last dimension: heads times head_dim, or head_dim
with one row of parameters per head."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _layout
from .._op import Inputs, Op, Static, register
from . import reference


def _unpack(inputs: Inputs, static: Static) -> list[Tensor | None]:
    """The inputs ready to broadcast: z in the compute dtype, parameters in it too, or in their own where that is wider."""
    z = inputs[0]
    assert z is not None
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    params = [None if p is None else _layout.broadcast(p, z, static[0]) for p in inputs[1:]]
    return [z.to(dtype), *(None if p is None else p.to(torch.promote_types(p.dtype, dtype)) for p in params)]


def _forward(inputs: Inputs, static: Static) -> Tensor:
    z = inputs[0]
    assert z is not None
    y = reference.forward(*_unpack(inputs, static))  # type: ignore[arg-type]
    return y.to(z.dtype).expand(z.shape)


def _backward(dy: Tensor, inputs: Inputs, static: Static, needs: int) -> list[Tensor]:
    ready = _unpack(inputs, static)
    weights = reference.partials(*ready)  # type: ignore[arg-type]
    assert ready[0] is not None
    dy = dy.to(ready[0].dtype)
    grads = []
    for i in OP.wanted(needs):
        like = inputs[i]
        assert like is not None
        values = dy * weights[i]
        grads.append(values.to(like.dtype) if i == 0 else _layout.reduce(values, like, static[0]))
    return grads


def _jvp(inputs: Inputs, static: Static, tangents: Inputs) -> Tensor:
    ready = _unpack(inputs, static)
    weights = reference.partials(*ready)  # type: ignore[arg-type]
    z = inputs[0]
    assert z is not None
    assert ready[0] is not None
    total = torch.zeros_like(ready[0])
    for i, tangent in enumerate(tangents):
        if tangent is not None:
            moved = tangent if i == 0 else _layout.broadcast(tangent, z, static[0])
            total = total + weights[i] * moved.to(total.dtype)
    return total.to(z.dtype)


OP = register(
    Op(
        name="head_edit",
        inputs=("z", "m", "a", "g_m", "g_a"),
        optional=frozenset({"m", "a", "g_m", "g_a"}),
        elementwise=frozenset({"z"}),
        static=("int channel_dim",),
        reference_forward=_forward,
        reference_backward=_backward,
        reference_jvp=_jvp,
        triton="ctkernels.ops.head_edit.triton_math",
    )
)
