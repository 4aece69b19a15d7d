"""Serialisation of models with a merged curvature adapter, for :func:`ctkernels.save_pretrained`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ... import _marks
from ...steering.patch import apply_patches, revert_patches
from .layer import FixedUnit, Original
from .layout import Channels
from .model import child_name, refuse_plain_saving, scan_all

_LOGITS = ("raw_beta", "raw_coeff")


def describe(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The assignment of units to sites, and the units' values by "number.name".

    Raises:
        ValueError: a unit is not from a merged adapter.
    """
    units: dict[FixedUnit, int] = {}
    sites = []
    for module, key, unit in _sites(model):
        if not isinstance(unit, (FixedUnit, Original)):
            raise ValueError(
                f"model: expected a merged curvature adapter, got a {type(unit).__name__} in {module or 'the model'}; save an "
                "adapter that is not merged by its own save_pretrained, and call steer() on the whole model"
            )
        number = None if isinstance(unit, Original) else units.setdefault(unit, len(units))
        sites.append([module, key, number])
    records = [{"site": unit.site, "channels": unit.channels} for unit in units]
    values = {
        f"{number}.{name}": getattr(unit, name).detach().cpu() for unit, number in units.items() for name in _LOGITS
    }
    return {"sites": sites, "units": records}, values


def names(model: nn.Module) -> set[str]:
    """The names of the units' values in the model's ``state_dict``."""
    units = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, FixedUnit)]
    return {f"{name}.{logit}" for name in units for logit in _LOGITS}


def restore(model: nn.Module, saved: dict[str, Any], values: dict[str, Tensor], file: Path) -> None:
    """Restores the units described by :func:`describe` in a plain model.

    Raises:
        ValueError: the model has other activations; it is unchanged.
    """
    result = scan_all(model)
    apply_patches(result.swaps, result.edits)
    sites = {(module, key) for module, key, _ in _sites(model)}
    expected = {(module, key): number for module, key, number in saved["sites"]}
    if sites != set(expected):
        revert_patches([swap.module for swap in result.swaps], result.edits, result.copies)
        differing = sorted(module for module, _ in sites ^ set(expected))
        raise ValueError(f"base: expected the activations of {file}, got others: {', '.join(differing[:3])}")
    refuse_plain_saving(model)
    device = next((parameter.device for parameter in model.parameters()), None)
    units = []
    for number, unit in enumerate(saved["units"]):
        channels = None if unit["channels"] is None else Channels(*unit["channels"])
        beta, coeff = (values[f"{number}.{name}"] for name in _LOGITS)
        units.append(FixedUnit(beta, coeff, channels, unit["site"]).to(device))
    registered: set[int] = set()
    modules = dict(model.named_modules())
    for (name, key), number in expected.items():
        module: Any = modules[name]
        module._ctu[key] = Original() if number is None else units[number]
        if number is not None and number not in registered:
            module._modules[child_name(key)] = units[number]
            registered.add(number)


def _sites(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(module, key, unit) of every site, in order."""
    for name, module in model.named_modules():
        for key, unit in vars(module).get(_marks.UNITS, {}).items():
            yield name, key, unit
