"""Import of checkpoints of the official trainable Curvature Tuning code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from .layer import CurvatureLayer

NAME = re.compile(r"(?:^|\.)_raw_(beta|coeff)$")


def curvature_copies(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter: str | None
) -> list[tuple[Tensor, Tensor]]:
    """(parameter, value) for every tensor of an official checkpoint; copies nothing.

    The official code names a unit like the module it replaced, and has `relu1`, `relu2`, `relu3` in its bottleneck block,
    where torchvision calls one `relu` three times. Its values have as many dimensions as the input, all but one of size 1.
    """
    layers = {module.site: module for module in model.modules() if isinstance(module, CurvatureLayer)}
    if adapter is None:
        active = {name for layer in layers.values() for name in layer.active_adapters if name in layer.curvature_config}
        if len(active) != 1:
            raise ValueError(f"adapter: expected a name, as {len(active)} adapters are active, got None")
        (adapter,) = active
    filled: dict[int, str] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    for name, value in tensors.items():
        match = NAME.search(name)
        assert match is not None
        layer = _layer(layers, name[: match.start()])
        if layer is None or adapter not in layer.curvature_config:
            raise ValueError(f"{name}: adapter {adapter!r} has no site for it; its sites are {sorted(layers)[:5]}, ...")
        target = layer.parameters_of(adapter)[0 if match.group(1) == "beta" else 1]
        flat = value.flatten()
        if sum(size != 1 for size in value.shape) > 1 or flat.shape != target.shape:
            raise ValueError(
                f"{name}: expected {target.numel()} channels, got shape {tuple(value.shape)} (the official code takes "
                "dimension 1 of any 4-D input for the channels, which in a Swin is a row of the image)"
            )
        filled[id(target)] = name
        copies.append((target, flat))
    wanted = [layer for layer in layers.values() if adapter in layer.curvature_config]
    missing = [layer.site for layer in wanted if any(id(p) not in filled for p in layer.parameters_of(adapter))]
    if missing:
        raise ValueError(f"expected a checkpoint with every site of adapter {adapter!r}, got none for {missing[:5]}")
    return copies


def _layer(layers: dict[str, CurvatureLayer], name: str) -> CurvatureLayer | None:
    if name in layers:
        return layers[name]
    match = re.search(r"^(.*?)(\d+)$", name)
    if match is None:
        return None
    stem, number = match.groups()
    return layers.get(stem if number == "1" else f"{stem}#{number}")
