"""Samples: calls of the public ops that between them reach every code path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import functional


@dataclass
class Sample:
    """One call of a public function: ``function(*args, **kwargs)``, with a name that says what it is there for."""

    name: str
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The floating-point tensor arguments, by position or name."""
        named = {str(i): a for i, a in enumerate(self.args)} | self.kwargs
        return {k: v for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Sample:
        """The same call with every floating-point tensor ``t`` named ``k`` replaced by ``change(k, t)``."""

        def swap(k: str, v: Any) -> Any:
            return change(k, v) if isinstance(v, Tensor) and v.is_floating_point() else v

        args = tuple(swap(str(i), a) for i, a in enumerate(self.args))
        return Sample(self.name, self.function, args, {k: swap(k, v) for k, v in self.kwargs.items()})

    def requiring_grad(self) -> Sample:
        """Leaves that require gradients, of the same layout."""
        return self.map(lambda _, t: t.detach().requires_grad_())

    def __call__(self) -> Tensor:
        return self.function(*self.args, **self.kwargs)


def ctu_samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """Calls of :func:`ctkernels.functional.ctu` that between them reach every code path.

    Elementwise tensors have ``dtype``; parameters are float32 (float64 for float64).
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def data(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    def knob(*shape: int) -> Tensor:
        return (0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(device, wide)

    def sample(name: str, x: Tensor, beta: Any, coeff: Any, **kwargs: Any) -> Sample:
        return Sample(name, functional.ctu, (x, beta, coeff), kwargs)

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


def ctu_and_mul_samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """Calls of :func:`ctkernels.functional.ctu_and_mul` that between them reach every code path."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def data(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    def knob(*shape: int) -> Tensor:
        return (0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(device, wide)

    def sample(name: str, gate: Tensor, up: Tensor | None, *knobs: Any, **kwargs: Any) -> Sample:
        return Sample(f"gated {name}", functional.ctu_and_mul, (gate, up, *knobs), kwargs)

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


def head_edit_samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """Calls of :func:`ctkernels.functional.head_edit` that between them reach every code path."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def data(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, wide)

    heads, dim = 3, 5
    layouts = {
        "(B, T, H D)": (data(2, 3, heads * dim), {}),
        "(T, H D)": (data(4, heads * dim), {}),
        "(H D)": (data(heads * dim), {}),
        "(B, T, H, D)": (data(2, 3, heads, dim), {}),
        "(B, H, T, D)": (data(2, heads, 3, dim), {"head_axis": 1}),
        "(B, H, T, D), one token": (data(2, heads, 1, dim), {"head_axis": 1}),
        "(B, H, T, D) over (B, T, H, D) in memory": (data(2, 3, heads, dim).transpose(1, 2), {"head_axis": 1}),
        "(B, H, T, D), sliced": (data(2, heads, 6, dim)[:, :, ::2], {"head_axis": 1}),
        "heads first": (data(heads, 4, dim), {"head_axis": 0}),
        "sliced": (data(2, 3, 2 * heads * dim)[..., : heads * dim], {}),
        "no tokens": (data(2, 0, heads * dim), {}),
    }
    for name, (z, kwargs) in layouts.items():
        edits = [parameter(heads, dim) for _ in range(2)]
        gates = [parameter(heads) for _ in range(2)]
        yield Sample(f"head edit {name}", functional.head_edit, (z, *edits, *gates), kwargs)
    z, m, a, g = data(2, 3, heads * dim), parameter(heads, dim), parameter(heads, dim), parameter(heads)
    yield Sample("head edit, scale only", functional.head_edit, (z, m, None, g))
    yield Sample("head edit, offset only", functional.head_edit, (z, None, a))
    yield Sample("head edit, one head", functional.head_edit, (data(2, 4), parameter(1, 4), parameter(1, 4)))
    adapters = [parameter(4, heads, dim), parameter(4, heads, dim), parameter(4, heads), parameter(4, heads)]
    index = torch.tensor([3, 1], device=device)
    yield Sample("head edit per sample", functional.head_edit, (z, *adapters), {"index": index})
    yield Sample("head edit per sample, (B, H, T, D)", functional.head_edit, (data(2, heads, 2, dim), *adapters),
                 {"index": index, "head_axis": 1})  # fmt: skip


def hard_concrete_samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """Calls of :func:`ctkernels.functional.hard_concrete` without noise. Gates are float32 whatever ``dtype`` is."""
    values = 3 * torch.randn(37, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for estimator in ("clip", "mean"):
        yield Sample(f"gates in evaluation, {estimator}", functional.hard_concrete, (values.to(device, torch.float32),),
                     {"training": False, "estimator": estimator})  # fmt: skip


# By the name of the op.
SAMPLES: dict[str, Callable[..., Iterator[Sample]]] = {
    "ctu": ctu_samples,
    "ctu_and_mul": ctu_and_mul_samples,
    "head_edit": head_edit_samples,
    "hard_concrete": hard_concrete_samples,
}


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """The samples of every op that has elementwise data and per-channel parameters."""
    yield from ctu_samples(dtype, device, seed)
    yield from ctu_and_mul_samples(dtype, device, seed)
    yield from head_edit_samples(dtype, device, seed)
