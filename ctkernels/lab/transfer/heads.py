"""The linear layer that every method trains: put on a network, or fitted to frozen features."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..images.features import Tap, find_tap, output_tensor, pool


@dataclass(frozen=True)
class Budget:
    """What every method gets alike: Adam, the rate rising over the first epoch and a tenth after half of the epochs.

    Args:
        epochs: the one with the best validation accuracy is kept.
        batch_size: images per step, over all processes.

    Source: Curvature Tuning paper, appendix B. Unlike there, the linear probe keeps its best epoch too.
    """

    epochs: int = 20
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What the rates are multiplied by at ``step``, counted from 0."""
        epoch = step // steps_per_epoch
        return min(1.0, (step + 1) / steps_per_epoch) * (0.1 if epoch >= max(1, self.epochs / 2) else 1.0)


def rank(metrics: dict[str, float]) -> tuple[float, float]:
    """What makes one epoch better than another: validation accuracy, and of equals the loss."""
    return metrics["accuracy"], -metrics["loss"]


class Logits(nn.Module):
    """A linear layer on what a network without a linear classifier gives, averaged over all places."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(pool(self.backbone(images)))


def with_head(model: nn.Module, example: Tensor, classes: int, seed: int = 0) -> tuple[nn.Module, str]:
    """A copy of ``model`` with a new linear layer for ``classes`` in place of its classifier, and that layer's name.

    A network that does not end in a linear layer gets one on its output, averaged over all places.

    Args:
        model: in evaluation mode.
        example: a batch the network takes, on its device.
        seed: of the layer's initial weights.
    """
    tap = head_place(model, example)
    network = copy.deepcopy(model)
    with torch.no_grad():
        found = network.get_submodule(tap.layer)
        width = found.in_features if isinstance(found, nn.Linear) else pool(network(example)).shape[1]
    head = new_head(width, classes, seed).to(example.device)
    if tap.layer:
        network.set_submodule(tap.layer, head)
        return network, tap.layer
    return Logits(network, head), "head"


def new_head(width: int, classes: int, seed: int) -> nn.Linear:
    """A linear layer whose initial weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, classes)


def head_place(model: nn.Module, example: Tensor) -> Tap:
    """What a new head reads: the input of the linear classifier, or the output of a network without one."""
    tap = find_tap(model, example)
    linear = tap.side == "input" and isinstance(model.get_submodule(tap.layer), nn.Linear)
    return tap if linear else Tap("", "output")


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """(b, classes), from a network that gives them as they are or in a tuple, a dictionary, or ``.logits``."""
    return output_tensor(network(images))


@dataclass(frozen=True)
class Run:
    """What training gave: validation metrics of every epoch, the best epoch (from 1), what it trained."""

    epochs: list[dict[str, float]]
    best: int
    state: dict[str, Tensor]
    diverged: bool = False


def fit_head(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    classes: int,
    *,
    lr: float,
    budget: Budget,
    seed: int,
) -> Run:
    """Train a linear layer on frozen features as every other method trains its head.

    Args:
        features, val_features: float32 (n, d).
        labels, val_labels: int64 (n,).
        lr: of Adam.
        seed: of the initial weights (the same as :func:`with_head`'s) and of the order.

    Returns:
        :class:`Run`, whose state is ``{"weight", "bias"}``.
    """
    generator = torch.Generator().manual_seed(seed)
    head = new_head(features.shape[1], classes, seed)
    optimiser = torch.optim.Adam(head.parameters(), lr=lr)
    steps = -(-len(features) // budget.batch_size)
    epochs: list[dict[str, float]] = []
    best, state, step = 0, {}, 0
    for epoch in range(1, budget.epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(features), generator=generator).split(budget.batch_size):
            optimiser.param_groups[0]["lr"] = lr * budget.factor(step, steps)
            loss = functional.cross_entropy(head(features[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step, total = step + 1, total + float(loss.detach()) * len(batch)
        with torch.no_grad():
            logits = head(val_features)
            accuracy = float((logits.argmax(1) == val_labels).double().mean())
            loss_here = float(functional.cross_entropy(logits, val_labels))
        epochs.append({"train_loss": total / len(features), "loss": loss_here, "accuracy": accuracy})
        if not best or rank(epochs[-1]) > rank(epochs[best - 1]):
            best, state = epoch, {k: v.clone() for k, v in head.state_dict().items()}
    return Run(epochs, best, state)
