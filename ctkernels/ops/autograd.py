"""Autograd of eager calls: ``autograd.Function`` classes over an op's kernels.

They cost less per call than a dispatcher op's ``register_autograd`` (:mod:`.registration`, for compiled and exported
programs), and support forward-mode AD and ``torch.func``. This folder's README.md lists every implementation of an op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import layout

if TYPE_CHECKING:
    from .record import Attrs, Op


def needs_grad(inputs: Sequence[Tensor | None]) -> bool:
    """Whether a call on these tensors records a gradient."""
    if torch.is_grad_enabled():
        for t in inputs:
            if t is not None and t.requires_grad:
                return True
    return False


def in_transform() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def in_forward_mode() -> bool:
    """Whether forward-mode AD is active, through ``torch.func`` or ``torch.autograd.forward_ad``."""
    return torch.autograd.forward_ad._current_level >= 0


def nested_forward_mode() -> bool:
    """Whether one ``torch.func`` forward-mode derivative runs inside another."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def gradients(op: Op, attrs: Attrs, needs: Sequence[bool], dy: Tensor, inputs: Any) -> list[Tensor | None]:
    """A gradient or None per input, differentiable again where autograd asks for it."""

    def compute(grad_mask: int) -> Sequence[Tensor]:
        # autograd.grad(is_grads_batched=True) and forward mode need plain torch: a kernel would drop the tangents.
        if torch._C._functorch.is_legacy_batchedtensor(dy) or in_forward_mode():
            return op.reference_backward(dy, inputs, attrs, grad_mask)
        if torch.is_grad_enabled() or in_transform():
            return Backward.apply(op, attrs, grad_mask, dy, *inputs)
        return op.backward(dy, inputs, attrs, grad_mask)

    return op.gradients(needs, inputs, compute)


class Forward(torch.autograd.Function):
    """y = op(inputs), under transforms. Saves only its inputs."""

    @staticmethod
    def forward(op: Op, attrs: Attrs, *inputs: Any) -> Tensor:
        return op.forward(inputs, attrs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, ctx.attrs = inputs[0], inputs[1]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *gradients(ctx.op, ctx.attrs, ctx.needs_input_grad[2:], dy, ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, _op: None, _attrs: None, *tangents: Tensor | None) -> Tensor:
        return ctx.op.reference_jvp(ctx.saved_tensors, ctx.attrs, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], op: Op, attrs: Attrs, *inputs: Any) -> tuple[Tensor, int]:
        flags = op.elementwise_flags
        merged, grouped, inner = layout.merge_vmapped(inputs, in_dims[2:], info.batch_size, flags, per_sample=False)
        y = op(tuple(merged), _shifted(op, attrs, grouped and inner > 0))  # type: ignore[arg-type]
        return (y.unflatten(0, (info.batch_size, inner)) if grouped and inner else y), 0


class ReverseForward(torch.autograd.Function):
    """:class:`Forward` outside transforms: a Function with ``setup_context`` costs three times as much per call."""

    @staticmethod
    def forward(ctx: Any, op: Op, attrs: Attrs, *inputs: Any) -> Tensor:
        ctx.op, ctx.attrs = op, attrs
        ctx.save_for_backward(*inputs)
        return op.forward(inputs, attrs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        op, attrs, needs = ctx.op, ctx.attrs, ctx.needs_input_grad
        inputs = ctx.saved_tensors  # read once: checkpointing recomputes them on every access
        grads: tuple[Tensor | None, ...] = op.eager.gradients(needs, dy, inputs, attrs)
        return (None, None, *gradients(op, attrs, needs[2:], dy, inputs)) if grads is NotImplemented else grads


class Backward(torch.autograd.Function):
    """Gradients as a differentiable function of (dy, inputs); second derivatives come from the reference."""

    @staticmethod
    def forward(op: Op, attrs: Attrs, grad_mask: int, dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(op.backward(dy, inputs, attrs, grad_mask))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.attrs, ctx.grad_mask = inputs[:3]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *second_order(ctx.op, ctx.attrs, ctx.grad_mask, ctx.saved_tensors, cotangents))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], op: Op, attrs: Attrs, grad_mask: int, dy: Tensor, *inputs: Any
    ) -> tuple[tuple[Tensor, ...], int]:
        size, flags = info.batch_size, op.elementwise_flags
        merged, grouped, inner = layout.merge_vmapped((dy, *inputs), in_dims[3:], size, (True, *flags), per_sample=True)
        attrs = _shifted(op, attrs, grouped and inner > 0)
        grads = Backward.apply(op, attrs, grad_mask, *merged)
        out = []
        for i, grad in zip(op.indices(grad_mask), grads):
            if flags[i]:
                out.append(grad.unflatten(0, (size, inner)) if grouped and inner else grad)
            else:
                shape = list(inputs[i].shape)
                if in_dims[4 + i] is not None:
                    del shape[in_dims[4 + i]]
                out.append(grad.reshape(size, *shape))
        return tuple(out), 0


class TracedReference(torch.autograd.Function):
    """The reference's forward and backward, traceable: the compiler fuses them with their neighbours."""

    @staticmethod
    def forward(ctx: Any, op: Op, attrs: Attrs, *inputs: Any) -> Tensor:
        ctx.op, ctx.attrs = op, attrs
        ctx.save_for_backward(*inputs)
        return op.reference_forward(inputs, attrs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        op, attrs, inputs = ctx.op, ctx.attrs, ctx.saved_tensors

        def compute(grad_mask: int) -> Sequence[Tensor]:
            return op.reference_backward(dy, inputs, attrs, grad_mask)

        return (None, None, *op.gradients(ctx.needs_input_grad[2:], inputs, compute))


def second_order(
    op: Op, attrs: Attrs, grad_mask: int, saved: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of <gradients, cotangents> with respect to ``saved`` = (dy, *inputs), through the reference."""

    def gradients(dy: Tensor, *inputs: Any) -> list[Tensor]:
        return op.reference_backward(dy, inputs, attrs, grad_mask)

    return vjp(gradients, saved, cotangents)


def vjp(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of <function(*arguments), cotangents> with respect to the floating-point arguments; None for the others."""
    differentiable = [i for i, t in enumerate(arguments) if t is not None and t.is_floating_point()]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(arguments)
        for i, value in zip(differentiable, values):
            full[i] = value
        return tuple(function(*full))

    outputs, pullback, *_ = torch.func.vjp(call, *(arguments[i] for i in differentiable))
    filled = tuple(torch.zeros_like(o) if c is None else c.to(o.dtype) for o, c in zip(outputs, cotangents))
    grads: list[Tensor | None] = [None] * len(arguments)
    for i, grad in zip(differentiable, pullback(filled)):
        grads[i] = grad
    return grads


def _shifted(op: Op, attrs: Attrs, same_rank: bool) -> Attrs:
    """``attrs`` for tensors with one more leading dimension, unless ``same_rank``."""
    named = op.attrs(*attrs)
    if same_rank or named.channel_dim == layout.NO_CHANNEL:
        return attrs
    return named._replace(channel_dim=named.channel_dim + 1)
