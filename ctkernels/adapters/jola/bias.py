"""The biases that merging makes, in architectures that have none: the config switch that makes them survive saving."""

from __future__ import annotations

import copy
import warnings
from collections import ChainMap
from typing import Any

import torch
from torch import nn

from .._offload import offload_hook
from .runtimes import losses

# Config switches that give a bias-free architecture a bias in its attention output projection.
_SWITCHES: tuple[tuple[str, Any], ...] = (
    ("attention_out_bias", True),
    ("attention_bias", True),
    ("use_bias", True),
    ("bias", True),
    ("no_bias", False),
    ("add_bias_linear", True),
)


def config_parts(config: Any) -> dict[str, Any]:
    """A config and its parts (text, vision) by attribute name; the config itself is ""."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}}
    return {"": config} | {name: part for name, part in parts.items() if part is not None}


def bias_switch(model: nn.Module, sites: list[str]) -> tuple[str, str, Any, dict[str, torch.Size]] | None:
    """Find the config switch that gives the projections `sites` a bias in plain transformers.

    The architecture itself is asked: it is built on the meta device with each candidate switch.

    Returns:
        the part of the config that holds the switch ("" for the config itself), the switch, its value, and the shapes
        of all parameters it adds; None if no switch adds just these biases and others that can be zero.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "_from_config"):
        return None
    present = set(dict(model.named_parameters(remove_duplicate=False)))
    wanted = {f"{site}.bias" for site in sites}
    for part, own in config_parts(config).items():
        for name, value in _SWITCHES:
            if not hasattr(own, name) or getattr(own, name) == value:
                continue
            changed = copy.deepcopy(config)
            setattr(config_parts(changed)[part], name, value)
            with torch.device("meta"):
                twin = type(model)(changed)
            shapes = {key: parameter.shape for key, parameter in twin.named_parameters(remove_duplicate=False)}
            added = {key: shape for key, shape in shapes.items() if key not in present}
            if wanted | present <= set(shapes) and all(key.endswith(".bias") for key in added):
                return part, name, value, added
    return None


def hold_bias(model: nn.Module, sites: list[str], target: str | None = None) -> str | None:
    """Make a merged model's new biases survive `save_pretrained`: set the config switch, add zero biases beside them.

    Warns where a runtime is known to read the architecture without these biases.

    Args:
        model: a plain model whose projections `sites` got a bias they did not have.
        target: the runtime that the model is for; what others do is of no interest then.

    Returns:
        None when done, else the reason why the architecture, or the target, cannot hold them (nothing is changed then).
    """
    switch = bias_switch(model, sites)
    config: Any = getattr(model, "config", None)
    if switch is None:
        family = getattr(config, "model_type", type(model).__name__)
        return f"the architecture {family!r} has no bias in {sites[0]}, and no config switch for one"
    part, name, value, added = switch
    parts = config_parts(config)
    families = dict.fromkeys(getattr(p, "model_type", "") for p in (parts[part], config))
    problems = [loss for family in families for loss in losses(family, target)]
    if target is not None and problems:
        return problems[0].removesuffix(".")
    for key, shape in added.items():
        owner_name, _, leaf = key.rpartition(".")
        owner = model.get_submodule(owner_name)
        if getattr(owner, leaf, None) is None:
            weight: Any = next(iter(owner.parameters(recurse=False)))
            hook = offload_hook(owner)
            if hook is not None:
                hook.weights_map = ChainMap({leaf: torch.zeros(shape, dtype=weight.dtype)}, hook.weights_map)
            zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            setattr(owner, leaf, nn.Parameter(zeros, requires_grad=False))
    setattr(parts[part], name, value)
    for problem in problems:
        warnings.warn(problem, UserWarning, stacklevel=3)
    return None
