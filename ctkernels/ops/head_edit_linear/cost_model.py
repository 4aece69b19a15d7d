"""Chooses whether the edit of a linear layer's input is computed in its weights ("folded") or in a pass of its own ("separate").

Both run the same matrix products. Beside them, with p = 1 + g_m m and q = g_a a:

    separate   forward reads and writes the input; backward reads it and the gradient, and writes the input's gradient
    folded     forward reads and writes the weights; backward does so again, and reads the input and its gradient

Without m nothing is scaled, and without a gradient nothing is read or written for it. A launch costs as much as moving ``LAUNCH``
bytes.

On GPUs only: on a CPU the folded layer saved next to nothing in float32 and took longer in bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..autograd import in_transform, needs_grad

FOLDED, SEPARATE = "folded", "separate"
# Of a kernel: 4 us at an H100's bandwidth.
LAUNCH = {"cuda": 13_000_000}


class Cost(NamedTuple):
    """Bytes to move beside the matrix products, and kernels to launch."""

    bytes: int
    launches: int

    def total(self, device: str) -> int:
        """In bytes."""
        return self.bytes + self.launches * LAUNCH[device]


def separate(z: int, scales: bool, through: bool, learned: bool) -> Cost:
    """z: bytes of the input. scales: whether there is an m. through, learned: whether input and parameters need gradients."""
    reads = learned * (1 + scales) or through * scales
    writes = through * scales
    return Cost((2 + reads + writes) * z, 1 + (2 if learned else writes))


def folded(z: int, w: int, scales: bool, through: bool, learned: bool) -> Cost:
    """w: bytes of the weights; the others as for :func:`separate`."""
    again = through * scales
    return Cost((1 + scales + 2 * again) * w + learned * (1 + scales) * z, 1 + again + 3 * learned)


def costs(z: Tensor, weight: Tensor, scales: bool, learned: bool) -> dict[str, Cost]:
    """The costs of both, for z (..., width) and weight (outputs, width). scales: whether there is an m. learned: whether a
    parameter of the edit needs a gradient."""
    size, recording = z.element_size(), torch.is_grad_enabled()
    needed = scales, recording and z.requires_grad, recording and learned
    return {
        FOLDED: folded(size * z.numel(), size * weight.numel(), *needed),
        SEPARATE: separate(size * z.numel(), *needed),
    }


def refusal(z: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the edit cannot be computed in the weights, or None."""
    name = backends.forced()
    if name is not None:
        return f"the backend {name!r} is forced"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an exported program holds for other sizes"
    if in_transform():
        return "torch.func transforms and forward-mode derivatives go through the input"
    if needs_grad((weight, bias)):
        return "the projection's weights need a gradient"
    device = z.device.type
    if device not in LAUNCH:
        return f"on {device} the other way does not pay"
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else z.dtype
    if not z.dtype == weight.dtype == autocast:
        return f"the input is {_name(z)}, the weights {_name(weight)}, and the product computed in {_name(autocast)}"
    if device == "cuda":
        if z.dtype == torch.float64:
            return "the kernels compute in float32"
        if weight.stride(1) != 1:
            return "the rows of the weights are not contiguous"
        return backends.BACKENDS["triton"].refusal(z)
    return None


def choose(z: Tensor, weight: Tensor, bias: Tensor | None, scales: bool, learned: bool) -> str:
    """FOLDED or SEPARATE; the arguments are those of :func:`costs`."""
    if refusal(z, weight, bias) is not None:
        return SEPARATE
    cost, device = costs(z, weight, scales, learned), z.device.type
    return FOLDED if cost[FOLDED].total(device) < cost[SEPARATE].total(device) else SEPARATE


def explain(z: Tensor, weight: Tensor, bias: Tensor | None, scales: bool, learned: bool) -> str:
    """Says which one is chosen, and why."""
    reason = refusal(z, weight, bias)
    if reason is not None:
        return f"in a pass over its input: {reason}"
    cost, device = costs(z, weight, scales, learned), z.device.type
    in_weights, apart = (f"{cost[way].total(device) / 1e6:.3g} MB" for way in (FOLDED, SEPARATE))
    if choose(z, weight, bias, scales, learned) == FOLDED:
        return f"in the projection's weights: that costs as much as moving {in_weights}, a pass over its input {apart}"
    return f"in a pass over its input: that costs as much as moving {apart}, in the projection's weights {in_weights}"


def _name(value: Tensor | torch.dtype) -> str:
    return str(value if isinstance(value, torch.dtype) else value.dtype).removeprefix("torch.")
