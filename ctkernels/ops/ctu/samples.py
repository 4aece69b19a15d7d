"""Calls of `ctu` that together cover every code path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..sample import Sample
from .function import ctu


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """Calls of :func:`ctkernels.functional.ctu` that together cover every code path.

    Elementwise tensors have ``dtype``; parameters are float32 (float64 for float64).
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def data(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    def knob(*shape: int) -> Tensor:
        return (0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(device, wide)

    def sample(name: str, x: Tensor, beta: Any, coeff: Any, **kwargs: Any) -> Sample:
        return Sample(name, ctu, (x, beta, coeff), kwargs)

    layouts = {
        "one value": (data(1), None),
        "0-d": (data(1).reshape(()), None),
        "empty": (data(0, 3), 1),
        "no channels": (data(2, 0, 5), 1),
        "odd length, shared knobs": (data(1037), None),
        "NCHW, runs of odd length": (data(2, 3, 7, 11), 1),
        "NCHW, long runs": (data(2, 2, 130, 17), 1),
        "NCHW, runs of four": (data(3, 5, 2, 2), 1),
        "NHWC in memory": (data(2, 5, 4, 3).contiguous(memory_format=torch.channels_last), 1),
        "NLC, odd channels": (data(3, 7, 19), -1),
        "NLC, more channels than a block": (data(2, 3, 1100), 2),
        "channels first": (data(6, 40), 0),
        "transposed": (data(5, 33).T, 0),
        "sliced, not dense": (data(4, 6, 10)[:, ::2, 1:8], 1),
        "expanded": (data(1, 5, 1).expand(3, 5, 4), 1),
        "size-1 channel": (data(3, 1, 6), 1),
    }
    for name, (x, channel_dim) in layouts.items():
        count = x.shape[channel_dim] if channel_dim is not None else 1
        per_channel = {} if channel_dim is None else {"channel_dim": channel_dim}
        shape = () if channel_dim is None else (count,)
        yield sample(name, x, knob(*shape), knob(*shape), **per_channel)
    x = data(2, 5, 3)
    for activation in ("leaky_relu", "prelu", "relu6", "silu", "gelu", "gelu_tanh"):
        yield sample(activation, x, knob(5), knob(5), channel_dim=1, activation=activation)
    yield sample("learned slopes, some above 1", x, knob(5), knob(5), channel_dim=1, activation="prelu",
                 negative_slope=torch.tensor([-0.2, 0.0, 0.3, 0.9, 1.5], dtype=wide, device=device))  # fmt: skip
    yield sample("logits", x, 4 * data(5).to(wide), data(5).to(wide), channel_dim=1, raw=True)
    yield sample("shared beta, coeff per channel", x, knob(1), knob(5), channel_dim=1)
    yield sample("numbers", x, 0.9, 0.5)
    yield sample("the plain activation", x, 1.0, 0.5)
    yield sample("eps", x, knob(5), knob(5), channel_dim=1, eps=1e-6)
    yield sample("scale and shift", x, knob(5), knob(5), channel_dim=1, scale=data(5).to(wide), shift=data(5).to(wide))
    yield sample("residual", x, knob(5), knob(5), channel_dim=1, residual=data(2, 5, 3))
    yield sample("prologue, inner channels", data(4, 7), knob(7), knob(7), channel_dim=1, scale=data(7).to(wide),
                 shift=data(7).to(wide), residual=data(7, 4).T)  # fmt: skip
