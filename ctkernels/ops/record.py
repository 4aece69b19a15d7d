"""The record of an op: schemas, reference in plain torch, and kernel calls.

An op becomes up to three dispatcher ops (:mod:`.registration`), whose schemas are written out in the op's folder:

    ctkernels::NAME(inputs..., attrs...) -> Tensor
    ctkernels::NAME_(inputs..., attrs...) -> ()               in place, over the first input
    ctkernels::NAME_backward(dy, inputs..., attrs..., grad_mask) -> Tensor[]    gradients of the inputs whose bit is set
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import autograd, backends, eager, layout, memory

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The first input is always present: it determines the result's shape and dtype.
Inputs: TypeAlias = "tuple[Tensor, Unpack[tuple[Tensor | None, ...]]]"
Attrs: TypeAlias = tuple[Any, ...]  # the op's NamedTuple, or its values in order


class Kernels(NamedTuple):
    """One implementation of an op, on flat arguments: the dispatcher's overloads, or functions with their signatures."""

    forward: Callable[..., Any]
    inplace: Any  # None for an op without an in-place form
    backward: Callable[..., Any]


class Reference(NamedTuple):
    """An op in plain, differentiable torch, with closed forms where autograd would lose digits.

    forward(inputs, attrs) -> y        backward(dy, inputs, attrs, grad_mask) -> gradients
    jvp(inputs, attrs, tangents) -> tangent of y
    """

    forward: Callable[[Any, Any], Tensor]
    backward: Callable[[Tensor, Any, Any, int], list[Tensor]]
    jvp: Callable[[Any, Any, Any], Tensor]


@dataclass(eq=False)
class Op:
    """An op.

    schema, backward_schema, inplace_schema: of the dispatcher ops; None without an in-place form.
    inputs, attrs: NamedTuple classes of the differentiable tensors and of the other arguments.
    elementwise: inputs with the first one's shape; the others are per-channel parameters.
    factor: name of an elementwise input that, if absent, is the second half of the first input's channels; the result then has
        the shape of the first half.
    triton: module of its Triton kernels, imported on the first CUDA call: a ``MATH`` for the channelwise skeleton, or
        ``forward`` and ``backward``.
    portable: module of its form in exported programs, see :mod:`.portable`; None without one.
    shared_grad: (b, a, c): if c is None, grad(b) is grad(a); computed once.
    eager: entry points that eager CPU calls try before the dispatcher.
    """

    schema: str
    backward_schema: str
    inputs: Any
    attrs: Any
    elementwise: frozenset[str]
    reference: Reference
    inplace_schema: str | None = None
    factor: str | None = None
    triton: str | None = None
    portable: str | None = None
    shared_grad: tuple[str, str, str] | None = None
    eager: eager.Entries = eager.NONE
    name: str = field(init=False)
    overloads: Kernels = field(init=False)  # set by registration, as the next
    triton_overloads: Kernels | None = field(init=False, default=None)  # if `overloads` has compiled CUDA kernels

    def __post_init__(self) -> None:
        schema = torch._C.parse_schema(self.schema)
        self.name = schema.name
        declared, expected = [a.name for a in schema.arguments], [*self.inputs._fields, *self.attrs._fields]
        if declared != expected:
            raise ValueError(f"{self.name}: the schema's arguments must be {expected}, got {declared}")

    # ---- masks of gradients ------------------------------------------------------------------------------------------

    def grad_mask(self, needs_grad: Sequence[bool]) -> int:
        """Bit mask over the inputs."""
        return sum(1 << i for i, needed in enumerate(needs_grad) if needed)

    def indices(self, grad_mask: int) -> list[int]:
        """Indices of the inputs in a bit mask."""
        return [i for i in range(len(self.elementwise_flags)) if grad_mask >> i & 1]

    def requested(self, inputs: Sequence[Any], grad_mask: int) -> list[tuple[int, Tensor]]:
        """(index, input) of the inputs in a bit mask."""
        return [(i, inputs[i]) for i in self.indices(grad_mask)]

    def gradients(
        self, needs_grad: Sequence[bool], inputs: Inputs, compute: Callable[[int], Sequence[Tensor]]
    ) -> list[Tensor | None]:
        """A gradient or None per input, from ``compute(grad_mask)``, which returns those in a bit mask."""
        mask, shared = self.grad_mask(needs_grad), False
        if self.shared_grad is not None:
            b, a, c = self._shared_indices
            shared = needs_grad[b] and needs_grad[a] and inputs[c] is None
            mask &= ~(shared << b)
        out: list[Tensor | None] = [None] * len(inputs)
        for i, grad in zip(self.indices(mask), compute(mask)):
            out[i] = grad
        if shared:
            out[b] = out[a]
        return out

    @cached_property
    def _shared_indices(self) -> list[int]:
        return [self.inputs._fields.index(name) for name in self.shared_grad or ()]

    @cached_property
    def _factor_index(self) -> int | None:
        return None if self.factor is None else self.inputs._fields.index(self.factor)

    def like(self, inputs: Sequence[Any], attrs: Attrs) -> Tensor:
        """The tensor whose shape, dtype and strides the result has: the first input, or its first half if it is packed."""
        if self._factor_index is None or inputs[self._factor_index] is not None:
            return inputs[0]
        return layout.halves(inputs[0], self.attrs(*attrs).channel_dim)[0]

    @cached_property
    def elementwise_flags(self) -> tuple[bool, ...]:
        return tuple(name in self.elementwise for name in self.inputs._fields)

    # ---- the reference -----------------------------------------------------------------------------------------------

    def reference_forward(self, inputs: Inputs, attrs: Attrs) -> Tensor:
        return self.reference.forward(self.inputs(*inputs), self.attrs(*attrs))

    def reference_backward(self, dy: Tensor, inputs: Inputs, attrs: Attrs, grad_mask: int) -> list[Tensor]:
        return self.reference.backward(dy, self.inputs(*inputs), self.attrs(*attrs), grad_mask)

    def reference_jvp(self, inputs: Inputs, attrs: Attrs, tangents: Sequence[Tensor | None]) -> Tensor:
        return self.reference.jvp(self.inputs(*inputs), self.attrs(*attrs), self.inputs(*tangents))

    def strided_forward(self, inputs: Inputs, attrs: Attrs) -> Tensor:
        """The reference, with the strides that all backends return."""
        return layout.conform(self.reference_forward(inputs, attrs), self.like(inputs, attrs))

    def strided_backward(self, dy: Tensor, inputs: Inputs, attrs: Attrs, grad_mask: int) -> list[Tensor]:
        """The reference gradients, with the strides that all backends return."""
        grads = self.reference_backward(dy, inputs, attrs, grad_mask)
        return [
            layout.conform(g, inputs[0]) if self.elementwise_flags[i] else g.contiguous()
            for i, g in zip(self.indices(grad_mask), grads)
        ]

    # ---- the kernels, or the reference where it is forced ------------------------------------------------------------

    def kernels(self) -> Kernels:
        """The dispatcher's overloads; the Triton ones if Triton is forced and compiled kernels would serve CUDA tensors."""
        if backends.FORCED and self.triton_overloads is not None and backends.forced() == "triton":
            # An exported program may run on another backend.
            return self.overloads if torch.compiler.is_exporting() else self.triton_overloads
        return self.overloads

    def forward(self, inputs: Inputs, attrs: Attrs) -> Tensor:
        y = self.eager.forward(*inputs, *attrs)
        if isinstance(y, Tensor):
            return y
        if backends.uses_reference(inputs[0]):
            return self.strided_forward(inputs, attrs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.kernels().forward(*inputs, *attrs)

    def backward(self, dy: Tensor, inputs: Inputs, attrs: Attrs, grad_mask: int) -> list[Tensor]:
        if backends.uses_reference(dy):
            return self.strided_backward(dy, inputs, attrs, grad_mask)
        with torch._C._AutoDispatchBelowAutograd():
            return self.kernels().backward(dy, *inputs, *attrs, grad_mask)

    # ---- the call ----------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Inputs, attrs: Attrs) -> Tensor:
        """Calls the op, with every kind of autograd."""
        if torch.compiler.is_compiling():
            if backends.forced() == "reference":
                return autograd.TracedReference.apply(self, attrs, *inputs)
            return self.kernels().forward(*inputs, *attrs)
        if autograd.in_transform():
            if autograd.nested_forward_mode():  # a Function's jvp runs once: the outer derivative would be lost
                return self.strided_forward(inputs, attrs)
            return autograd.Forward.apply(self, attrs, *inputs)
        if autograd.needs_grad(inputs):
            if torch.jit.is_tracing():  # torch.jit.trace records dispatcher ops, and cannot save a Function
                return self.kernels().forward(*inputs, *attrs)
            return autograd.ReverseForward.apply(self, attrs, *inputs)
        return self.forward(inputs, attrs)

    def call_(self, inputs: Inputs, attrs: Attrs) -> Tensor:
        """Calls the op in place, over its first input; refused where torch refuses in-place operations."""
        x, name = inputs[0], self.inputs._fields[0]
        self.refuse_gradient(inputs)
        memory.refuse_self_overlap(self.name, name, x)
        if torch.compiler.is_compiling():  # the compiler functionalises it
            if backends.forced() == "reference":
                x.copy_(self.reference_forward(inputs, attrs))
            else:
                self.kernels().inplace(*inputs, *attrs)
            return x
        memory.refuse_inference(self.name, name, x)
        if autograd.in_transform():  # a kernel would drop the tangent
            x.copy_(self((x.clone(), *inputs[1:]), attrs))
            return x  # copy_ returns another object if the result is of a subclass
        memory.refuse_sharing(self.name, self.inputs._fields, inputs, self.elementwise_flags)
        # As the dispatcher op's ADInplaceOrView kernel does, without the detour through its Python code.
        memory.count_write(self.name, name, x)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if backends.uses_reference(x):
                x.copy_(self.reference_forward(inputs, attrs))
            else:
                self.kernels().inplace(*inputs, *attrs)
        return x

    def refuse_gradient(self, inputs: Inputs) -> None:
        """Raises RuntimeError if an in-place call needs a gradient."""
        if autograd.needs_grad(inputs):
            raise RuntimeError(
                f"{self.name}: inplace=True would overwrite {self.inputs._fields[0]}, which the backward pass needs; use "
                "inplace=False, or torch.no_grad()"
            )
