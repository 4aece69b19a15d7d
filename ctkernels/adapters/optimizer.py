"""What an optimizer gets of a model with adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .jola.model import jola_layers


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    gate_lr: float | None = None,
    weight_decay: float = 0.0,
    curvature_lr: float = 0.1,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups: gates and curvatures apart, with rates of their own and no weight decay.

    With JoLA's released rate of 5e-3 for everything, log alpha moves at most 1.25 in 500 steps and no gate can reach
    zero; gates therefore get their own rate. The logits of beta and coeff are trained at a hundred times the rate of
    the head (Curvature Tuning, section 4.1).

    Args:
        model: a model with a JoLA or a curvature adapter.
        lr: rate of m, a and other trainable parameters. None: 5e-3 with a JoLA adapter, else 1e-3, as in the papers.
        gate_lr: rate of log alpha; None takes `10 * lr`.
        weight_decay: for m, a and the others. Default 0.
        curvature_lr: rate of the logits of beta and coeff. Default 0.1, as in the paper.

    Returns:
        groups for any torch optimizer; empty groups are left out.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=5e-3, gate_lr=5e-2), eps=1e-6)
    """
    units = _gate_units(model)
    found: dict[str, list[Tensor]] = {"jola_edits": [], "jola_gates": [], "curvature": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[_group(name)].append(parameter)
    if lr is None:
        lr = 5e-3 if found["jola_edits"] or found["jola_gates"] else 1e-3
    rates = {"jola_gates": 10 * lr if gate_lr is None else gate_lr, "curvature": curvature_lr}
    groups: list[dict[str, Any]] = []
    for name, parameters in found.items():
        by_unit: dict[float, list[Tensor]] = {}
        for parameter in parameters:
            by_unit.setdefault(units.get(parameter, 1.0), []).append(parameter)
        groups += [
            {"params": some, "lr": rates.get(name, lr) / unit, "weight_decay": 0.0 if name in rates else weight_decay}
            | {"name": name}
            for unit, some in by_unit.items()
        ]
    return groups


def _gate_units(model: nn.Module) -> dict[Tensor, float]:
    """The units in which log alpha is stored, by parameter."""
    return {
        parameter: float(layer.jola_unit_log_alpha[name])
        for layer in jola_layers(model)
        for table in (layer.jola_log_alpha_m, layer.jola_log_alpha_a)
        for name, parameter in table.items()
    }


def _group(name: str) -> str:
    if ".curvature_raw_" in name:
        return "curvature"
    if ".jola_log_alpha_" in name:
        return "jola_gates"
    return "jola_edits" if ".jola_" in name else "rest"
