"""The methods that are compared, and the settings each is tried with."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...steering.activations import RELU_FAMILY
from ..betas import MEAN_FREE
from .result import Setting

HEAD_LR = 1e-3


@dataclass(frozen=True)
class Attached:
    """A network with what a method trains.

    Attributes:
        network: the network, everything else frozen.
        groups: parameter groups with their rates.
        parameters: how many numbers are trained, without the head; ``head``: how many are in the head.
    """

    network: nn.Module
    groups: list[dict[str, Any]]
    parameters: int
    head: int


@dataclass(frozen=True)
class Method:
    """A method by name; ``grid`` holds the values to try, ``optional`` names further settings it understands.

    ``attach`` makes an :class:`Attached` of a network with a new head, the head's name, a setting, the kinds of
    activation to treat (None: the default) and the side of the images. It is None for methods that leave the network
    alone; of these ``coeff`` is the coefficient of S-CT, None of the linear probe.
    """

    name: str
    grid: Mapping[str, tuple[float, ...]]
    attach: Callable[[nn.Module, str, Setting, Sequence[str] | None, int], Attached] | None = None
    optional: tuple[str, ...] = ()
    coeff: float | str | None = None

    def settings(self, own: Mapping[str, Sequence[float]] | None = None) -> list[dict[str, float | str]]:
        """Every combination of the grid's values, with ``own`` instead of or besides them.

        Raises:
            ValueError: a name this method does not have, or no values for it.
        """
        known = [*self.grid, *self.optional]
        if unknown := [name for name in own or {} if name not in known]:
            raise ValueError(f"grids: {self.name} has the settings {known}, got {unknown}")
        grid = {**self.grid, **(own or {})}
        if empty := [name for name, values in grid.items() if not len(values)]:
            raise ValueError(f"grids: {self.name} needs at least one value of {empty}, got none")
        if bad := {n: v for n, values in grid.items() for v in values if not (v > 0 or n == "coeff")}:
            raise ValueError(f"grids: {self.name} needs positive values, got {bad}")
        return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def method(name: str) -> Method:
    """``linear``, ``sct``, ``sct-mean-free``, ``tct``, ``lora-rN`` and ``tct+lora-rN`` for any rank N.

    Raises:
        ValueError: another name.
    """
    if name == "linear":
        return Method(name, {"head_lr": (HEAD_LR,)})
    if name in ("sct", "sct-mean-free"):
        return Method(name, {"head_lr": (HEAD_LR,)}, coeff=0.5 if name == "sct" else MEAN_FREE)
    # The curvature's rate is lr where it is trained; LoRA alone has one rate for adapter and head, as in the paper.
    curvature = {"lr": (0.1,), "head_lr": (HEAD_LR,)}
    if name == "tct":
        return Method(name, curvature, _tct, ("beta", "coeff"))
    found = re.fullmatch(r"(tct\+)?lora-r([1-9]\d*)", name)
    if found is None:
        raise ValueError(f"methods must be linear, sct, sct-mean-free, tct, lora-rN or tct+lora-rN, got {name!r}")
    rank = int(found[2])

    def attach(network: nn.Module, head: str, setting: Setting, kinds: Sequence[str] | None, size: int) -> Attached:
        if found[1]:
            return _tct(network, head, setting, kinds, size, rank)
        return _lora(network, head, setting, rank)

    if found[1]:
        return Method(name, {**curvature, "lora_lr": (1e-4,)}, attach, ("beta", "coeff", "scale"))
    return Method(name, {"lr": (1e-4,)}, attach, ("head_lr", "scale"))


def lora_targets(network: nn.Module, head: str, rank: int) -> tuple[list[str], list[str]]:
    """Names of the convolutions and linear layers that LoRA of ``rank`` can be put on, and of those it cannot.

    peft has no LoRA for dilated convolutions, nor for grouped ones whose groups do not divide the rank.
    """
    fits: list[str] = []
    not_fits: list[str] = []
    for name, module in network.named_modules():
        if name == head:
            continue
        if isinstance(module, nn.Conv2d):
            fit = rank % module.groups == 0 and set(module.dilation) == {1}
            (fits if fit else not_fits).append(name)
        elif isinstance(module, nn.Linear):
            fits.append(name)
    return fits, not_fits


def _lora_config(network: nn.Module, head: str, setting: Setting, rank: int, **more: Any) -> Any:
    import peft

    targets, _ = lora_targets(network, head, rank)
    if not targets:
        raise ValueError(f"lora-r{rank}: {type(network).__name__} has no convolution or linear layer that it fits")
    alpha: Any = rank * float(setting.get("scale", 1.0))  # annotated as an integer, used as a number
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more)


def _lora(network: nn.Module, head: str, setting: Setting, rank: int) -> Attached:
    import peft

    config = _lora_config(network, head, setting, rank, modules_to_save=[head])
    rate = float(setting["lr"])
    return _attached(peft.get_peft_model(network, config), {"lora_": rate}, float(setting.get("head_lr", rate)))


def _tct(
    network: nn.Module, head: str, setting: Setting, kinds: Sequence[str] | None, size: int, rank: int = 0
) -> Attached:
    import peft

    from ...adapters import CurvatureConfig

    model: Any = network
    rates = {"curvature_": float(setting["lr"])}
    if rank:
        model = peft.get_peft_model(model, _lora_config(network, head, setting, rank))
        rates["lora_"] = float(setting["lora_lr"])
    config = CurvatureConfig(
        activations=list(RELU_FAMILY if kinds is None else kinds),
        init_beta=_number(setting, "beta"),
        init_coeff=_number(setting, "coeff"),
        input_shape=(3, size, size),
        modules_to_save=[head],
    )
    with warnings.catch_warnings():
        for about in ("You are trying to modify a model with PEFT for a second time", "Already found a `peft_config`"):
            warnings.filterwarnings("ignore", about)  # two methods on one model are what is wanted here
        adapted = peft.get_peft_model(model, config)
    return _attached(adapted, rates, float(setting["head_lr"]))


def _number(setting: Setting, name: str) -> float | None:
    return float(setting[name]) if name in setting else None


def _attached(model: Any, rates: Mapping[str, float], head_lr: float) -> Attached:
    """Train the parameters whose names hold one of ``rates``, and the head; freeze the rest."""
    groups: dict[str, list[torch.nn.Parameter]] = {kind: [] for kind in (*rates, "modules_to_save")}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in groups if kind in name), None)
        parameter.requires_grad_(kind is not None)
        if kind is not None:
            groups[kind].append(parameter)
    counts = {kind: sum(p.numel() for p in found) for kind, found in groups.items()}
    head = counts.pop("modules_to_save")
    lrs = {**rates, "modules_to_save": head_lr}
    return Attached(
        model, [{"params": found, "lr": lrs[kind]} for kind, found in groups.items()], sum(counts.values()), head
    )
