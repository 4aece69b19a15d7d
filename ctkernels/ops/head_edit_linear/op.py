"""The dispatcher op of a frozen linear layer whose input's heads are edited.

    ctkernels::head_edit_linear(z, weight, bias, m, a, g_m, g_a) -> Tensor
    ctkernels::head_edit_linear_backward(dy, z, weight, m, a, g_m, g_a, grad_mask) -> gradients whose bit is set

W (p z + q) + b = (W diag p) z + (W q + b) with p = 1 + g_m m and q = g_a a: the forward pass over z becomes one over W. In the
backward pass, dy (W diag p) is z's gradient, already scaled. The parameters' gradients are column sums over it, divided by p.
Where p is too small or too large for that, the weights are scaled by :func:`.reference.bounded` of p instead, and those columns
of z's gradient are corrected afterwards. Only the inputs are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..autograd import vjp
from ..head_edit.op import OP as HEAD_EDIT
from ..head_edit.op import HeadEditAttrs, HeadEditInputs
from ..registration import define
from . import reference
from .reference import Edits

DIFFERENTIABLE = ("z", "m", "a", "g_m", "g_a")


class TorchKernels:
    """The passes over weights and gradients by the head edit's kernels and torch's."""

    @staticmethod
    def fold(weight: Tensor, bias: Tensor | None, edits: Edits, bound: bool) -> tuple[Tensor, Tensor | None]:
        """(W diag p, W q + b); with ``bound``, p is bounded."""
        m, a, g_m, g_a = edits
        if a is not None:
            q = (a if g_a is None else g_a[:, None] * a).flatten().to(weight.dtype)
            bias = weight @ q if bias is None else torch.addmv(bias, weight, q)
        if m is None:
            return weight, bias
        if bound:
            m, g_m = reference.bounded(reference.scale(m, g_m)) - 1, None
        inputs = HeadEditInputs(weight, m.flatten(), None, g_m, None)
        return HEAD_EDIT.forward(inputs, HeadEditAttrs(1)), bias

    @staticmethod
    def finish(dz: Tensor, s1: Tensor | None, s0: Tensor | None, edits: Edits, bound: bool) -> list[Tensor | None]:
        """Gradients of the parameters from column sums over dz. With ``bound``, the weights were folded with it, and dz is
        corrected in place."""
        m, _, g_m, _ = edits
        if bound:
            assert m is not None
            p = reference.scale(m, g_m)
            by = 1 + (reference.bounded(p) - 1)  # as the weights were scaled
            s1, s0 = (s if s is None else s / by for s in (s1, s0))
            if bool((by != p).any()):
                correction = HeadEditInputs(dz, (p / by - 1).flatten(), None, None, None)
                HEAD_EDIT.call_(correction, HeadEditAttrs(dz.dim() - 1))
        return reference.parameter_gradients(s1, s0, edits)


def kernels(z: Tensor) -> Any:
    """The implementation of the passes for a tensor: Triton's where that backend serves it, except in float64, and
    :class:`TorchKernels` elsewhere."""
    if z.dtype == torch.float64 or backends.BACKENDS["triton"].refusal(z) is not None:
        return TorchKernels
    from . import triton  # imports Triton

    return triton


def _forward(z: Tensor, weight: Tensor, bias: Tensor | None, *edits: Tensor | None) -> Tensor:
    folded, offset = kernels(z).fold(weight, bias, edits, bound=False)
    return F.linear(z, folded, offset)


def _backward(dy: Tensor, z: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    m, a, g_m, g_a, grad_mask = rest
    edits, launch = (m, a, g_m, g_a), kernels(z)
    through, parameters = grad_mask & 1, grad_mask & ~1
    bound = bool(through and parameters) and m is not None
    scaled = weight
    if through and m is not None:
        scaled, _ = launch.fold(weight, None, (m, None, g_m, None), bound=bound)
    dz = dy @ scaled
    grads: list[Tensor | None] = [None] * len(DIFFERENTIABLE)
    if parameters:
        s1, s0 = _column_sums(dz, z, edits, bool(grad_mask & 0b01010), bool(grad_mask & 0b10100))
        grads[1:] = launch.finish(dz, s1, s0, edits, bound)
    grads[0] = dz
    like = (z, *edits)
    return [grads[i].to(like[i].dtype) for i in _indices(grad_mask)]  # type: ignore[union-attr]


def _column_sums(
    dz: Tensor, z: Tensor, edits: Edits, of_products: bool, of_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(S1, S0) of dz in one pass that only reads, the head edit's: its gradients of m and a without gates."""
    m, a, _, _ = edits
    flat_m, flat_a = (t if t is None else t.flatten() for t in (m, a))
    inputs = HeadEditInputs(z, flat_m, flat_a, None, None)
    grads = iter(HEAD_EDIT.backward(dz, inputs, HeadEditAttrs(z.dim() - 1), of_products << 1 | of_values << 2))
    s1 = next(grads).view(m.shape) if m is not None and of_products else None
    s0 = next(grads).view(a.shape) if a is not None and of_values else None
    return s1, s0


def _indices(grad_mask: int) -> list[int]:
    return [i for i in range(len(DIFFERENTIABLE)) if grad_mask >> i & 1]


# ---- registration ------------------------------------------------------------------------------------------------------


def _fake_forward(z: Tensor, weight: Tensor, bias: Tensor | None, *edits: Tensor | None) -> Tensor:
    return z.new_empty((*z.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, weight, _, *edits = inputs
    ctx.save_for_backward(z, weight, *edits)


def _first_order(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_z, _, _, *needs_edits = ctx.needs_input_grad
    grad_mask = sum(1 << i for i, needed in enumerate((needs_z, *needs_edits)) if needed)
    out: list[Tensor | None] = [None] * len(DIFFERENTIABLE)
    for i, grad in zip(_indices(grad_mask), BACKWARD(dy, *ctx.saved_tensors, grad_mask)):
        out[i] = grad
    return (out[0], None, None, *out[1:])


def _fake_backward(dy: Tensor, z: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    like = (z, *rest[:-1])
    return [torch.empty_like(like[i], memory_format=torch.contiguous_format) for i in _indices(rest[-1])]


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.grad_mask = inputs
    ctx.save_for_backward(*tensors)


def _second_order(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of <gradients, cotangents>, by the closed form."""

    def gradients(dy: Tensor, z: Tensor, weight: Tensor, *edits: Any) -> list[Tensor]:
        found = reference.backward(dy, z, weight, edits)
        return [found[i] for i in _indices(ctx.grad_mask)]  # type: ignore[misc]

    grads = vjp(gradients, ctx.saved_tensors, cotangents)
    grads[2] = None  # weights are frozen
    return (*grads, None)


_EDITS = "Tensor? m, Tensor? a, Tensor? g_m, Tensor? g_a"
FORWARD = define(
    f"head_edit_linear(Tensor z, Tensor weight, Tensor? bias, {_EDITS}) -> Tensor",
    kernel=_forward, fake=_fake_forward, backward=_first_order, save=_save,
)  # fmt: skip
BACKWARD = define(
    f"head_edit_linear_backward(Tensor dy, Tensor z, Tensor weight, {_EDITS}, int grad_mask) -> Tensor[]",
    kernel=_backward, fake=_fake_backward, backward=_second_order, save=_save_backward,
)  # fmt: skip
