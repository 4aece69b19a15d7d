"""Selection of timm's models: for every module file and every first word of a name in it, the model with fewest parameters."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

import torch

MOST = 200_000_000  # parameters: 13 GB in float64, four times over
SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 384, 448, 512)


class Architecture(NamedTuple):
    """An architecture with ``arguments`` of ``timm.create_model``, including those for the small input."""

    name: str
    module: str
    parameters: int
    size: int
    arguments: dict[str, Any]


def families() -> dict[tuple[str, str], list[str]]:
    """{(module file, first word): names of its models}."""
    from timm.models import _registry, list_modules

    found: dict[tuple[str, str], list[str]] = {}
    for module in list_modules():
        for name in sorted(_registry._module_to_models[module]):
            word = re.match(r"[a-z]+", name)
            found.setdefault((module, word[0] if word else name), []).append(name)
    return found


def smallest(module: str, names: list[str]) -> Architecture:
    """The model with the fewest parameters, and the smallest square image that it accepts.

    Both are determined on the meta device. LookupError: no model can be built or accepts an image.
    """
    counts = []
    for name in names:
        try:
            counts.append((sum(p.numel() for p in build(name, {}, "meta").parameters()), name))
        except Exception as error:  # cannot be built on the meta device, or needs a download
            refused = error
    if not counts:
        raise LookupError(f"{module}: none of {names} can be built on the meta device: {refused}")
    count, name = min(counts)
    if count > MOST:
        raise LookupError(f"{name}: {count / 1e6:.0f} million parameters, at most {MOST / 1e6:.0f} fit")
    for size in SIZES:
        for arguments in ({}, {"img_size": size}):
            try:
                model = build(name, arguments, "meta").eval()
                with torch.no_grad():
                    model(torch.empty(2, 3, size, size, device="meta"))
            except Exception:  # too small, or not the size that the model was built for
                continue
            return Architecture(name, module, count, size, arguments)
    raise LookupError(f"{name}: takes no square image of {SIZES[0]} to {SIZES[-1]} values")


def build(name: str, arguments: dict[str, Any], device: str = "cpu") -> torch.nn.Module:
    import timm

    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        return timm.create_model(name, num_classes=10, **arguments)
