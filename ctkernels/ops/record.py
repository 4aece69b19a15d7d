"""What an op is, and everything torch needs to know about it: schemas, autograd, forward-mode AD, vmap, fakes.

An op is one description, :class:`Op`. From it come two dispatcher ops and a mutating one,

    ctkernels::NAME(inputs..., static...) -> Tensor
    ctkernels::NAME_(inputs..., static...) -> ()               the same, written over the first input
    ctkernels::NAME_backward(dy, inputs..., static..., needs) -> Tensor[]    gradients of the inputs whose bit is set

whose kernels are native (``csrc``) where built and the reference elsewhere. Compiled and exported programs see those ops,
with the autograd registered here (README.md: what else a compiler can see). Eager calls go through :class:`_Forward`, an
``autograd.Function`` over the same kernels, which costs less per call and adds forward-mode AD and ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import backends, layout, memory

Inputs = tuple[Tensor | None, ...]
Static = tuple[Any, ...]

_LIBRARY = torch.library.Library("ctkernels", "DEF")
OPS: list[Op] = []  # that are registered
_OVERLOADS: dict[str, torch._ops.OpOverload] = {}  # looking one up in torch.ops costs as much as a small kernel


@dataclass(frozen=True)
class Op:
    """One op. ``reference`` functions are plain, differentiable torch, and closed forms where autograd would lose digits.

    name: of the dispatcher op. inputs: names of the differentiable tensors, the first of which gives shape and dtype.
    optional: the inputs that may be None. elementwise: the inputs that have the first one's shape; the others are
    per-channel parameters. static: schema of the other arguments, the first of which is ``int channel_dim``. triton: the
    module of its Triton kernels, imported on the first CUDA call: a ``MATH`` for the channelwise skeleton, or launches of
    its own, ``forward``, ``forward_`` and ``backward``. twin: (input, other, unless): the gradient of ``input`` is that of
    ``other`` where ``unless`` is None; it is computed once.
    """

    name: str
    inputs: tuple[str, ...]
    optional: frozenset[str]
    elementwise: frozenset[str]
    static: tuple[str, ...]
    reference_forward: Callable[[Inputs, Static], Tensor]
    reference_backward: Callable[[Tensor, Inputs, Static, int], list[Tensor]]
    reference_jvp: Callable[[Inputs, Static, Inputs], Tensor]
    triton: str | None = None
    twin: tuple[str, str, str] | None = None

    def __hash__(self) -> int:
        return hash(self.name)

    def needs(self, wanted: Sequence[bool]) -> int:
        """Bit mask over the inputs."""
        return sum(1 << i for i, w in enumerate(wanted) if w)

    def wanted(self, needs: int) -> list[int]:
        """Indices of the inputs in a bit mask."""
        return [i for i in range(len(self.inputs)) if needs >> i & 1]

    def gradients(
        self, wanted: Sequence[bool], inputs: Inputs, compute: Callable[[int], Sequence[Tensor]]
    ) -> list[Tensor | None]:
        """A gradient or None for every input, from ``compute(needs)``, the gradients of a bit mask of them."""
        needs, same = self.needs(wanted), None
        if self.twin is not None:
            twin, other, unless = (self.inputs.index(name) for name in self.twin)
            if wanted[twin] and wanted[other] and inputs[unless] is None:
                needs, same = needs & ~(1 << twin), (twin, other)
        out: list[Tensor | None] = [None] * len(self.inputs)
        for i, grad in zip(self.wanted(needs), compute(needs)):
            out[i] = grad
        if same is not None:
            out[same[0]] = out[same[1]]
        return out

    @cached_property
    def elementwise_flags(self) -> tuple[bool, ...]:
        return tuple(name in self.elementwise for name in self.inputs)

    # ---- kernels: through the dispatcher, or the reference where it is forced --------------------------------------

    def forward(self, inputs: Inputs, static: Static) -> Tensor:
        assert inputs[0] is not None
        if backends.reference_wanted(inputs[0]):
            return self.composed_forward(inputs, static)
        with torch._C._AutoDispatchBelowAutograd():
            return self._packet("")(*inputs, *static)

    def forward_(self, inputs: Inputs, static: Static) -> None:
        x = inputs[0]
        assert x is not None
        if torch.compiler.is_compiling():
            if backends.reference_forced():
                x.copy_(self.reference_forward(inputs, static))
            else:
                self._packet("_")(*inputs, *static)
            return
        # What the dispatcher op would do first, without the detour through its Python code.
        memory.count_write(self.name, self.inputs[0], x)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if backends.reference_wanted(x):
                x.copy_(self.reference_forward(inputs, static))
            else:
                self._packet("_")(*inputs, *static)

    def backward(self, dy: Tensor, inputs: Inputs, static: Static, needs: int) -> list[Tensor]:
        if backends.reference_wanted(dy):
            return self.composed_backward(dy, inputs, static, needs)
        with torch._C._AutoDispatchBelowAutograd():
            return self._packet("_backward")(dy, *inputs, *static, needs)

    def _packet(self, suffix: str) -> Any:
        if torch.compiler.is_compiling():
            if backends.triton_forced() and not torch.compiler.is_exporting():
                from .channelwise import inlined as _triton_inlined

                return _triton_inlined.OVERLOADS[self.name + suffix]
        elif backends.triton_wanted():
            from .channelwise import launch as _triton

            return _triton.implementations(self)[suffix]
        return _OVERLOADS[self.name + suffix]

    def composed_forward(self, inputs: Inputs, static: Static) -> Tensor:
        """The reference, with the strides that every backend's result has."""
        assert inputs[0] is not None
        return layout.conform(self.reference_forward(inputs, static), inputs[0])

    def composed_backward(self, dy: Tensor, inputs: Inputs, static: Static, needs: int) -> list[Tensor]:
        """The reference gradients, with the strides that every backend's have."""
        assert inputs[0] is not None
        grads, flags = self.reference_backward(dy, inputs, static, needs), self.elementwise_flags
        return [layout.conform(g, inputs[0]) if flags[i] else g.contiguous() for i, g in zip(self.wanted(needs), grads)]

    # ---- the call ---------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Inputs, static: Static) -> Tensor:
        """The op with autograd of every kind."""
        if torch.compiler.is_compiling():
            if backends.reference_forced():
                return _Inlined.apply(self, static, *inputs)
            return self._packet("")(*inputs, *static)
        if in_transform():
            if _forward_modes() > 1:  # a Function's jvp is called once, and the outer derivative of it would be lost
                return self.composed_forward(inputs, static)
            return _Forward.apply(self, static, *inputs)
        if _wants_gradient(inputs):
            return _ReverseMode.apply(self, static, *inputs)
        return self.forward(inputs, static)

    def call_(self, inputs: Inputs, static: Static) -> Tensor:
        """The op written over its first input, refused where torch refuses an in-place operation."""
        x = inputs[0]
        assert x is not None
        self.refuse_gradient(inputs)
        memory.refuse_self_overlap(self.name, self.inputs[0], x)
        if not torch.compiler.is_compiling():  # a compiler makes two steps of it, as is done here with transforms
            memory.refuse_inference(self.name, self.inputs[0], x)
            if in_transform():  # a kernel would not carry the tangent along
                x.copy_(self((x.clone(), *inputs[1:]), static))
                return x  # of which copy_ gives another object where a result of the op has a subclass
            memory.refuse_sharing(self.name, self.inputs, inputs, self.elementwise_flags)
        self.forward_(inputs, static)
        return x

    def refuse_gradient(self, inputs: Inputs) -> None:
        """RuntimeError where a gradient is wanted of a call in place."""
        if _wants_gradient(inputs):
            x = self.inputs[0]
            raise RuntimeError(
                f"{self.name}: inplace=True would overwrite {x}, which the backward pass needs; use inplace=False, or "
                "torch.no_grad()"
            )


def _wants_gradient(inputs: Inputs) -> bool:
    if torch.is_grad_enabled():
        for t in inputs:
            if t is not None and t.requires_grad:
                return True
    return False


def in_transform() -> bool:
    """Whether ``torch.func`` or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def in_forward_mode() -> bool:
    """Whether a forward-mode derivative is being taken, of ``torch.func`` or of ``torch.autograd.forward_ad``."""
    return torch.autograd.forward_ad._current_level >= 0


def _forward_modes() -> int:
    """How many forward-mode derivatives of ``torch.func`` are being taken, one inside the other."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


class _Forward(torch.autograd.Function):
    """y = op(inputs). Saves its inputs and nothing else."""

    @staticmethod
    def forward(op: Op, static: Static, *inputs: Tensor | None) -> Tensor:
        return op.forward(inputs, static)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, ctx.static = inputs[0], inputs[1]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        op, static, inputs = ctx.op, ctx.static, ctx.saved_tensors

        def compute(needs: int) -> Sequence[Tensor]:
            # Through plain torch: autograd.grad(is_grads_batched=True), and forward mode, whose tangents have to be carried on.
            if torch._C._functorch.is_legacy_batchedtensor(dy) or in_forward_mode():
                return op.reference_backward(dy, inputs, static, needs)
            if torch.is_grad_enabled() or in_transform():
                return _Backward.apply(op, static, needs, dy, *inputs)
            return op.backward(dy, inputs, static, needs)

        return (None, None, *op.gradients(ctx.needs_input_grad[2:], inputs, compute))

    @staticmethod
    def jvp(ctx: Any, _op: None, _static: None, *tangents: Tensor | None) -> Tensor:
        return ctx.op.reference_jvp(ctx.saved_tensors, ctx.static, tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], op: Op, static: Static, *inputs: Tensor | None
    ) -> tuple[Tensor, int]:
        flags = op.elementwise_flags
        merged, grouped, inner = layout.groups_first(inputs, in_dims[2:], info.batch_size, flags, force=False)
        y = op(tuple(merged), _shift_channel(static, grouped and inner > 0))
        return (y.unflatten(0, (info.batch_size, inner)) if grouped and inner else y), 0


class _ReverseMode(torch.autograd.Function):
    """:class:`_Forward` without transforms: a Function with ``setup_context`` costs three times as much per call."""

    @staticmethod
    def forward(ctx: Any, op: Op, static: Static, *inputs: Tensor | None) -> Tensor:
        ctx.op, ctx.static = op, static
        ctx.save_for_backward(*inputs)
        return op.forward(inputs, static)

    backward = _Forward.backward


class _Backward(torch.autograd.Function):
    """The gradients as a differentiable function of (dy, inputs); its own derivatives come from the reference."""

    @staticmethod
    def forward(op: Op, static: Static, needs: int, dy: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(op.backward(dy, inputs, static, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.static, ctx.needs = inputs[:3]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *_second_order(ctx.op, ctx.static, ctx.needs, ctx.saved_tensors, cotangents))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], op: Op, static: Static, needs: int, dy: Tensor, *inputs: Tensor | None
    ) -> tuple[tuple[Tensor, ...], int]:
        size, flags = info.batch_size, op.elementwise_flags
        merged, grouped, inner = layout.groups_first((dy, *inputs), in_dims[3:], size, (True, *flags), force=True)
        static = _shift_channel(static, grouped and inner > 0)
        grads = _Backward.apply(op, static, needs, *merged)
        out = []
        for i, grad in zip(op.wanted(needs), grads):
            if flags[i]:
                out.append(grad.unflatten(0, (size, inner)) if grouped and inner else grad)
            else:
                original = inputs[i]
                assert original is not None
                shape = list(original.shape)
                if in_dims[4 + i] is not None:
                    del shape[in_dims[4 + i]]
                out.append(grad.reshape(size, *shape))
        return tuple(out), 0


class _Inlined(torch.autograd.Function):
    """The reference as a pair of traceable functions, for a compiler that is to see through the op."""

    @staticmethod
    def forward(ctx: Any, op: Op, static: Static, *inputs: Tensor | None) -> Tensor:
        ctx.op, ctx.static = op, static
        ctx.save_for_backward(*inputs)
        return op.reference_forward(inputs, static)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        op, static, inputs = ctx.op, ctx.static, ctx.saved_tensors

        def compute(needs: int) -> Sequence[Tensor]:
            return op.reference_backward(dy, inputs, static, needs)

        return (None, None, *op.gradients(ctx.needs_input_grad[2:], inputs, compute))


def _shift_channel(static: Static, same_rank: bool) -> Static:
    if same_rank or static[0] == layout.NO_CHANNEL:
        return static
    return (static[0] + 1, *static[1:])


def _backward_of(
    op: Op, static: Static, needs: int, saved: Sequence[Tensor | None], moving: list[int]
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The reference backward as a function of those of (dy, *inputs) whose index is in ``moving``, and their values."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(saved)
        for i, value in zip(moving, values):
            full[i] = value
        dy, *inputs = full
        assert dy is not None
        return tuple(op.reference_backward(dy, tuple(inputs), static, needs))

    primals = tuple(saved[i] for i in moving)
    return function, primals  # type: ignore[return-value]


def _second_order(
    op: Op, static: Static, needs: int, saved: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of <gradients, cotangents> with respect to (dy, *inputs)."""
    moving = [i for i, t in enumerate(saved) if t is not None and t.is_floating_point()]
    function, primals = _backward_of(op, static, needs, saved, moving)
    outputs, pullback, *_ = torch.func.vjp(function, *primals)
    filled = tuple(torch.zeros_like(o) if c is None else c.to(o.dtype) for o, c in zip(outputs, cotangents))
    grads: list[Tensor | None] = [None] * len(saved)
    for i, grad in zip(moving, pullback(filled)):
        grads[i] = grad
    return grads


def _on_cuda(op: Op, suffix: str, composite: Callable[..., Any]) -> Callable[..., Any]:
    """The Triton kernels, or the reference on a GPU that they do not serve."""

    def call(*args: Any) -> Any:
        if backends.BACKENDS["triton"].refusal(args[0]) is not None:
            return composite(*args)
        from .channelwise import launch as _triton

        return _triton.implementations(op)[suffix](*args)

    return call


# ---- registration ----------------------------------------------------------------------------------------------------


def register(op: Op) -> Op:
    """Defines the dispatcher ops of ``op``. Called once per op, at import."""
    count = len(op.inputs)
    tensors = [f"Tensor{'?' if name in op.optional else ''} {name}" for name in op.inputs]
    arguments = ", ".join([*tensors, *op.static])
    mutated = arguments.replace("Tensor ", "Tensor(a!) ", 1)
    _LIBRARY.define(f"{op.name}({arguments}) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
    _LIBRARY.define(f"{op.name}_({mutated}) -> ()", tags=[torch.Tag.pt2_compliant_tag])
    _LIBRARY.define(
        f"{op.name}_backward(Tensor dy, {arguments}, int needs) -> Tensor[]", tags=[torch.Tag.pt2_compliant_tag]
    )

    def forward(*args: Any) -> Tensor:
        return op.composed_forward(args[:count], args[count:])

    def forward_(*args: Any) -> None:
        args[0].copy_(op.reference_forward(args[:count], args[count:]))

    def backward(dy: Tensor, *args: Any) -> list[Tensor]:
        return op.composed_backward(dy, args[:count], args[count:-1], args[-1])

    def writes(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        memory.count_write(op.name, op.inputs[0], args[0])
        with (
            torch._C._AutoDispatchBelowADInplaceOrView()
        ):  # a kernel that copies into the tensor must not count that too
            _OVERLOADS[op.name + "_"].redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    def refuses(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        op.refuse_gradient(args[:count])
        _OVERLOADS[op.name + "_"].redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def negated(*args: Any) -> None:
        args[0].copy_(_OVERLOADS[op.name](*args))

    _LIBRARY.impl(op.name + "_", negated, "Negative")  # torch's own fallback takes an op that writes to return a tensor
    _LIBRARY.impl(op.name + "_", refuses, "Autograd", with_keyset=True)
    _LIBRARY.impl(op.name + "_", writes, "ADInplaceOrView", with_keyset=True)
    for suffix, implementation in (("", forward), ("_", forward_), ("_backward", backward)):
        _LIBRARY.impl(op.name + suffix, implementation, "CompositeExplicitAutograd")
        _OVERLOADS[op.name + suffix] = getattr(torch.ops.ctkernels, op.name + suffix).default

    # The compiled CUDA kernels, where there are any, have registered themselves.
    compiled = backends.BACKENDS["cuda"].missing is None
    if not compiled and op.triton is not None and backends.BACKENDS["triton"].missing is None:
        for suffix, composite in (("", forward), ("_", forward_), ("_backward", backward)):
            _LIBRARY.impl(op.name + suffix, _on_cuda(op, suffix, composite), "CUDA")

    def fake_forward(*args: Any) -> Tensor:
        return layout.result_like(args[0])

    def fake_backward(dy: Tensor, *args: Any) -> list[Tensor]:
        inputs, flags = args[:count], op.elementwise_flags
        return [
            layout.result_like(inputs[0]) if flags[i] else layout.parameter_like(inputs[i]) for i in op.wanted(args[-1])
        ]

    qualified = f"ctkernels::{op.name}"
    torch.library.register_fake(qualified, fake_forward, lib=_LIBRARY)
    torch.library.register_fake(qualified + "_", lambda *args: None, lib=_LIBRARY)
    torch.library.register_fake(qualified + "_backward", fake_backward, lib=_LIBRARY)
    for suffix, (backward_of, save) in derivatives(op, op._packet).items():
        torch.library.register_autograd(qualified + suffix, backward_of, setup_context=save, lib=_LIBRARY)
    OPS.append(op)
    return op


def derivatives(op: Op, packet: Callable[[str], Any]) -> dict[str, tuple[Callable[..., Any], Callable[..., None]]]:
    """By suffix, the autograd of dispatcher ops: what ``register_autograd`` takes. ``packet``: the op of a suffix."""
    count = len(op.inputs)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.static = inputs[count:]
        ctx.save_for_backward(*inputs[:count])

    def first_order(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors

        def compute(needs: int) -> Sequence[Tensor]:
            return packet("_backward")(dy, *inputs, *ctx.static, needs)

        return (*op.gradients(ctx.needs_input_grad[:count], inputs, compute), *[None] * len(ctx.static))

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.static, ctx.needs = inputs[1 + count : -1], inputs[-1]
        ctx.save_for_backward(*inputs[: 1 + count])

    def second_order(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
        grads = _second_order(op, ctx.static, ctx.needs, ctx.saved_tensors, cotangents)
        return (*grads, *[None] * (len(ctx.static) + 1))

    return {"": (first_order, save), "_backward": (second_order, save_backward)}
