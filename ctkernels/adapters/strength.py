"""How strongly an adapter acts: 0 is the base model, 1 the adapter as it was trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from torch import nn


class Scaled:
    """Mixed into the layers of JoLA and Curvature Tuning: peft's way of scaling LoRA, `set_scale` and the like.

    A strength is a tensor, in a buffer that is not saved, so that changing it needs no new graph of a compiled model. An
    adapter that was never scaled has none.
    """

    strength: Any  # BufferDict

    def configs(self) -> dict[str, Any]:
        """The configurations of its adapters, by name."""
        raise NotImplementedError

    def _home(self) -> torch.device | None:
        raise NotImplementedError

    def check_scale(self, adapter: str, scale: float) -> None:
        """Check that an adapter can be given a strength.

        Raises:
            ValueError: it is merged, or the strength is not finite.
        """
        layer: Any = self
        if adapter in layer.merged_adapters:
            raise ValueError(f"{layer.site}: scaling needs unmerged adapters, got {layer.merged_adapters} merged")
        if isinstance(scale, bool) or not math.isfinite(scale):
            raise ValueError(f"{layer.site}: scale must be a finite number, got {scale!r}")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter, in a layer that has it.

        Raises:
            ValueError: see `check_scale`.
        """
        if adapter not in self.configs():
            return
        self.check_scale(adapter, scale)
        if adapter in self.strength:
            self.strength[adapter].fill_(scale)
        elif scale != 1:
            self.strength[adapter] = torch.tensor(float(scale), dtype=torch.float32, device=self._home())

    def get_scale(self, adapter: str) -> float:
        """The strength of an adapter."""
        return float(self.strength[adapter]) if adapter in self.strength else 1.0

    def scale_layer(self, scale: float) -> None:
        """Multiply the strengths of the active adapters."""
        layer: Any = self
        for adapter in layer.active_adapters:
            self.set_scale(adapter, self.get_scale(adapter) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strengths of the active adapters; None sets them to 1."""
        layer: Any = self
        for adapter in layer.active_adapters:
            self.set_scale(adapter, 1.0 if scale is None else self.get_scale(adapter) / scale)


def strengths() -> BufferDict:
    """A table of strengths."""
    return BufferDict(persistent=False)


def set_strength(model: nn.Module, strength: float, adapter: str | None = None) -> None:
    """Set how strongly an adapter acts, from 0 (the base model) to 1 (the adapter).

    JoLA's edit of a head becomes `(1 + s*g_m*m) * z + s*g_a*a`, which is linear in the strength s (with
    `additive="kv_group"` `(1 + s*g_m*m) * (z + s*g_a*a)`, still a bias of the values). beta and coeff of Curvature Tuning go the
    part s of the way from where the unit is the activation itself; what the unit computes is not linear in it. LoRA's matrices
    add s times what they added. Modules trained beside an adapter (`modules_to_save`) stay as they are.

    The strength belongs to the model, not to the adapter's file. A compiled model is compiled anew the first time that an
    adapter's strength is set, and not when it is changed (LoRA's is a number in peft, and compiled in).

    Args:
        model: a model with JoLA, curvature, joint or LoRA adapters, unmerged.
        strength: the new strength; more than 1 exaggerates edits and LoRA.
        adapter: its name; None takes the active ones.

    Raises:
        ValueError: there is no such adapter, one is merged, or the strength is not finite, or with curvature not between 0 and 1.
            Nothing is changed then.

    Examples:
        >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
        >>> set_strength(model, 0.5)
    """
    layers = _layers(model, adapter)
    for layer, name in layers:
        if isinstance(layer, Scaled):
            layer.check_scale(name, strength)
        elif name in layer.merged_adapters:
            raise ValueError(f"adapter: scaling needs unmerged adapters, got {layer.merged_adapters} merged")
    for layer, name in layers:
        layer.set_scale(name, strength)


@contextmanager
def adapter_strength(model: nn.Module, strength: float, adapter: str | None = None) -> Iterator[None]:
    """Have an adapter act with a strength during the block; see :func:`set_strength`.

    Args:
        model: a model with adapters.
        strength: from 0 to 1.
        adapter: its name; None takes the active ones.

    Examples:
        >>> with adapter_strength(model, 0.5):
        ...     output = model(**batch)
    """
    before = [
        (layer, name, layer.get_scale(name) if isinstance(layer, Scaled) else layer.scaling[name])
        for layer, name in _layers(model, adapter)
    ]
    set_strength(model, strength, adapter)
    try:
        yield
    finally:
        for layer, name, scale in before:
            if isinstance(layer, Scaled):
                layer.set_scale(name, scale)
            else:
                layer.scaling[name] = scale


def _layers(model: nn.Module, adapter: str | None) -> list[tuple[Any, str]]:
    """The layers to scale, each with the name of an adapter that it has."""
    every: list[Any] = [module for module in model.modules() if isinstance(module, (Scaled, LoraLayer))]
    has = {layer: layer.scaling if isinstance(layer, LoraLayer) else layer.configs() for layer in every}
    known = {name for names in has.values() for name in names}
    if adapter is not None and adapter not in known:
        raise ValueError(f"adapter: expected one of {sorted(known)}, got {adapter!r}")
    pairs = [
        (layer, name)
        for layer in every
        for name in ([adapter] if adapter is not None else layer.active_adapters)
        if name in has[layer]
    ]
    if not pairs:
        raise ValueError("model: expected one with an active JoLA, curvature, joint or LoRA adapter, got none")
    return pairs
