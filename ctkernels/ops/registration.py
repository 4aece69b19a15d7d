"""Dispatcher ops: the only code of the package that uses ``torch.library``.

:func:`define` defines one op from its schema and functions; :func:`register` those of an :class:`~.record.Op`. Their namespace
is that of :mod:`.._ops`. The compiled extensions (``csrc``) register their kernels themselves, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from . import autograd, backends, layout, memory
from .record import Kernels, Op

_LIBRARY = torch.library.Library(ops.name, "DEF")
OPS: dict[str, Op] = {}  # registered, by name


def define(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    keys: dict[str, Callable[..., Any]] | None = None,
) -> torch._ops.OpOverload:
    """Defines a dispatcher op in the namespace of this package.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        kernel: the implementation on devices without one of their own.
        fake: allocates the results for fake tensors.
        backward, save: as in ``torch.library.register_autograd``; None for an op without gradients.
        keys: implementations by dispatch key, such as ``"CUDA"``. Those of ADInplaceOrView and Autograd take the call's
            key set as their first argument.
    """
    _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    for key, implementation in (keys or {}).items():
        _LIBRARY.impl(name, implementation, key, with_keyset=key in ("ADInplaceOrView", "Autograd"))
    full_name = add_op_namespace_prefix(name)
    torch.library.register_fake(full_name, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(full_name, backward, setup_context=save, lib=_LIBRARY)
    return getattr(ops, name).default


def register(op: Op) -> Op:
    """Defines the dispatcher ops of ``op``, once, at import."""
    reference = reference_kernels(op)
    triton = None
    if op.triton is not None and backends.BACKENDS["triton"].missing is None:
        triton = triton_kernels(op)
    if backends.BACKENDS["cuda"].missing is not None:  # otherwise the compiled kernels have registered themselves
        op.overloads = define_kernels(op, reference, cuda=triton)
    else:
        op.overloads = define_kernels(op, reference)
        if triton is not None:
            op.triton_overloads = define_kernels(op, reference, cuda=triton, suffix="_triton")
    OPS[op.name] = op
    return op


def define_kernels(op: Op, kernels: Kernels, cuda: Kernels | None = None, suffix: str = "") -> Kernels:
    """Defines the dispatcher ops of ``op`` with these implementations, others on CUDA, and ``suffix`` after each name."""
    count = len(op.inputs._fields)

    def schema(text: str) -> str:
        return text.replace("(", suffix + "(", 1)

    def fake_forward(*args: Any) -> Tensor:
        return layout.result_like(op.like(args[:count], args[count:]))

    def fake_backward(dy: Tensor, *args: Any) -> list[Tensor]:
        return [
            layout.result_like(args[0]) if op.elementwise_flags[i] else layout.parameter_like(args[i])
            for i in op.indices(args[-1])
        ]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.attrs = inputs[count:]
        ctx.save_for_backward(*inputs[:count])

    def first_order(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors

        def compute(grad_mask: int) -> Sequence[Tensor]:
            return backward(dy, *inputs, *ctx.attrs, grad_mask)

        return (*op.gradients(ctx.needs_input_grad[:count], inputs, compute), *[None] * len(ctx.attrs))

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.attrs, ctx.grad_mask = inputs[1 + count : -1], inputs[-1]
        ctx.save_for_backward(*inputs[: 1 + count])

    def second_order(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
        grads = autograd.second_order(op, ctx.attrs, ctx.grad_mask, ctx.saved_tensors, cotangents)
        return (*grads, *[None] * (len(ctx.attrs) + 1))

    def on_cuda(i: int) -> dict[str, Callable[..., Any]]:
        return {} if cuda is None else {"CUDA": cuda[i]}

    forward = define(
        schema(op.schema),
        kernel=kernels.forward, fake=fake_forward, backward=first_order, save=save, keys=on_cuda(0),
    )  # fmt: skip
    backward = define(
        schema(op.backward_schema),
        kernel=kernels.backward, fake=fake_backward, backward=second_order, save=save_backward, keys=on_cuda(2),
    )  # fmt: skip
    if op.inplace_schema is None:
        return Kernels(forward, None, backward)

    def refuse_gradient(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        op.refuse_gradient(args[:count])
        inplace.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def count_write(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        memory.count_write(op.name, op.inputs._fields[0], args[0])
        with torch._C._AutoDispatchBelowADInplaceOrView():  # a kernel that copies into the tensor must not count again
            inplace.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    def resolve_negative(*args: Any) -> None:  # torch's fallback expects an in-place op to return a tensor
        args[0].copy_(forward(*args))

    keys = {"Negative": resolve_negative, "Autograd": refuse_gradient, "ADInplaceOrView": count_write, **on_cuda(1)}
    inplace = define(schema(op.inplace_schema), kernel=kernels.inplace, fake=lambda *args: None, keys=keys)
    return Kernels(forward, inplace, backward)


def reference_kernels(op: Op) -> Kernels:
    """The reference on flat arguments."""
    count = len(op.inputs._fields)

    def forward(*args: Any) -> Tensor:
        return op.strided_forward(args[:count], args[count:])

    def inplace(*args: Any) -> None:
        args[0].copy_(op.reference_forward(args[:count], args[count:]))

    def backward(dy: Tensor, *args: Any) -> list[Tensor]:
        return op.strided_backward(dy, args[:count], args[count:-1], args[-1])

    return Kernels(forward, inplace, backward)


def triton_kernels(op: Op) -> Kernels:
    """The Triton kernels on flat arguments, or the reference on a GPU they do not serve. The first call imports Triton."""
    reference = reference_kernels(op)

    def select(x: Tensor) -> Kernels:
        if backends.BACKENDS["triton"].refusal(x) is not None:
            return reference
        from .channelwise.launch import implementation

        return implementation(op)

    def kernel(i: int) -> Callable[..., Any]:
        selected: dict[tuple[int, torch.dtype], Callable[..., Any]] = {}  # by device and dtype

        def call(*args: Any) -> Any:
            key = args[0].get_device(), args[0].dtype
            if key not in selected:
                selected[key] = select(args[0])[i]
            return selected[key](*args)

        return call

    return Kernels(*(kernel(i) for i in range(3)))
