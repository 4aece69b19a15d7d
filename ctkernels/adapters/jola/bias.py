"""Biases created by merging, in architectures without them: the config switch with which they survive saving."""

from __future__ import annotations

import copy
import warnings
from collections import ChainMap
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .._offload import offload_hook
from .runtimes import losses

# Config switches that add biases to an architecture's attention, its MLPs, or both.
_SWITCHES: tuple[tuple[str, Any], ...] = (
    ("attention_out_bias", True),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("use_qkv_bias", True),
    ("use_bias", True),
    ("bias", True),
    ("no_bias", False),
    ("add_bias_linear", True),
)


class Switch(NamedTuple):
    """A config switch: the sub-config that has it ("" for the config itself), its name and the value to set.

    `added` maps the parameters that it adds to the architecture to their shapes.
    """

    part: str
    name: str
    value: Any
    added: dict[str, torch.Size]


def config_parts(config: Any) -> dict[str, Any]:
    """A config and its sub-configs (text, vision) by attribute name; the config itself is ""."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}}
    return {"": config} | {name: part for name, part in parts.items() if part is not None}


def families(model: nn.Module) -> list[str]:
    """The model types of a model's config and its sub-configs."""
    config = getattr(model, "config", None)
    if config is None:
        return []
    return list(dict.fromkeys(str(getattr(part, "model_type", "")) for part in config_parts(config).values()))


def bias_switch(model: nn.Module, biases: Iterable[str]) -> Switch | None:
    """Find the config switch that adds these biases in plain transformers.

    The architecture is built on the meta device with each candidate switch.

    Args:
        model: a plain model.
        biases: parameter names, such as "model.layers.0.self_attn.o_proj.bias".

    Returns:
        None if no switch adds these biases, and otherwise only biases.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "_from_config"):
        return None
    present = set(dict(model.named_parameters(remove_duplicate=False)))
    new = set(biases)
    for part, subconfig in config_parts(config).items():
        for name, value in _SWITCHES:
            if not hasattr(subconfig, name) or getattr(subconfig, name) == value:
                continue
            changed = copy.deepcopy(config)
            setattr(config_parts(changed)[part], name, value)
            with torch.device("meta"):
                candidate = type(model)(changed)
            shapes = {key: parameter.shape for key, parameter in candidate.named_parameters(remove_duplicate=False)}
            added = {key: shape for key, shape in shapes.items() if key not in present - new}
            if new | present <= set(shapes) and all(key.endswith(".bias") for key in added):
                return Switch(part, name, value, added)
    return None


def switch_on(model: nn.Module, switch: Switch) -> list[str]:
    """Set a switch in a model's config and add the missing biases to the model, as zeros.

    Returns:
        the names of the added biases.
    """
    zeros = []
    for key, shape in switch.added.items():
        owner_name, _, leaf = key.rpartition(".")
        owner = model.get_submodule(owner_name)
        if getattr(owner, leaf, None) is None:
            zeros.append(key)
            weight: Any = next(iter(owner.parameters(recurse=False)))
            dtype = weight.dtype if weight.is_floating_point() else getattr(model, "dtype", torch.float32)
            hook = offload_hook(owner)
            if hook is not None:
                hook.weights_map = ChainMap({leaf: torch.zeros(shape, dtype=dtype)}, hook.weights_map)
            bias = torch.zeros(shape, dtype=dtype, device=weight.device)
            setattr(owner, leaf, nn.Parameter(bias, requires_grad=False))
    setattr(config_parts(model.config)[switch.part], switch.name, switch.value)
    return zeros


def hold_bias(model: nn.Module, sites: list[str], projection: str = "output") -> str | None:
    """Make a merged model's new biases survive `save_pretrained`: set the config switch, add the other biases as zeros.

    Warns if a runtime may ignore these biases.

    Args:
        model: a plain model.
        sites: the projections with a new bias.
        projection: their kind: "output" (of an attention) or "mlp" (the last one of an MLP).

    Returns:
        None on success, else the reason why the architecture cannot have them (nothing is changed then).
    """
    switch = bias_switch(model, [f"{site}.bias" for site in sites])
    if switch is None:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        return f"the architecture {family!r} has no bias in {sites[0]}, and no config switch for one"
    switch_on(model, switch)
    for family in families(model):
        for problem in losses(family, projection):
            warnings.warn(problem, UserWarning, stacklevel=3)
    return None
