"""How many numbers an adapter has, and how many of them are behind open gates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .jola.model import jola_layers


class ParameterCount(NamedTuple):
    """Numbers of a model; printing it shows them as peft's `print_trainable_parameters` does.

    Attributes:
        trainable: that get a gradient.
        behind_closed_gates: of those, m, a and log alpha of JoLA's heads whose gate is closed; `drop_closed_heads` removes
            them.
        total: all, those of the base model included.
    """

    trainable: int
    behind_closed_gates: int
    total: int

    @property
    def effective(self) -> int:
        """Trainable numbers that change what the model computes in evaluation."""
        return self.trainable - self.behind_closed_gates

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || effective: {self.effective:,} || all params: {self.total:,} || "
            f"effective%: {100 * self.effective / self.total:.4f}"
        )


@torch.no_grad()
def count_parameters(model: nn.Module) -> ParameterCount:
    """Count a model's parameters, those behind JoLA's closed gates apart.

    peft's `print_trainable_parameters` counts what gets a gradient: a head whose gate the penalty has closed still counts there.
    Here an adapter is as large as `drop_closed_heads` would make it.

    Args:
        model: any model, with or without adapters.

    Examples:
        >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
        >>> print(count_parameters(model))
        trainable params: 144 || effective: 144 || ...
    """
    counter: Any = getattr(model, "get_nb_trainable_parameters", None)
    if counter is not None:
        trainable, total = counter()  # knows what quantised parameters hold
    else:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        trainable, total = sum(size for size, flag in sizes if flag), sum(size for size, _ in sizes)
    closed = 0
    for layer in jola_layers(model):
        for name in layer.jola_config:
            for kind, gates in layer.gates(name, training=False).items():
                tables = (layer._of(kind)[name], layer._log_alpha(kind)[name])
                rows = int((gates == 0).sum()) // layer.shared(kind, name)
                closed += sum(rows * (table.numel() // len(table)) for table in tables if table.requires_grad)
    return ParameterCount(trainable, closed, total)
