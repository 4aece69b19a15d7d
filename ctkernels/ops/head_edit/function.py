"""``ctkernels.functional.head_edit``: argument checks, and the call of the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import autograd, backends, checks, eager, memory
from .op import OP, HeadEditAttrs, HeadEditInputs

_EAGER, _EAGER_GRADIENTS = eager.entry("head_edit_of_heads"), eager.entry("head_edit_of_heads_gradients")


def head_edit(
    z: Tensor,
    m: Tensor | None = None,
    a: Tensor | None = None,
    g_m: Tensor | None = None,
    g_a: Tensor | None = None,
    *,
    head_dim: int | None = None,
    head_axis: int | None = None,
    index: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""The gated affine edit of every attention head's output, fused: z' = (1 + g_m * m) * z + g_a * a.

    The backward pass is one pass over z and the upstream gradient, and saves only z.

    Args:
        z: float32, float64, bfloat16 or float16, of shape (..., H * D), (..., H, D), or with the heads along ``head_axis``
            and D last: (B, H, T, D) has ``head_axis=1``. Any strides.
        m, a: (H, D): the multiplicative and the additive edit; one of them may be None. Kept if float32 or wider, else widened.
        g_m, g_a: (H,): gates of ``m`` and ``a``; None is 1.
        head_dim: D, to check ``m`` and ``a`` against; None takes it from them.
        head_axis: the axis of ``z`` that holds the heads, if the shape alone does not tell.
        index: (B,) integers: sample b, along dimension 0 of ``z``, uses row ``index[b]`` of ``m`` and ``a``, which are then
            (A, H, D), and of the gates, (A, H).
        inplace: write the result over ``z``, with the version count of torch's in-place operations. Not possible if a gradient
            is needed, nor if ``z`` overlaps itself or another argument's memory.

    Returns:
        A tensor of ``z``'s shape and dtype. Arithmetic is float32 (float64 for float64). Differentiable in z, m, a, g_m and
        g_a, to any order, in forward and reverse mode.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.
        RuntimeError: for ``inplace=True`` if a gradient is needed, or on an inference tensor outside inference mode.

    Examples:
        >>> m, a, gates = torch.randn(4, 8), torch.randn(4, 8), torch.ones(4)
        >>> z = torch.randn(2, 16, 32)  # (batch, tokens, heads * head_dim)
        >>> y = ctkernels.functional.head_edit(z, m, a, gates, gates)
        >>> z = torch.randn(2, 4, 16, 8)  # (batch, heads, tokens, head_dim)
        >>> y = ctkernels.functional.head_edit(z, m, a, head_axis=1)

    Source: Lai et al. 2025, JoLA, arXiv 2502.01179, equation 2.
    """
    op = "head_edit"
    if head_dim is None and head_axis is None and index is None and not inplace and not torch.compiler.is_compiling():
        y = _EAGER(z, m, a, g_m, g_a)
        if y is None:
            return _Recorded.apply(z, m, a, g_m, g_a)
        if y is not NotImplemented:
            return y
    checks.tensor(op, "z", z)
    edits = {name: t for name, t in (("m", m), ("a", a)) if t is not None}
    if not edits:
        raise ValueError("head_edit: at least one of m and a is needed, got None for both")
    for name, gate, edit in (("g_m", g_m, m), ("g_a", g_a, a)):
        if gate is not None and edit is None:
            raise ValueError(f"head_edit: {name} gates {name[2:]}, which is None; give both or neither")
    rank = 2 if index is None else 3
    shape = next(iter(edits.values())).shape
    for name, t in edits.items():
        checks.tensor(op, name, t)
        if t.dim() != rank or t.shape != shape:
            expected = "(heads, head_dim)" if index is None else "(adapters, heads, head_dim)"
            raise ValueError(f"head_edit: m and a must both be {expected}, got {name} of shape {tuple(t.shape)}")
        checks.same_device(op, name, t, "z", z)
    heads, dim = shape[-2:]
    if head_dim is not None and head_dim != dim:
        raise ValueError(f"head_edit: head_dim is {head_dim}, but m and a have {dim} values a head")
    for name, gate in (("g_m", g_m), ("g_a", g_a)):
        if gate is not None:
            checks.tensor(op, name, gate)
            if gate.shape != shape[:-1]:
                raise ValueError(f"head_edit: {name} must have shape {tuple(shape[:-1])}, got {tuple(gate.shape)}")
            checks.same_device(op, name, gate, "z", z)
    if index is not None:
        checks.sample_index(op, index, "z", z, (m, a))
    backends.check_forced_backend(z)
    params = [checks.widened(t) for t in (m, a, g_m, g_a)]
    if index is not None:
        if g_m is None and g_a is None and not inplace and _torch_is_faster(z, params[0], params[1], head_axis):
            return _edited_rows(z, params[0], params[1], index)
        params = [t if t is None else t.index_select(0, index) for t in params]
    flat, params, restore = _heads_last(z, params, heads, dim, head_axis, per_sample=index is not None)
    inputs, attrs = HeadEditInputs(flat, *params), HeadEditAttrs(flat.dim() - 1)
    if not inplace:
        return restore(OP(inputs, attrs))
    memory.refuse_self_overlap(op, "z", z)
    if flat is z or (not torch.compiler.is_compiling() and torch._C._is_alias_of(flat, z)):  # type: ignore[attr-defined]
        OP.call_(inputs, attrs)
        return z
    OP.refuse_gradient(inputs)
    if not torch.compiler.is_compiling():
        memory.refuse_inference(op, "z", z)
    z.copy_(restore(OP(inputs, attrs)))
    return z  # copy_ returns another object if an edit is of a subclass


def edit_rows(z: Tensor, m: Tensor | None, a: Tensor | None, index: Tensor) -> Tensor:
    """``head_edit(z, m, a, index=index)``, without checks of arguments that the caller has checked, where torch computes it."""
    return _edited_rows(z, m, a, index) if _torch_is_faster(z, m, a, None) else head_edit(z, m, a, index=index)


_FEW_TOKENS = 4  # of a sample, in half precision


def _torch_is_faster(z: Tensor, m: Tensor | None, a: Tensor | None, head_axis: int | None) -> bool:
    """Whether to compute an edit of rows with torch: on a CPU, the kernel takes longer over each row's parameters than over z.

    In half precision torch converts z in passes of their own, so there only with a few tokens to each sample.
    """
    if z.device.type != "cpu" or z.dim() < 2 or head_axis is not None or torch.compiler.is_compiling():
        return False
    table = m if m is not None else a
    if table is None or table.shape[1] * table.shape[2] != z.shape[-1] or not z.is_contiguous():
        return False
    if backends.forced() is not None or autograd.in_transform():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, m, a)):
        return False
    double = z.dtype == torch.float64
    if any(t is not None and (t.dtype == torch.float64) != double for t in (m, a)):
        return False
    few = z.numel() <= _FEW_TOKENS * z.shape[0] * z.shape[-1]
    return double or z.dtype == torch.float32 or few


def _edited_rows(z: Tensor, m: Tensor | None, a: Tensor | None, index: Tensor) -> Tensor:
    """The edit of rows in one operation of torch; like the kernel, it multiplies and adds with one rounding."""
    shape = (z.shape[0], *[1] * (z.dim() - 2), z.shape[-1])
    scale, offset = (None if t is None else t.flatten(1).index_select(0, index).view(shape) for t in (m, a))
    wide = z if z.dtype == torch.float64 else z.float()
    if scale is not None:
        scale.add_(1)
        y = wide * scale if offset is None else torch.addcmul(offset, wide, scale)
    else:
        assert offset is not None
        y = wide + offset
    return y.to(z.dtype)


class _Recorded(torch.autograd.Function):
    """A call that the entry point accepted. m and a are not flattened: that would cost an autograd node each."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs)
        y = _EAGER(*inputs)
        return y if isinstance(y, Tensor) else OP.forward(_flat(inputs), HeadEditAttrs(inputs[0].dim() - 1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad
        grads: tuple[Tensor | None, ...] = _EAGER_GRADIENTS(needs, dy, inputs, ())
        if grads is not NotImplemented:
            return grads
        flat = autograd.gradients(OP, HeadEditAttrs(inputs[0].dim() - 1), needs, dy, _flat(inputs))
        return tuple(g if g is None else g.reshape(t.shape) for g, t in zip(flat, inputs))


def _flat(inputs: Any) -> HeadEditInputs:
    z, m, a, *gates = inputs
    return HeadEditInputs(z, *(None if t is None else t.flatten() for t in (m, a)), *gates)


def _heads_last(
    z: Tensor, params: list[Tensor | None], heads: int, dim: int, head_axis: int | None, per_sample: bool
) -> tuple[Tensor, list[Tensor | None], Callable[[Tensor], Tensor]]:
    """``z`` and the parameters as the op takes them, and a function that restores ``z``'s shape.

    If heads are adjacent in memory, channels are heads * head_dim. If tokens lie between them, as in a contiguous
    (B, H, T, D), every (sample, head) is a group of its own. Neither copies.
    """
    shape = z.shape
    if head_axis is None:
        flat_heads = z.dim() > 0 and shape[-1] == heads * dim  # takes precedence: with one head, (N, D) is N samples
        if not flat_heads and shape[-2:] == (heads, dim):
            head_axis = z.dim() - 2
        elif not flat_heads:
            raise ValueError(
                f"head_edit: z must end in (heads * head_dim) = ({heads * dim},) or in (heads, head_dim) = ({heads}, {dim}), or "
                f"head_axis must be given; got z of shape {tuple(shape)}"
            )
    else:
        head_axis = checks.dimension("head_edit", "head_axis", head_axis, z)
        if shape[head_axis] != heads or shape[-1] != dim or head_axis == z.dim() - 1:
            raise ValueError(
                f"head_edit: with head_axis={head_axis}, z must have {heads} heads there and end in head_dim = {dim}; got shape "
                f"{tuple(shape)}"
            )
    edits, gates = params[:2], params[2:]
    if head_axis is not None:
        moved = z.movedim(head_axis, -2)
        adjacent = moved.stride(-2) == dim * moved.stride(-1) or heads == 1 or moved.numel() == 0
        if not adjacent and head_axis == 1 and z.is_contiguous() and not torch._C._are_functorch_transforms_active():
            rows = shape[0] * heads if per_sample else heads
            edits = [t if t is None else t.reshape(rows, dim) for t in edits]
            gates = [t if t is None else t.reshape(rows, 1) for t in gates]
            return z.flatten(0, 1), [*edits, *gates], lambda y: y.unflatten(0, (shape[0], heads))
        flat = moved.flatten(-2)
        axis = head_axis

        def restore(y: Tensor) -> Tensor:
            return y.unflatten(-1, (heads, dim)).movedim(-2, axis)
    else:
        flat, restore = z, lambda y: y
    lead = shape[:1] if per_sample else ()
    edits = [t if t is None else t.reshape(*lead, heads * dim) for t in edits]
    if per_sample and flat.dim() == 1:
        raise ValueError(
            f"head_edit: index needs a z with a sample dimension before the heads, got shape {tuple(shape)}"
        )
    return flat, [*edits, *gates], restore
