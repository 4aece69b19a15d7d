"""Folding edits into the projection, and saving the result for plain transformers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._files import replacing_folder

# Config switches that give a bias-free architecture a bias in its attention output projection.
_BIAS_SWITCHES: tuple[tuple[str, Any], ...] = (
    ("attention_out_bias", True),
    ("attention_bias", True),
    ("use_bias", True),
    ("bias", True),
    ("no_bias", False),
    ("add_bias_linear", True),
)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mergeable(base: Any, site: str) -> None:
    """Check that edits can be folded into a projection.

    Raises:
        ValueError: its weight is quantised, or sharded over ranks.
    """
    weight = getattr(base, "weight", None)
    data = weight.data if isinstance(weight, Tensor) else None
    if type(weight) is nn.Parameter and type(data) is Tensor and data.dtype in _FLOATS:
        return
    if hasattr(weight, "device_mesh"):
        raise ValueError(f"{site}: cannot merge into a weight that is sharded over ranks; merge in one process")
    kind = type(weight).__name__ if type(weight) is not nn.Parameter else type(data).__name__
    dtype = getattr(weight, "dtype", None)
    raise ValueError(
        f"{site}: cannot merge into a quantised {type(base).__name__} (weight {kind}, {dtype}): scaling its columns "
        "would mean quantising again, with another result. Keep the adapter unmerged, or load the base model without "
        "quantisation and merge there."
    )


def folded(base: nn.Module, weight: Tensor, bias: Tensor | None, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """`W diag(p)` and `b + W q` for a Linear (out, in) or a Conv1D (in, out).

    Computed in the dtype of p, returned in that of `weight`. With no bias and q zero the bias stays None.
    """
    wide = weight.detach().to(p.dtype)
    if type(base).__name__ == "Conv1D":
        new_weight, offset = wide * p[:, None], q @ wide
    else:
        new_weight, offset = wide * p, wide @ q
    new_bias: Tensor | None = None
    if bias is not None:
        new_bias = (bias.detach().to(p.dtype) + offset).to(bias.dtype)
    elif bool(q.any()):
        new_bias = offset.to(weight.dtype)
    return new_weight.to(weight.dtype), new_bias


def _configs(config: Any) -> dict[str, Any]:
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
    for part, own in _configs(config).items():
        for name, value in _BIAS_SWITCHES:
            if not hasattr(own, name) or getattr(own, name) == value:
                continue
            changed = copy.deepcopy(config)
            setattr(_configs(changed)[part], name, value)
            with torch.device("meta"):
                twin = type(model)(changed)
            shapes = {key: parameter.shape for key, parameter in twin.named_parameters(remove_duplicate=False)}
            added = {key: shape for key, shape in shapes.items() if key not in present}
            if wanted | present <= set(shapes) and all(key.endswith(".bias") for key in added):
                return part, name, value, added
    return None


def hold_bias(model: nn.Module, sites: list[str]) -> str | None:
    """Make a merged model's new biases survive `save_pretrained`: set the config switch, add zero biases beside them.

    Args:
        model: a plain model whose projections `sites` got a bias they did not have.

    Returns:
        None when done, else the reason why the architecture cannot hold them (nothing is changed then).
    """
    switch = bias_switch(model, sites)
    if switch is None:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        return f"the architecture {family!r} has no bias in {sites[0]}, and no config switch for one"
    part, name, value, added = switch
    for key, shape in added.items():
        owner_name, _, leaf = key.rpartition(".")
        owner = model.get_submodule(owner_name)
        if getattr(owner, leaf, None) is None:
            weight: Any = next(iter(owner.parameters(recurse=False)))
            zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            setattr(owner, leaf, nn.Parameter(zeros, requires_grad=False))
    setattr(_configs(model.config)[part], name, value)
    return None


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Merge the model and take peft's wrappers out of it; everything is put back afterwards, bit for bit."""
    from peft.utils.other import ModulesToSaveWrapper

    from .jola.layer import JolaLayer

    wrappers: list[tuple[nn.Module, str, Any]] = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if isinstance(child, (JolaLayer, ModulesToSaveWrapper)) and not isinstance(owner, JolaLayer)
    ]
    layers = {id(child): child for _, _, child in wrappers if isinstance(child, JolaLayer)}.values()
    for layer in layers:
        if layer.merged:
            raise ValueError(f"{layer.site}: save_merged needs unmerged adapters, got {layer.merged_adapters} merged")
        mergeable(layer.get_base_layer(), layer.site)
    config: Any = getattr(model, "config", None)
    settings = [(part, dict(part.__dict__)) for part in _configs(config).values()] if config is not None else []
    empty = [(owner, key) for owner in model.modules() for key, value in owner._parameters.items() if value is None]
    hooked = model.__dict__.pop("peft_config", None)
    try:
        for layer in layers:
            layer.merge()
        for owner, name, child in wrappers:
            if isinstance(child, JolaLayer):
                setattr(owner, name, child.get_base_layer())
            else:
                setattr(owner, name, child.modules_to_save[child.active_adapters[0]])
        unbiased = [layer.site for layer in layers if not layer.had_bias()]
        created = [site for site in unbiased if model.get_submodule(site).bias is not None]
        problem = hold_bias(model, created) if created else None
        if problem:
            raise ValueError(
                f"Cannot save a merged model: {problem}. Save the adapter instead, or train with edit='multiplicative'."
            )
        yield
    finally:
        for owner, name, child in wrappers:
            setattr(owner, name, child)
        for layer in layers:
            layer.unmerge()
        for owner, key in empty:
            owner._parameters[key] = None
        for part, values in settings:
            part.__dict__.clear()
            part.__dict__.update(values)
        if hooked is not None:
            model.__dict__["peft_config"] = hooked


def save_merged(model: Any, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a model with its active JoLA adapters folded in, for plain transformers; the model itself is unchanged.

    The multiplicative edit always fits. The additive one needs a bias in the projection: where the architecture has
    none but a config switch for it (`attention_bias` of Llama and others), the switch is set and the biases that come
    with it are zero.

    Args:
        model: a `PeftModel` with JoLA adapters, or a model with JoLA layers, not merged.
        path: folder to write to; its files are replaced only when all new ones are complete.
        kwargs: passed to `save_pretrained`.

    Raises:
        ValueError: the architecture cannot hold the bias, the base is quantised or sharded, or adapters are merged.

    Example:
        >>> save_merged(model, "merged")
        >>> plain = AutoModelForCausalLM.from_pretrained("merged")
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _plain(base), replacing_folder(path) as folder:
        base.save_pretrained(folder, **kwargs)
