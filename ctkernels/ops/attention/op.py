"""The dispatcher op of attention with the head edit.

    ctkernels::attention_head_edit(tensors..., numbers..., keep) -> (y, z, lse)
    ctkernels::attention_head_edit_backward(dy, z, lse, tensors..., numbers..., grad_mask) -> gradients whose bit is set

Tensors and numbers are those of :class:`.problem.Problem`. The backward pass needs z, the unedited output, and lse (base 2);
each is empty unless its bit in ``keep`` is set. On CUDA the kernels are Triton's; elsewhere the op is the reference, and
:mod:`.function` uses torch's attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..autograd import vjp
from ..registration import define
from . import edit, reference
from .problem import DIFFERENTIABLE, KEEP_LSE, KEEP_Z, Problem, lse_for, result_for

_COUNT = len(Problem._fields)
_TENSORS = Problem._fields.index("longest_q")  # before the numbers


def run(problem: Problem, keep: int) -> Tensor:
    """y, from the dispatcher op. ``keep``: from :func:`.problem.keep_for`."""
    return FORWARD(*problem, keep)[0]


# ---- the op in plain torch ---------------------------------------------------------------------------------------------


def _dense(problem: Problem) -> Iterator[tuple[slice, slice, Problem]]:
    """(slice of q, slice of k, problem) for each sequence, widened, with all masks combined into one."""
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    widened: list[Any] = [t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for t in problem]
    p = Problem(*widened)
    if p.starts_q is None or p.starts_k is None:
        yield slice(None), slice(None), _masked(p)
        return
    bounds = p.starts_q.tolist(), p.starts_k.tolist()
    for first_q, last_q, first_k, last_k in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:]):
        at_q, at_k = slice(first_q, last_q), slice(first_k, last_k)
        q, k, v = (t[at].transpose(0, 1)[None] for t, at in ((p.q, at_q), (p.k, at_k), (p.v, at_k)))
        yield at_q, at_k, _masked(p._replace(q=q, k=k, v=v, starts_q=None, starts_k=None))


def _masked(p: Problem) -> Problem:
    seen = reference.visible(p.q.shape[2], p.k.shape[2], p.left, p.right, p.q.device)
    return p._replace(mask=reference.combine(p.mask, seen))


class ReferenceKernels:
    """The implementation on devices without kernels."""

    @staticmethod
    def forward(problem: Problem, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        y, z = (result_for(problem.q, problem.v.shape[-1]) for _ in range(2))
        lse = lse_for(problem.q)
        for at, _, p in _dense(problem):
            unedited, sums = reference.attention(p.q, p.k, p.v, p.mask, p.scale)
            edited = edit.forward(unedited, p.edits)
            if problem.packed is None:
                y.copy_(edited), z.copy_(unedited), lse.copy_(sums)
            else:
                y[at], z[at], lse[:, at] = edited[0].transpose(0, 1), unedited[0].transpose(0, 1), sums[0]
        return y, *_kept(z, lse, keep)

    @staticmethod
    def backward(dy: Tensor, _z: Tensor, _lse: Tensor, problem: Problem, grad_mask: int) -> list[Tensor]:
        return [
            result_for(t, t.shape[-1]).copy_(g) if i < 3 else g.to(t.dtype)
            for i, t, g in _gradients(dy, problem, grad_mask)
        ]


def _kept(z: Tensor, lse: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """z and lse; empty if their bit is not set."""
    return z if keep & KEEP_Z else z.new_empty((0,)), lse if keep & KEEP_LSE else lse.new_empty((0,))


def _gradients(dy: Tensor, problem: Problem, grad_mask: int) -> list[tuple[int, Tensor, Tensor]]:
    """(index, input, gradient) of the inputs in ``grad_mask``, in closed form, from the inputs alone. Differentiable."""
    parts: list[list[Tensor]] = [[] for _ in DIFFERENTIABLE]  # per gradient, one part per sequence
    packed = problem.packed is not None
    for at, _, p in _dense(problem):
        upstream = dy[at].transpose(0, 1)[None] if packed else dy
        grads = reference.backward(upstream.to(p.q.dtype), p.q, p.k, p.v, p.edits, p.mask, p.scale)
        for i in _indices(grad_mask):
            if (g := grads[i]) is not None:
                parts[i].append(g[0].transpose(0, 1) if packed and i < 3 else g)
    inputs: Sequence[Any] = problem
    return [
        (i, inputs[i], torch.cat(parts[i]) if packed and i < 3 else torch.stack(parts[i]).sum(0))
        for i in _indices(grad_mask)
    ]


def _indices(grad_mask: int) -> list[int]:
    return [i for i in range(len(DIFFERENTIABLE)) if grad_mask >> i & 1]


def kernels(q: Tensor) -> Any:
    """The implementation for a tensor: Triton's launches where that backend serves it, :class:`ReferenceKernels` elsewhere."""
    if backends.BACKENDS["triton"].refusal(q) is not None:
        return ReferenceKernels
    from .triton import launch  # imports Triton

    return launch


# ---- registration ------------------------------------------------------------------------------------------------------


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(args[0]).forward(Problem(*args[:_COUNT]), args[_COUNT])


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v, keep = args[0], args[2], args[_COUNT]
    y, z = (result_for(q, v.shape[-1]) for _ in range(2))
    return y, *_kept(z, lse_for(q), keep)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = inputs[_TENSORS:_COUNT]
    ctx.save_for_backward(*output[1:], *inputs[:_TENSORS])


def _first_order(ctx: Any, dy: Tensor | None, dz: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out: list[Tensor | None] = [None] * (_COUNT + 1)
    grad_mask = sum(1 << i for i in range(len(DIFFERENTIABLE)) if ctx.needs_input_grad[i])
    if dy is not None and grad_mask:
        for i, grad in zip(_indices(grad_mask), BACKWARD(dy, *ctx.saved_tensors, *ctx.numbers, grad_mask)):
            out[i] = grad
    return tuple(out)


def _backward(dy: Tensor, z: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    return kernels(args[0]).backward(dy, z, lse, Problem(*args[:_COUNT]), args[_COUNT])


def _fake_backward(dy: Tensor, z: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    return [
        result_for(args[i], args[i].shape[-1])
        if i < 3
        else torch.empty_like(args[i], memory_format=torch.contiguous_format)
        for i in _indices(args[_COUNT])
    ]


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.numbers, ctx.grad_mask = inputs[3 + _TENSORS : -1], inputs[-1]
    ctx.save_for_backward(inputs[0], *inputs[3 : 3 + _TENSORS])


def _second_order(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of <gradients, cotangents>, by the closed form: z and lse are functions of q, k and v."""
    count = 1 + len(DIFFERENTIABLE)
    fixed = (*ctx.saved_tensors[count:], *ctx.numbers)

    def gradients(dy: Tensor, *inputs: Any) -> list[Tensor]:
        return [g.to(t.dtype) for _, t, g in _gradients(dy, Problem(*inputs, *fixed), ctx.grad_mask)]

    d_dy, *grads = vjp(gradients, ctx.saved_tensors[:count], cotangents)
    return (d_dy, None, None, *grads, *[None] * (len(fixed) + 1))


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? m, Tensor? a, Tensor? g_m, Tensor? g_a, Tensor? mask, Tensor? starts_q, "
    "Tensor? starts_k, SymInt longest_q, SymInt longest_k, float scale, int left, int right"
)
FORWARD = define(
    f"attention_head_edit({_ARGUMENTS}, int keep) -> (Tensor, Tensor, Tensor)",
    kernel=_forward, fake=_fake_forward, backward=_first_order, save=_save,
)  # fmt: skip
BACKWARD = define(
    f"attention_head_edit_backward(Tensor dy, Tensor z, Tensor lse, {_ARGUMENTS}, int grad_mask) -> Tensor[]",
    kernel=_backward, fake=_fake_backward, backward=_second_order, save=_save_backward,
)  # fmt: skip
