"""Attention with the head edit in its epilogue, as an op: schemas, fakes, autograd.

    ctkernels::attention_head_edit(tensors..., numbers..., keep) -> (y, z, lse)
    ctkernels::attention_head_edit_backward(dy, z, lse, tensors..., numbers..., needs) -> gradients whose bit is set

Tensors are q, k, v, m, a, g_m, g_a, mask, starts_q and starts_k; numbers are longest_q, longest_k, scale, left and right (see
:class:`Problem`). z, the unedited output, and lse, base 2, are what a backward pass needs: each is empty unless its bit of
``keep`` is set. On CUDA the kernels are Triton's; elsewhere the op is the plain reference: :mod:`.function` uses torch's
attention there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..record import _LIBRARY
from . import reference
from .sdpa import Edits, Packed

DIFFERENTIABLE = ("q", "k", "v", "m", "a", "g_m", "g_a")
KEEP_Z, KEEP_LSE = 1, 2

_TENSORS = "Tensor q, Tensor k, Tensor v, " + ", ".join(
    f"Tensor? {name}" for name in ("m", "a", "g_m", "g_a", "mask", "starts_q", "starts_k")
)
_NUMBERS = "SymInt longest_q, SymInt longest_k, float scale, int left, int right"
_NAME = "attention_head_edit"


class Problem(NamedTuple):
    """One call. q (B, H, T, D), k (B, G, S, D), v (B, G, S, E), mask (B, H, T, S) with any strides; with starts, packed: q
    (T, H, D), k (S, G, D), v (S, G, E). left and right: how far from its own position a query sees, or UNBOUNDED."""

    q: Tensor
    k: Tensor
    v: Tensor
    m: Tensor | None
    a: Tensor | None
    g_m: Tensor | None
    g_a: Tensor | None
    mask: Tensor | None
    starts_q: Tensor | None
    starts_k: Tensor | None
    longest_q: int
    longest_k: int
    scale: float
    left: int
    right: int

    @property
    def edits(self) -> Edits:
        return self.m, self.a, self.g_m, self.g_a

    @property
    def packed(self) -> Packed | None:
        if self.starts_q is None or self.starts_k is None:
            return None
        return Packed(self.starts_q, self.starts_k, self.longest_q, self.longest_k)


def result_for(q: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, of q's shape but for the last dimension; the heads of a token lie side by side in memory."""
    if q.dim() == 3:
        return q.new_empty((*q.shape[:2], size), dtype=dtype)
    batch, heads, tokens = q.shape[:3]
    return q.new_empty((batch, tokens, heads, size), dtype=dtype).transpose(1, 2)


def lse_for(q: Tensor) -> Tensor:
    """Uninitialised (B, H, T), or (H, T) if packed."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return q.new_empty(shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def run(problem: Problem, keep: int) -> Tensor:
    """y, by the dispatcher op. ``keep``: what the gradients that are wanted need."""
    return torch.ops.ctkernels.attention_head_edit.default(*problem, keep)[0]


def keep_for(wanted: list[bool]) -> int:
    """What the backward pass needs for the gradients of those of DIFFERENTIABLE that are ``wanted``."""
    inner = any(wanted[:3])
    return KEEP_Z * (inner or wanted[3] or wanted[5]) + KEEP_LSE * inner


# ---- the op in plain torch ---------------------------------------------------------------------------------------------


def _dense(problem: Problem) -> Iterator[tuple[slice, slice, Problem]]:
    """The sequences of a problem one by one, widened, with one mask each: where they lie in q and in k, and the problem."""
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    widened: list[Any] = [t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for t in problem]
    p = Problem(*widened)
    everything = slice(None)
    if p.starts_q is None or p.starts_k is None:
        yield everything, everything, _masked(p)
        return
    bounds = p.starts_q.tolist(), p.starts_k.tolist()
    for first_q, last_q, first_k, last_k in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:]):
        at_q, at_k = slice(first_q, last_q), slice(first_k, last_k)
        q, k, v = (t[at].transpose(0, 1)[None] for t, at in ((p.q, at_q), (p.k, at_k), (p.v, at_k)))
        yield at_q, at_k, _masked(p._replace(q=q, k=k, v=v, starts_q=None, starts_k=None))


def _masked(p: Problem) -> Problem:
    seen = reference.visible(p.q.shape[2], p.k.shape[2], p.left, p.right, p.q.device)
    return p._replace(mask=reference.combine(p.mask, seen))


class Plain:
    """The implementation for tensors that no kernel serves."""

    @staticmethod
    def forward(problem: Problem, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        y, z = (result_for(problem.q, problem.v.shape[-1]) for _ in range(2))
        lse = lse_for(problem.q)
        for at, _, p in _dense(problem):
            found, sums = reference.attention(p.q, p.k, p.v, p.mask, p.scale)
            edited = reference.edit.forward(found, *reference.edit_operands(*p.edits))
            if problem.packed is None:
                y.copy_(edited), z.copy_(found), lse.copy_(sums)
            else:
                y[at], z[at], lse[:, at] = edited[0].transpose(0, 1), found[0].transpose(0, 1), sums[0]
        return y, (z if keep & KEEP_Z else _nothing(z)), (lse if keep & KEEP_LSE else _nothing(lse))

    @staticmethod
    def backward(dy: Tensor, _z: Tensor, _lse: Tensor, problem: Problem, needs: int) -> list[Tensor]:
        return [
            result_for(given, given.shape[-1]).copy_(g) if i < 3 else g.to(given.dtype)
            for i, given, g in _gradients(dy, problem, needs)
        ]


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty((0,))


def _gradients(dy: Tensor, problem: Problem, needs: int) -> list[tuple[int, Tensor, Tensor]]:
    """(index, input, gradient) of the inputs in ``needs``: the closed form, from the inputs alone. Differentiable."""
    found: list[list[Tensor]] = [[] for _ in DIFFERENTIABLE]
    for at, _, p in _dense(problem):
        own = dy if problem.packed is None else dy[at].transpose(0, 1)[None]
        grads = reference.backward(own.to(p.q.dtype), p.q, p.k, p.v, p.edits, p.mask, p.scale)
        for i, g in enumerate(grads):
            if g is not None and needs >> i & 1:
                found[i].append(g if i > 2 or problem.packed is None else g[0].transpose(0, 1))
    out = []
    inputs: Sequence[Any] = problem
    for i, parts in enumerate(found):
        if needs >> i & 1:
            total = torch.cat(parts) if i < 3 and problem.packed is not None else torch.stack(parts).sum(0)
            out.append((i, inputs[i], total))
    return out


def kernels(q: Tensor) -> Any:
    """The implementation that serves a tensor: Triton's launches on CUDA, or :class:`Plain`."""
    if not q.is_cuda:
        return Plain
    from .triton import launch as triton_launch

    return triton_launch


# ---- registration ------------------------------------------------------------------------------------------------------

_COUNT = len(Problem._fields)
_TAGS = [torch.Tag.pt2_compliant_tag]
_LIBRARY.define(f"{_NAME}({_TENSORS}, {_NUMBERS}, int keep) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    f"{_NAME}_backward(Tensor dy, Tensor z, Tensor lse, {_TENSORS}, {_NUMBERS}, int needs) -> Tensor[]", tags=_TAGS
)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(args[0]).forward(Problem(*args[:_COUNT]), args[_COUNT])


def _backward(dy: Tensor, z: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    return kernels(args[0]).backward(dy, z, lse, Problem(*args[:_COUNT]), args[_COUNT])


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v, keep = args[0], args[2], args[_COUNT]
    y, z, lse = result_for(q, v.shape[-1]), result_for(q, v.shape[-1]), lse_for(q)
    return y, (z if keep & KEEP_Z else _nothing(z)), (lse if keep & KEEP_LSE else _nothing(lse))


def _fake_backward(dy: Tensor, z: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    wanted = [i for i in range(len(DIFFERENTIABLE)) if args[_COUNT] >> i & 1]
    return [
        result_for(args[i], args[i].shape[-1])
        if i < 3
        else torch.empty_like(args[i], memory_format=torch.contiguous_format)
        for i in wanted
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = inputs[10:_COUNT]
    ctx.save_for_backward(*output[1:], *inputs[:10])


def _first_order(ctx: Any, dy: Tensor | None, dz: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out: list[Tensor | None] = [None] * (_COUNT + 1)
    needs = sum(1 << i for i in range(len(DIFFERENTIABLE)) if ctx.needs_input_grad[i])
    if dy is not None and needs:
        op = torch.ops.ctkernels.attention_head_edit_backward.default
        _spread(out, needs, op(dy, *ctx.saved_tensors, *ctx.numbers, needs))
    return tuple(out)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.numbers, ctx.needs = inputs[13:-1], inputs[-1]
    ctx.save_for_backward(inputs[0], *inputs[3:13])


def _second_order(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of <gradients, cotangents>, by the closed form: z and lse count as functions of q, k and v."""
    dy, *tensors = ctx.saved_tensors
    moving = [i for i, t in enumerate(tensors[: len(DIFFERENTIABLE)]) if t is not None]

    def function(dy: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, value in zip(moving, values):
            full[i] = value
        return tuple(g.to(given.dtype) for _, given, g in _gradients(dy, Problem(*full, *ctx.numbers), ctx.needs))

    outputs, pullback, *_ = torch.func.vjp(function, dy, *(tensors[i] for i in moving))
    filled = tuple(torch.zeros_like(o) if c is None else c.to(o.dtype) for o, c in zip(outputs, cotangents))
    d_dy, *grads = pullback(filled)
    out: list[Tensor | None] = [d_dy, None, None, *[None] * (_COUNT + 1)]
    for i, grad in zip(moving, grads):
        out[3 + i] = grad
    return tuple(out)


def _spread(out: list[Tensor | None], needs: int, grads: Sequence[Tensor]) -> None:
    for i, grad in zip((i for i in range(len(DIFFERENTIABLE)) if needs >> i & 1), grads):
        out[i] = grad


for _suffix, _kernel, _fake, _gradient, _setup in (
    ("", _forward, _fake_forward, _first_order, _save),
    ("_backward", _backward, _fake_backward, _second_order, _save_backward),
):
    _LIBRARY.impl(_NAME + _suffix, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ctkernels::{_NAME}{_suffix}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"ctkernels::{_NAME}{_suffix}", _gradient, setup_context=_setup, lib=_LIBRARY)
