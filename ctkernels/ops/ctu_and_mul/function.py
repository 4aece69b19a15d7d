"""``ctkernels.functional.ctu_and_mul``: argument checks, and the call of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks, layout
from ..ctu.function import kind_of, knob, knob_rows
from ..ctu.op import LEAKY, CtuAttrs
from .op import OP, CtuAndMulInputs


def ctu_and_mul(
    gate: Tensor,
    up: Tensor | None,
    beta: float | Tensor,
    coeff: float | Tensor = 0.5,
    *,
    channel_dim: int | None = None,
    raw: bool = False,
    activation: str = "silu",
    negative_slope: float | Tensor = 0.01,
    index: Tensor | None = None,
    inplace: bool = False,
    eps: float = 0.0,
) -> Tensor:
    r"""The gated product of an MLP with a CT unit, ``ctu(gate, beta, coeff, ...) * up``, in one pass over both.

    At beta = 0.5, coeff = 1 it is SwiGLU, ``silu(gate) * up``, or GEGLU with ``activation="gelu"``. The backward pass computes
    all gradients in one pass, and saves only ``gate`` and ``up``.

    Args:
        gate: float32, float64, bfloat16 or float16; any shape and strides, empty included.
        up: a tensor of ``gate``'s shape. None: ``gate`` is packed, ``[gate | up]`` along ``channel_dim``, as computed by one
            projection of twice the width. Its gradient is packed as well; nothing is split or copied.
        beta, coeff: the knobs of the unit, as in :func:`ctu`: numbers, or tensors with one value or one per channel.
        channel_dim: the dimension that per-channel tensors, and the halves of a packed ``gate``, belong to. None is the last
            one of a packed ``gate``; otherwise required if there are per-channel tensors.
        raw, activation, negative_slope, index, eps: as in :func:`ctu`.
        inplace: write the result over ``gate``, under the conditions of :func:`ctu`, unless it is packed. ``up`` may be ``gate``.

    Returns:
        A tensor of the shape of ``up``, in the wider of the two dtypes. Arithmetic is float32 (float64 for float64), rounded
        once. Differentiable in every tensor argument, to any order, in forward and reverse mode.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: for ``inplace=True`` if a gradient is needed, or on an inference tensor outside inference mode.

    Examples:
        >>> gate, up = torch.randn(2, 4, 16)
        >>> beta, coeff = torch.full((16,), 0.5), torch.full((16,), 0.9)
        >>> y = ctkernels.functional.ctu_and_mul(gate, up, beta, coeff, channel_dim=-1)
        >>> packed = torch.cat([gate, up], -1)  # as from one projection, twice as wide
        >>> y = ctkernels.functional.ctu_and_mul(packed, None, beta, coeff)

    Source: Shazeer 2020, GLU variants, arXiv 2002.05202; the unit is that of :func:`ctu`.
    """
    op = "ctu_and_mul"
    checks.tensor(op, "gate", gate)
    if up is not None:
        checks.tensor(op, "up", up)
        checks.same_shape(op, "up", up, "gate", gate)
        if up.dtype != gate.dtype:
            dtype = torch.promote_types(gate.dtype, up.dtype)
            if inplace and dtype != gate.dtype:
                raise TypeError(f"{op}: up must have gate's dtype {gate.dtype} when inplace=True, got {up.dtype}")
            gate, up = gate.to(dtype), up.to(dtype)
    elif inplace:
        raise ValueError(f"{op}: inplace=True needs up: the result has half of a packed gate's channels")
    elif channel_dim is None:
        channel_dim = -1
    kind = kind_of(op, activation)
    channel = None if channel_dim is None else checks.dimension(op, "channel_dim", channel_dim, gate)
    like = gate
    if up is None:
        assert channel is not None
        if gate.shape[channel] % 2:
            raise ValueError(
                f"{op}: without up, gate is [gate | up] along channel_dim, which needs an even size; gate.shape[{channel}] is "
                f"{gate.shape[channel]}"
            )
        like = layout.halves(gate, channel)[0]
    eps = checks.unit_interval(op, "eps", eps)
    if index is None:
        beta, coeff = knob(op, "beta", beta, like, channel, raw), knob(op, "coeff", coeff, like, channel, raw)
    else:
        checks.sample_index(op, index, "gate", gate, (beta, coeff))
        if channel == 0:
            raise ValueError(f"{op}: index gives the samples of dimension 0 their knobs, so channel_dim must not be 0")
        beta, coeff = (
            knob_rows(op, "beta", beta, like, channel, index),
            knob_rows(op, "coeff", coeff, like, channel, index),
        )
    slope = checks.parameter(op, "negative_slope", negative_slope, like, channel) if kind == LEAKY else None
    backends.check_forced_backend(gate)
    inputs = CtuAndMulInputs(gate, beta, coeff, slope, up)
    attrs = CtuAttrs(layout.NO_CHANNEL if channel is None else channel, kind, raw, eps)
    return OP.call_(inputs, attrs) if inplace else OP(inputs, attrs)
