"""Calls of `ctu_and_mul` that together cover every code path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..sample import Sample
from .function import ctu_and_mul


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """Calls of :func:`ctkernels.functional.ctu_and_mul` that together cover every code path."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def data(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    def knob(*shape: int) -> Tensor:
        return (0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(device, wide)

    def sample(name: str, gate: Tensor, up: Tensor | None, *knobs: Any, **kwargs: Any) -> Sample:
        return Sample(f"gated {name}", ctu_and_mul, (gate, up, *knobs), kwargs)

    layouts = {
        "one value": (data(1), data(1), None),
        "empty": (data(0, 3), data(0, 3), 1),
        "odd length, shared knobs": (data(1037), data(1037), None),
        "NCHW, runs of odd length": (data(2, 3, 7, 11), data(2, 3, 7, 11), 1),
        "NLC, odd channels": (data(3, 7, 19), data(3, 7, 19), -1),
        "NLC, more channels than a block": (data(2, 3, 1100), data(2, 3, 1100), 2),
        "transposed": (data(5, 33).T, data(33, 5), 0),
        "halves of a tensor": (data(3, 4, 14)[..., :7], data(3, 4, 14)[..., 7:], -1),
        "expanded": (data(1, 5, 1).expand(3, 5, 4), data(3, 5, 1).expand(3, 5, 4), 1),
        "packed, odd channels": (data(3, 7, 38), None, -1),
        "packed, more channels than a block": (data(2, 3, 2200), None, -1),
        "packed, few channels": (data(3, 5, 4), None, 2),
        "packed, one row": (data(26), None, 0),
        "packed, runs": (data(2, 6, 17), None, 1),
        "packed, empty": (data(0, 6), None, 1),
        "packed, transposed": (data(14, 5).T, None, 1),
        "packed, channels outermost in memory": (data(4, 14).T, None, 0),
        "packed, sliced": (data(3, 4, 20)[..., 2:12], None, -1),
    }
    for name, (gate, up, channel_dim) in layouts.items():
        per_channel = {} if channel_dim is None else {"channel_dim": channel_dim}
        shape = () if channel_dim is None else (gate.shape[channel_dim] // (1 if up is not None else 2),)
        yield sample(name, gate, up, knob(*shape), knob(*shape), **per_channel)
    gate, up, packed = data(2, 5, 3), data(2, 5, 3), data(2, 10, 3)
    for activation in ("relu", "leaky_relu", "prelu", "relu6", "gelu"):
        yield sample(activation, gate, up, knob(5), knob(5), channel_dim=1, activation=activation)
    yield sample("packed gelu", packed, None, knob(5), knob(5), channel_dim=1, activation="gelu")
    slopes = torch.tensor([-0.2, 0.0, 0.3, 0.9, 1.5], dtype=wide, device=device)
    for name, both in (("", (gate, up)), ("packed, ", (packed, None))):
        yield sample(
            f"{name}learned slopes", *both, knob(5), knob(5), channel_dim=1, activation="prelu", negative_slope=slopes
        )
        yield sample(f"{name}logits", *both, 4 * data(5).to(wide), data(5).to(wide), channel_dim=1, raw=True)
        yield sample(f"{name}shared beta, coeff per channel", *both, knob(1), knob(5), channel_dim=1)
        yield sample(f"{name}a row of knobs for each sample", *both, knob(4, 5), knob(4, 5), channel_dim=1,
                     index=torch.tensor([3, 1], device=device))  # fmt: skip
        yield sample(f"{name}a knob for each sample", *both, knob(4, 1), knob(4, 1), channel_dim=1,
                     index=torch.tensor([3, 1], device=device))  # fmt: skip
    yield sample("packed, shared knobs", data(3, 4, 46), None, knob(), knob())
    yield sample("packed, few channels, shared knobs", data(3, 4, 6), None, knob(), knob())
    yield sample("SwiGLU", gate, up, 0.5, 1.0)
    yield sample("plain", gate, up, 1.0, 0.5, activation="relu")
    yield sample("eps", gate, up, knob(5), knob(5), channel_dim=1, eps=1e-6)
