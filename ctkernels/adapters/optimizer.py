"""Optimizer parameter groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .jola.model import jola_layers
from .jola.units import has_units


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    curvature_lr: float = 0.1,
    lora_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups, with separate learning rates for each method's parameters.

    At JoLA's released rate of 5e-3 for everything, log alpha moves at most 1.25 in 500 steps, and no gate can reach zero. Its
    higher rate is part of its unit (`JolaConfig.gate_rate`); a group sets it only if `gate_lr` differs. The logits of beta
    and coeff train at a hundred times the rate of the head (Curvature Tuning, section 4.1).

    Args:
        model: a model with a JoLA, a curvature or a joint adapter.
        lr: rate of m, a and other trainable parameters. None: for m and a, 5e-2 in measured units (call `measure_units`
            first), else 5e-3, as in the released code; 1e-3 for other parameters.
        gate_lr: rate of log alpha, for optimizers whose steps do not depend on the size of gradients, such as Adam. None:
            `gate_rate * lr` (ten times `lr` by default), or `10 * lr` with an older adapter without a `gate_rate`.
        weight_decay: of m, a and other parameters; gates and curvatures have none. Default 0.
        curvature_lr: rate of the logits of beta and coeff. Default 0.1, as in the paper.
        lora_lr: rate of LoRA's matrices. None: 1e-3 if `lr` is None too, else `lr`.

    Returns:
        Groups for any torch optimizer, without empty ones.

    Examples:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=5e-3, gate_lr=5e-2), eps=1e-6)
    """
    units = _gate_units(model)
    by_group: dict[str, list[Tensor]] = {"jola_edits": [], "jola_gates": [], "curvature": [], "lora": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_group[_group(name)].append(parameter)
    others = 1e-3 if lr is None else lr
    if lr is None:
        jola = by_group["jola_edits"] or by_group["jola_gates"]
        lr = 5e-2 if jola and has_units(model) else 5e-3
    rates = {
        "jola_edits": lr,
        "curvature": curvature_lr,
        "lora": others if lora_lr is None else lora_lr,
        "rest": others,
    }
    groups: list[dict[str, Any]] = []
    for name, parameters in by_group.items():
        by_unit: dict[float, list[Tensor]] = {}
        for tensor in parameters:
            by_unit.setdefault(units.get(id(tensor), 1.0), []).append(tensor)
        for unit, tensors in by_unit.items():
            rate = _gate_rate(lr, gate_lr, unit) if name == "jola_gates" else rates[name]
            decay = 0.0 if name in ("jola_gates", "curvature") else weight_decay
            groups.append({"params": tensors, "lr": rate, "weight_decay": decay, "name": name})
    return groups


def _gate_rate(lr: float, gate_lr: float | None, unit: float) -> float:
    """The rate of a parameter that stores log alpha in a unit."""
    if gate_lr is None:
        return lr if unit != 1 else 10 * lr
    return gate_lr / unit


def _gate_units(model: nn.Module) -> dict[int, float]:
    """The units in which log alpha is stored, by parameter."""
    return {
        id(parameter): float(layer.jola_unit_log_alpha[name])
        for layer in jola_layers(model)
        for table in (layer.jola_log_alpha_m, layer.jola_log_alpha_a)
        for name, parameter in table.items()
    }


def _group(name: str) -> str:
    if ".curvature_raw_" in name:
        return "curvature"
    if ".jola_log_alpha_" in name:
        return "jola_gates"
    if ".lora_" in name:
        return "lora"
    return "jola_edits" if ".jola_" in name else "rest"
