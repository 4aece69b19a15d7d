"""The methods of the transfer comparison, and the settings to try for each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...steering.activations import RELU_FAMILY
from .. import experiment
from ..experiment import Setting
from ..images.backbone import MEAN_FREE

HEAD_LR = 1e-3
NAMES = "linear, sct, sct-mean-free, tct, lora-rN or tct+lora-rN"


@dataclass(frozen=True)
class Attached:
    """A network with a method attached.

    Attributes:
        network: frozen except for the parameters of the method and the head.
        groups: parameter groups with their rates.
        parameters: number of trained values outside the head.
        head: number of values in the head.
    """

    network: nn.Module
    groups: list[dict[str, Any]]
    parameters: int
    head: int


@dataclass(frozen=True)
class Method(experiment.Method):
    """A method of the comparison.

    ``attach`` takes a network with a new head, the name of the head, a setting, the kinds of activation to treat (None: the
    default) and an example batch, and returns an :class:`Attached`. Methods without it leave the network unchanged: S-CT
    with coefficient ``coeff``, and the linear probe, whose ``coeff`` is None.
    """

    coeff: float | str | None = None


def method(name: str) -> Method:
    """The method of a name: ``linear``, ``sct``, ``sct-mean-free``, ``tct``, ``lora-rN`` or ``tct+lora-rN`` of any rank N.

    Raises:
        ValueError: there is no method of that name.
    """
    head = {"head_lr": (HEAD_LR,)}
    if name == "linear":
        return Method(name, "a linear probe", head)
    if name in ("sct", "sct-mean-free"):
        return Method(name, "the best of many fixed betas", head, coeff=0.5 if name == "sct" else MEAN_FREE)
    # lr is the rate of the curvature if it is trained; LoRA alone has one rate for adapter and head, as in the paper
    curvature = {"lr": (0.1,), **head}
    if name == "tct":
        return Method(name, "learned curvature", curvature, _tct, ("beta", "coeff"), nonnegative=("coeff",))
    match = re.fullmatch(r"(tct\+)?lora-r([1-9]\d*)", name)
    if match is None:
        raise ValueError(f"methods must be {NAMES}, got {name!r}")
    rank = int(match[2])
    if match[1]:
        optional, attach = ("beta", "coeff", "scale"), partial(_tct, rank=rank)
        grid = {**curvature, "lora_lr": (1e-4,)}
        return Method(name, "learned curvature and LoRA", grid, attach, optional, nonnegative=("coeff",))
    return Method(name, "LoRA", {"lr": (1e-4,)}, partial(_lora, rank=rank), ("head_lr", "scale"))


def lora_targets(network: nn.Module, head: str, rank: int) -> tuple[list[str], list[str]]:
    """The names of the convolutions and linear layers that LoRA of ``rank`` supports, and of those that it does not.

    peft has no LoRA for dilated convolutions, nor for grouped ones whose number of groups does not divide the rank.
    """
    supported: list[str] = []
    unsupported: list[str] = []
    for name, module in network.named_modules():
        if name == head:
            continue
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            fits = rank % module.groups == 0 and set(module.dilation) == {1}
            (supported if fits else unsupported).append(name)
        elif isinstance(module, nn.Linear):
            supported.append(name)
    return supported, unsupported


def _lora_config(network: nn.Module, head: str, setting: Setting, rank: int, **more: Any) -> Any:
    import peft

    targets, _ = lora_targets(network, head, rank)
    if not targets:
        raise ValueError(f"lora-r{rank}: {type(network).__name__} has no convolution or linear layer that it fits")
    alpha: Any = rank * float(setting.get("scale", 1.0))  # peft annotates it as int, but takes any number
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more)


def _lora(
    network: nn.Module, head: str, setting: Setting, kinds: Sequence[str] | None, example: Tensor, rank: int
) -> Attached:
    import peft

    config = _lora_config(network, head, setting, rank, modules_to_save=[head])
    rate = float(setting["lr"])
    return _attached(peft.get_peft_model(network, config), {"lora_": rate}, float(setting.get("head_lr", rate)))


def _tct(
    network: nn.Module, head: str, setting: Setting, kinds: Sequence[str] | None, example: Tensor, rank: int = 0
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
        # token numbers need no shape: the adapter finds the network's embedding
        input_shape=tuple(example.shape[1:]) if example.is_floating_point() else None,
        modules_to_save=[head],
    )
    with warnings.catch_warnings():
        for text in ("You are trying to modify a model with PEFT for a second time", "Already found a `peft_config`"):
            warnings.filterwarnings("ignore", text)  # two adapters on one model are intended here
        adapted = peft.get_peft_model(model, config)
    return _attached(adapted, rates, float(setting["head_lr"]))


def _number(setting: Setting, name: str) -> float | None:
    return float(setting[name]) if name in setting else None


def _attached(model: Any, rates: Mapping[str, float], head_lr: float) -> Attached:
    """Unfreezes the head and the parameters whose names contain a key of ``rates``; freezes all others."""
    groups: dict[str, list[torch.nn.Parameter]] = {kind: [] for kind in (*rates, "modules_to_save")}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in groups if kind in name), None)
        parameter.requires_grad_(kind is not None)
        if kind is not None:
            groups[kind].append(parameter)
    counts = {kind: sum(p.numel() for p in parameters) for kind, parameters in groups.items()}
    head = counts.pop("modules_to_save")
    lrs = {**rates, "modules_to_save": head_lr}
    trained = [{"params": parameters, "lr": lrs[kind]} for kind, parameters in groups.items()]
    return Attached(model, trained, sum(counts.values()), head)
