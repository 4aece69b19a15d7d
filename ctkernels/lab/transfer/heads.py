"""The linear head that every method trains, on a network or on frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._copying import copy_module
from ..images.features import HookPoint, find_hook_point, output_tensor, pool
from .config import TrainingConfig
from .folds import FoldLog


class Logits(nn.Module):
    """A network without a linear classifier, followed by a linear layer on its output, averaged over positions."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(pool(self.backbone(images)))


def with_head(model: nn.Module, example: Tensor, classes: int, seed: int = 0) -> tuple[nn.Module, str]:
    """A copy of ``model`` with a new linear layer for ``classes`` instead of its classifier, and the name of that layer.

    If the network does not end with a linear layer, one is added on its output, averaged over positions. The model must be in
    evaluation mode; ``example`` is a batch for it.
    """
    point = head_input(model, example)
    network = copy_module(model)
    with torch.no_grad():
        layer = network.get_submodule(point.layer)
        width = layer.in_features if isinstance(layer, nn.Linear) else pool(network(example)).shape[1]
    head = new_head(width, classes, seed).to(example.device)
    if point.layer:
        network.set_submodule(point.layer, head)
        return network, point.layer
    return Logits(network, head), "head"


def new_head(width: int, classes: int, seed: int) -> nn.Linear:
    """A linear layer whose initial weights depend only on ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, classes)


def head_input(model: nn.Module, example: Tensor) -> HookPoint:
    """The hook point of a new head: the input of the linear classifier, or the output of a network without one."""
    point = find_hook_point(model, example)
    linear = point.side == "input" and isinstance(model.get_submodule(point.layer), nn.Linear)
    return point if linear else HookPoint("", "output")


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """The logits (b, classes) of a network that returns them directly, in a tuple or dictionary, or as ``.logits``."""
    return output_tensor(network(images))


def fit_head(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    classes: int,
    *,
    lr: float,
    training: TrainingConfig,
    seed: int,
    others: Sequence[FoldLog] = (),
) -> FoldLog:
    """Trains a linear layer on frozen features (n, d) with the schedule of all methods, from the weights of :func:`with_head`.

    Returns:
        the log; its state is ``{"weight", "bias"}``.
    """
    generator = torch.Generator().manual_seed(seed)
    head = new_head(features.shape[1], classes, seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    steps = -(-len(features) // training.batch_size)
    log, step = FoldLog(others=others), 0
    for _ in range(training.epochs):
        total = 0.0
        for batch in torch.randperm(len(features), generator=generator).split(training.batch_size):
            optimizer.param_groups[0]["lr"] = lr * training.factor(step, steps)
            loss = functional.cross_entropy(head(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step, total = step + 1, total + float(loss.detach()) * len(batch)
        with torch.no_grad():
            logits = head(val_features)
            right = (logits.argmax(1) == val_labels).tolist()
            val_loss = float(functional.cross_entropy(logits, val_labels))
        metrics = {"train_loss": total / len(features), "loss": val_loss}
        log.add_scored(metrics, right, lambda: {name: value.clone() for name, value in head.state_dict().items()})
    return log
