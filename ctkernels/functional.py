"""The public functions. Each is checked here, once, and then handed to its op."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .ops import backends, checks, memory
from .ops.attention.function import attention_head_edit
from .ops.ctu import ACTIVATIONS
from .ops.ctu import OP as _CTU
from .ops.hard_concrete import CLIP, MEAN, OPEN, SAMPLE
from .ops.hard_concrete import OP as _HARD_CONCRETE
from .ops.hard_concrete.reference import HOTTEST_MEAN, uniform
from .ops.head_edit import OP as _HEAD_EDIT
from .ops.layout import NO_CHANNEL

__all__ = ["attention_head_edit", "ctu", "expected_l0", "hard_concrete", "head_edit"]


def ctu(
    x: Tensor,
    beta: float | Tensor,
    coeff: float | Tensor = 0.5,
    *,
    channel_dim: int | None = None,
    raw: bool = False,
    activation: str = "relu",
    negative_slope: float | Tensor = 0.01,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    index: Tensor | None = None,
    inplace: bool = False,
    eps: float = 0.0,
) -> Tensor:
    r"""The Curvature Tuning unit, fused: an activation whose curvature is one knob.

    With s = 1 - beta (+ eps), u = w / s and w = scale * x + shift + residual,

        y = coeff * w * sigmoid(beta * u) + (1 - coeff) * s * softplus(u)

    (equation 8 of the Curvature Tuning paper). beta = 1 is the plain activation, exactly; towards 0 the unit gets smoother.

    Args:
        x: float32, float64, bfloat16 or float16; any shape and strides, empty included.
        beta: the curvature knob in [0, 1]: a number, or a tensor that is 0-d, of size 1, or of size
            ``x.shape[channel_dim]`` (one value per channel). float32 or wider is kept; narrower is widened.
        coeff: the mix in [0, 1] of the two smoothings: 1 is the SiLU-like branch, 0 the softplus branch. As ``beta``.
        channel_dim: the dimension of ``x`` that per-channel tensors belong to. Needed if there are any.
        raw: ``beta`` and ``coeff`` are logits, mapped by the sigmoid inside the kernel without losing digits of 1 - beta.
        activation: ``"relu"``, ``"leaky_relu"``, ``"prelu"``, ``"relu6"``, ``"silu"`` or ``"gelu"`` (the exact, Gaussian
            form). The ReLU family equals the plain activation at beta = 1; SiLU and GELU at beta = 0.5, coeff = 1.
        negative_slope: of ``leaky_relu`` and ``prelu``; a number or a tensor as ``beta`` (learned slopes).
        scale, shift: per-channel (or size-1) tensors of the affine map before the unit, a folded BatchNorm say.
        residual: tensor of ``x``'s shape added before the unit.
        index: (B,) integers that give each sample, along dimension 0 of ``x``, its own knobs: then ``beta`` and ``coeff``
            are tensors (A, C), or (A, 1) for one value for all channels, and sample b uses row ``index[b]``.
        inplace: write the result over ``x``, as torch's in-place operations do: autograd notices. Not possible where a gradient
            is needed (the backward pass starts from ``x``), nor where ``x`` overlaps itself or another argument's memory;
            ``residual`` may be ``x``.
        eps: added to 1 - beta; between 0 and 1. The official implementation has 1e-6 there; 0 here.

    Returns:
        A tensor of ``x``'s shape, in the wider of the dtypes of ``x`` and ``residual``. Arithmetic is float32 (float64 for
        float64). Differentiable in every tensor argument, to any order, in forward and reverse mode; the backward pass
        keeps ``x`` (and ``residual``) and nothing else.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: for ``inplace=True`` where a gradient is needed, or on an inference tensor outside of inference mode.

    Example:
        >>> y = ctkernels.functional.ctu(x, 0.9)                                # one knob for all
        >>> y = ctkernels.functional.ctu(x, beta, coeff, channel_dim=1)          # a knob per channel
    """
    checks.tensor("ctu", "x", x)
    kind = ACTIVATIONS.get(activation, -1) if isinstance(activation, str) else -1
    if kind < 0:
        checks.choice("ctu", "activation", activation, ACTIVATIONS)
    channel = None if channel_dim is None else checks.dimension("ctu", "channel_dim", channel_dim, x)
    eps = checks.number("ctu", "eps", eps)
    if eps:
        checks.unit_interval("ctu", "eps", eps)
    if index is None:
        beta, coeff = _knob("beta", beta, x, channel, raw), _knob("coeff", coeff, x, channel, raw)
    else:
        _check_index("ctu", index, x, beta, coeff)
        if channel == 0:
            raise ValueError("ctu: index gives the samples of dimension 0 their knobs, so channel_dim must not be 0")
        beta, coeff = _rows("beta", beta, x, channel, index), _rows("coeff", coeff, x, channel, index)
    slope = _param("negative_slope", negative_slope, x, channel) if kind == 1 else None
    if scale is not None:
        scale = _param("scale", scale, x, channel)
    if shift is not None:
        shift = _param("shift", shift, x, channel)
    if residual is not None:
        checks.tensor("ctu", "residual", residual)
        checks.same_shape("ctu", "residual", residual, "x", x)
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            if inplace and dtype != x.dtype:
                raise TypeError(f"ctu: residual must have x's dtype {x.dtype} when inplace=True, got {residual.dtype}")
            x, residual = x.to(dtype), residual.to(dtype)
    backends.forced_refusal(x)
    inputs = (x, beta, coeff, slope, scale, shift, residual)
    static = (NO_CHANNEL if channel is None else channel, kind, raw, eps)
    if not inplace:
        return _CTU(inputs, static)
    return _CTU.call_(inputs, static)


def _knob(name: str, value: float | Tensor, x: Tensor, channel_dim: int | None, raw: bool) -> Tensor:
    if isinstance(value, Tensor):
        return _param(name, value, x, channel_dim)
    value = checks.number("ctu", name, value)
    if not raw:
        checks.unit_interval("ctu", name, value)
    return _number(value, x)


def _param(name: str, value: float | Tensor, x: Tensor, channel_dim: int | None, op: str = "ctu") -> Tensor:
    """A per-channel parameter as the ops take it: float32 or float64, 0-d or 1-D, on x's device."""
    if not isinstance(value, Tensor):
        return _number(checks.number(op, name, value), x)
    checks.tensor(op, name, value)
    count = value.numel()
    if value.dim() > 1:
        raise ValueError(f"{op}: {name} must have at most one dimension, got shape {tuple(value.shape)}")
    if count != 1:
        checks.channel_count(op, name, count, x, channel_dim)
    if value.device != x.device:
        if value.dim():
            checks.same_device(op, name, value, "x", x)
        value = value.to(x.device)
    if value.dtype not in (torch.float32, torch.float64):
        value = value.float()
    return value


def _rows(name: str, value: float | Tensor, x: Tensor, channel_dim: int | None, index: Tensor) -> Tensor:
    """The row of ``value`` for each sample, as the op takes them: float32 or float64, (B, C) or (B, 1)."""
    if not isinstance(value, Tensor) or value.dim() != 2:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"ctu: with index, {name} must be a tensor of shape (rows, channels), got {got}")
    checks.tensor("ctu", name, value)
    checks.same_device("ctu", name, value, "x", x)
    if value.shape[1] != 1:
        checks.channel_count("ctu", name, value.shape[1], x, channel_dim)
    widened = _widened(value)
    assert widened is not None
    return widened.index_select(0, index)


def _number(value: float, x: Tensor) -> Tensor:
    """``value`` on x's device, in the widest dtype there: then 1 - beta keeps every digit the user wrote."""
    if (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    ):
        return _kept_number(value)
    return torch.scalar_tensor(value, dtype=backends.scalar_dtype(x.device), device=x.device)


@lru_cache(maxsize=256)
def _kept_number(value: float) -> Tensor:
    # Making the tensors of a call's numbers anew would take a third of a small call's time.
    with torch.inference_mode(False):
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


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

    (Equation 2 of the JoLA paper.) The backward pass is one pass over z and the upstream gradient, and keeps z alone.

    Args:
        z: float32, float64, bfloat16 or float16, of shape (..., H * D), (..., H, D), or with the heads along ``head_axis``
            and D last: (B, H, T, D) has ``head_axis=1``. Any strides.
        m, a: (H, D): the multiplicative and the additive edit; either may be None (absent). float32 or wider is kept.
        g_m, g_a: (H,): gates of ``m`` and ``a``; None is 1.
        head_dim: D, as a check of ``m`` and ``a``; read off them if None.
        head_axis: the axis of ``z`` that holds the heads, for layouts that the shape alone does not tell.
        index: (B,) integers that give each sample, along dimension 0 of ``z``, its own edit: then ``m`` and ``a`` are
            (A, H, D), the gates (A, H), and sample b uses row ``index[b]``.
        inplace: write the result over ``z``, as torch's in-place operations do: autograd notices. Not possible where a gradient
            is needed, nor where ``z`` overlaps itself or another argument's memory.

    Returns:
        A tensor of ``z``'s shape and dtype. Arithmetic is float32 (float64 for float64). Differentiable in z, m, a, g_m and
        g_a, to any order, in forward and reverse mode.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.
        RuntimeError: for ``inplace=True`` where a gradient is needed, or on an inference tensor outside of inference mode.

    Example:
        >>> z = ctkernels.functional.head_edit(z, m, a, g_m, g_a)                  # z: (batch, tokens, heads * head_dim)
        >>> z = ctkernels.functional.head_edit(z, m, a, head_axis=1)               # z: (batch, heads, tokens, head_dim)
    """
    op = "head_edit"
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
        _check_index(op, index, z, m, a)
    backends.forced_refusal(z)
    params = [_widened(t) for t in (m, a, g_m, g_a)]
    if index is not None:
        params = [t if t is None else t.index_select(0, index) for t in params]
    flat, params, restore = _heads_last(z, params, heads, dim, head_axis, per_sample=index is not None)
    inputs, static = (flat, *params), (flat.dim() - 1,)
    if not inplace:
        return restore(_HEAD_EDIT(inputs, static))
    memory.refuse_self_overlap(op, "z", z)
    if flat is z or (not torch.compiler.is_compiling() and torch._C._is_alias_of(flat, z)):  # type: ignore[attr-defined]
        _HEAD_EDIT.call_(inputs, static)
        return z
    _HEAD_EDIT.refuse_gradient(inputs)
    if not torch.compiler.is_compiling():
        memory.refuse_inference(op, "z", z)
    z.copy_(restore(_HEAD_EDIT(inputs, static)))
    return z  # of which copy_ gives another object where an edit is of a subclass


def _check_index(op: str, index: Tensor, x: Tensor, *tables: float | Tensor | None) -> None:
    """Raises if ``index`` does not give every sample of ``x`` a row of the ``tables``. On a GPU, indexing checks the values."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{op}: index must be an int64 or int32 tensor, got {kind}")
    if x.dim() == 0 or index.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: index must have one entry per sample, shape {tuple(x.shape[:1])}, got {tuple(index.shape)}"
        )
    checks.same_device(op, "index", index, "x" if op == "ctu" else "z", x)
    if type(index) is Tensor and index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        rows = [t.shape[0] for t in tables if isinstance(t, Tensor) and t.dim()]
        low, high = (int(v) for v in index.aminmax())
        if rows and not 0 <= low <= high < min(rows):
            raise ValueError(f"{op}: index must lie in 0..{min(rows) - 1}, got values from {low} to {high}")


def _widened(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype in (torch.float32, torch.float64) else t.float()


def _heads_last(
    z: Tensor, params: list[Tensor | None], heads: int, dim: int, head_axis: int | None, per_sample: bool
) -> tuple[Tensor, list[Tensor | None], Callable[[Tensor], Tensor]]:
    """``z`` as the op takes it, the parameters to match, and the way back to ``z``'s shape.

    Where the heads lie side by side in memory, channels are heads * head_dim. Where tokens lie between them, as in a
    contiguous (B, H, T, D), every (sample, head) is a group of its own. Neither copies.
    """
    shape = z.shape
    if head_axis is None:
        flat_heads = z.dim() > 0 and shape[-1] == heads * dim  # asked first: of one head (N, D) is N samples
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
        side_by_side = moved.stride(-2) == dim * moved.stride(-1) or heads == 1 or moved.numel() == 0
        if (
            not side_by_side
            and head_axis == 1
            and z.is_contiguous()
            and not torch._C._are_functorch_transforms_active()
        ):
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


def hard_concrete(
    log_alpha: Tensor,
    *,
    training: bool,
    temperature: float = 0.33,
    stretch: tuple[float, float] = (-0.1, 1.1),
    estimator: str = "clip",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Gates in [0, 1], with exact zeros and ones, from their logits: any number of gates in one call.

    Training samples g = clip(s * (high - low) + low, 0, 1), s = sigmoid((log u - log(1 - u) + log_alpha) / temperature) with
    u uniform; evaluation is deterministic.

    Args:
        log_alpha: logits of any shape; float32 or wider is kept, narrower is widened.
        training: sample, or be deterministic.
        temperature: of the concrete distribution; at most 10 for ``estimator="mean"``.
        stretch: (low, high) with low < 0 and high > 1: how far the distribution is stretched before it is clipped.
        estimator: the deterministic gate: ``"clip"``, clip(sigmoid(log_alpha) * (high - low) + low), of the L0 paper and the
            JoLA code; or ``"mean"``, the expectation E[g], of the JoLA paper, within 1e-12.
        noise: uniform numbers in (0, 1) of ``log_alpha``'s shape to sample from; or an int64 seed of shape (1,), from which
            a counter-based generator (Philox) makes them, the same on every device; drawn if None.
        generator: draws the noise, or on a GPU a seed; torch's default generator of the device if None.

    Returns:
        Gates of ``log_alpha``'s shape, differentiable in it.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range.

    Example:
        >>> gates = ctkernels.functional.hard_concrete(log_alpha, training=True)
        >>> gates = ctkernels.functional.hard_concrete(log_alpha, training=False, estimator="mean")

    Source: Louizos, Welling and Kingma 2018, equations 10 to 13; JoLA, ICML 2025, section 3.2.
    """
    checks.tensor("hard_concrete", "log_alpha", log_alpha)
    checks.choice("hard_concrete", "estimator", estimator, ("clip", "mean"))
    low, high = _stretch("hard_concrete", temperature, stretch)
    logits = _widened(log_alpha)
    assert logits is not None
    mode = SAMPLE if training else CLIP if estimator == "clip" else MEAN
    if mode == MEAN and temperature > HOTTEST_MEAN:
        raise ValueError(
            f"hard_concrete: temperature must be at most {HOTTEST_MEAN:g} for estimator='mean', an integral that takes more "
            f"points the higher it is; got {temperature}"
        )
    noise = _noise(logits, noise, generator) if training else None
    backends.forced_refusal(logits)
    return _HARD_CONCRETE((logits.contiguous(), noise), (NO_CHANNEL, mode, float(temperature), low, high))


def _noise(logits: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Noise as the op takes it. On a GPU that is a seed, drawn on the device by torch's generator: nothing waits for it,
    and every replay of a CUDA graph draws another one."""
    on_device = logits.is_cuda and not torch._C._are_functorch_transforms_active()
    if noise is None:
        if on_device:
            return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=logits.device)
        return torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    if isinstance(noise, Tensor) and noise.dtype == torch.int64:
        if noise.shape != (1,):
            raise ValueError(f"hard_concrete: noise as an int64 seed must have shape (1,), got {tuple(noise.shape)}")
        checks.same_device("hard_concrete", "noise", noise, "log_alpha", logits)
        return noise if on_device else uniform(noise, logits.shape, logits.dtype)
    checks.tensor("hard_concrete", "noise", noise)
    checks.same_shape("hard_concrete", "noise", noise, "log_alpha", logits)
    return noise.to(logits.dtype).contiguous()


def expected_l0(log_alpha: Tensor, *, temperature: float = 0.33, stretch: tuple[float, float] = (-0.1, 1.1)) -> Tensor:
    r"""P(g != 0) of hard-concrete gates, sigmoid(log_alpha - temperature * log(-low / high)): the L0 penalty, gate by gate.

    Args, Raises: as :func:`hard_concrete`. Returns a tensor of ``log_alpha``'s shape, differentiable in it.

    Example:
        >>> penalty = ctkernels.functional.expected_l0(log_alpha).sum()

    Source: Louizos, Welling and Kingma 2018, equation 12; JoLA, ICML 2025, equation 4.
    """
    checks.tensor("expected_l0", "log_alpha", log_alpha)
    low, high = _stretch("expected_l0", temperature, stretch)
    logits = _widened(log_alpha)
    assert logits is not None
    return _HARD_CONCRETE((logits.contiguous(), None), (NO_CHANNEL, OPEN, float(temperature), low, high))


def _stretch(op: str, temperature: float, stretch: tuple[float, float]) -> tuple[float, float]:
    if not checks.finite(op, "temperature", temperature) > 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    if not isinstance(stretch, (tuple, list)) or len(stretch) != 2:
        raise TypeError(f"{op}: stretch must be a pair (low, high), got {stretch!r}")
    low, high = (checks.finite(op, "stretch", v) for v in stretch)
    if not (low < 0 and high > 1 and high - low < math.inf):
        raise ValueError(
            f"{op}: stretch must be (low, high) with low < 0 and high > 1, not too far apart, got {stretch}"
        )
    return low, high
