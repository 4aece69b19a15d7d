"""Tensor arguments as plain data: shape, strides, offset, values, and other properties seen by autograd and the dispatcher."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CANARY = 77.0  # fills a buffer outside of the tensors' elements
SPECIAL = ("nan", "inf", "-inf", "0.0", "-0.0", "huge", "-huge", "tiny", "6.0")


class Subclass(torch.Tensor):
    """A user's tensor subclass that overrides nothing."""


@dataclass(frozen=True)
class Spec:
    """A tensor argument. ``values``: "normal" (times ``scale``), "unit" (in [0, 1]) or "index" (integers below ``scale``), from
    ``seed``; ``special``: (position, value) pairs that overwrite some. ``alias``: the argument whose buffer this one uses instead
    of ``values``. ``negative``: torch's lazy negation, with negated values in the buffer."""

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    offset: int = 0
    values: str = "normal"
    scale: float = 1.0
    seed: int = 0
    special: tuple[tuple[int, str], ...] = ()
    alias: str = ""
    negative: bool = False
    inference: bool = False
    subclass: bool = False
    grad: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """The length of the buffer, with two extra values as canaries."""
        if self.count == 0:
            return self.offset + 2
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 3

    @property
    def overlaps_itself(self) -> bool:
        """Whether two of its elements can share memory."""
        expected = 0
        for stride, size in sorted((s, n) for s, n in zip(self.strides, self.shape) if n > 1):
            if stride <= expected:
                return self.count > 0
            expected += stride * (size - 1)
        return False

    def numbers(self) -> Tensor:
        """The values, in ``dtype``, contiguous."""
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        if self.values == "index":
            return torch.randint(0, max(int(self.scale), 1), self.shape, generator=generator).to(dtype)
        draw = torch.rand if self.values == "unit" else torch.randn
        flat = (draw(self.count, generator=generator, dtype=torch.float64) * self.scale).to(dtype)
        for position, value in self.special:
            flat[position % max(self.count, 1)] = special(value, dtype)
        return flat.view(self.shape)


def special(value: str, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    if value.endswith("huge"):
        return info.max * (-0.9 if value.startswith("-") else 0.9)
    return info.tiny * 0.25 if value == "tiny" else float(value)


@dataclass
class Built:
    """Tensors built from specs, by name, with their buffers and the buffers' original contents."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def contents(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self.buffers.items()}


def build(specs: dict[str, Any]) -> Built:
    """Build the tensors of a case's arguments; arguments that are not specs are left out."""
    built = Built()
    for name, spec in specs.items():
        if isinstance(spec, Spec):
            with torch.inference_mode(spec.inference):
                built.tensors[name] = _build(name, spec, built)
    return built


def _build(name: str, spec: Spec, built: Built) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    if spec.alias:
        target = built.tensors[spec.alias]
        if (spec.shape, spec.strides, spec.offset) == (tuple(target.shape), target.stride(), target.storage_offset()):
            return target
        return built.buffers[spec.alias].as_strided(spec.shape, spec.strides, spec.offset)
    fill = 1 if not dtype.is_floating_point else CANARY
    buffer = torch.full((spec.length,), fill, dtype=dtype)
    values = spec.numbers()
    if spec.negative:
        values = -values
    t = buffer.as_strided(spec.shape, spec.strides, spec.offset)
    if spec.count:
        # an expanded dimension holds one value: the last one written
        buffer.as_strided(spec.shape, spec.strides, spec.offset).copy_(
            values
        ) if not spec.overlaps_itself else _scatter(buffer, spec, values)
    built.buffers[name] = buffer
    if spec.negative:
        t = torch._neg_view(t)
    if spec.subclass:
        t = t.as_subclass(Subclass)  # type: ignore[assignment]
    return t.detach().requires_grad_() if spec.grad else t


def _scatter(buffer: Tensor, spec: Spec, values: Tensor) -> None:
    places = torch.arange(len(buffer)).as_strided(spec.shape, spec.strides, spec.offset).reshape(-1)
    flat = values.reshape(-1)
    for place, value in zip(places.tolist(), range(len(flat))):
        buffer[place] = flat[value]
