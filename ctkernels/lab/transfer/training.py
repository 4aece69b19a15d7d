"""One training run on accelerate: validation after every epoch, the best epoch kept. Importing it needs accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from .heads import Budget, Run, logits_of, rank
from .state import batch_norms, state_of, training_mode

PRECISIONS = ("no", "bf16", "fp16")
LARGE = 1e9  # stands for a loss that is not finite: JSON has no infinity


def make_accelerator(precision: str = "no", cpu: bool = False) -> Accelerator:
    """Where training runs: this process's GPU, or the CPU. A step's batch is dealt to all processes."""
    return Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # torchvision's Swin passes weights to a function, so that LoRA on those layers never acts
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def train(
    accelerator: Accelerator,
    network: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    images: Dataset[Any],
    val: Dataset[Any],
    *,
    budget: Budget,
    seed: int,
    bn_train: bool,
    workers: int = 0,
    advance: Callable[[int], object] = lambda step: None,
) -> Run:
    """Train the parameters in ``groups`` (with their rates) with Adam on cross-entropy.

    Returns:
        :class:`Run`, with the trained state of the best epoch. Training ends early where the loss is not finite.
    """
    # a batch of one image has no batch statistics
    alone = bn_train and len(images) > budget.batch_size and len(images) % budget.batch_size == 1  # type: ignore[arg-type]
    loader = DataLoader(
        images,
        budget.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        drop_last=alone,
    )
    optimiser = torch.optim.Adam([dict(group) for group in groups])
    rates = [group["lr"] for group in optimiser.param_groups]
    wrapped, optimiser, loader = accelerator.prepare(network, optimiser, loader)
    epochs: list[dict[str, float]] = []
    best, state, step, diverged = 0, state_of(network, bn_train), 0, False
    for epoch in range(1, budget.epochs + 1):
        losses = []
        with training_mode(network, bn_train):
            for batch, labels in loader:
                for group, rate in zip(optimiser.param_groups, rates):
                    group["lr"] = rate * budget.factor(step, len(loader))
                with accelerator.autocast():
                    loss = functional.cross_entropy(logits_of(wrapped, batch).float(), labels)
                losses.append(float(accelerator.reduce(loss.detach(), "mean")))
                diverged = not math.isfinite(losses[-1])
                if diverged:
                    break
                accelerator.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
                step += 1
                advance(1)
        _same_statistics(accelerator, network)
        right, loss_here = score(accelerator, network, val, budget.batch_size, workers)
        found = {"train_loss": sum(losses) / len(losses), "loss": loss_here, "accuracy": sum(right) / len(right)}
        epochs.append({k: v if math.isfinite(v) else LARGE for k, v in found.items()})
        if not best or rank(epochs[-1]) > rank(epochs[best - 1]):
            best, state = epoch, state_of(network, bn_train)
        if diverged:
            break
    accelerator.free_memory(wrapped, optimiser, loader)
    return Run(epochs, best, {name: value.cpu() for name, value in state.items()}, diverged)


def _same_statistics(accelerator: Accelerator, network: nn.Module) -> None:
    """Rank 0's statistics everywhere, as every process has seen its own share of the batches."""
    if accelerator.num_processes > 1:
        for module in batch_norms(network):
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)


def score(
    accelerator: Accelerator, network: nn.Module, data: Dataset[Any], batch_size: int, workers: int = 0
) -> tuple[list[bool], float]:
    """Whether each image was classified rightly, in order, and the mean loss; every process does its share."""
    count: int = len(data)  # type: ignore[arg-type]
    share = Subset(data, range(accelerator.process_index, count, accelerator.num_processes))
    found: list[tuple[bool, float]] = []
    network.eval()
    with torch.inference_mode(), accelerator.autocast():
        for batch, labels in DataLoader(share, batch_size, num_workers=workers):
            logits = logits_of(network, batch.to(accelerator.device)).float()
            labels = labels.to(accelerator.device)
            losses = functional.cross_entropy(logits, labels, reduction="none")
            found += zip((logits.argmax(1) == labels).tolist(), losses.tolist())
    if accelerator.num_processes > 1:
        boxes: list[Any] = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(boxes, found)
        found = [boxes[i % len(boxes)][i // len(boxes)] for i in range(count)]
    return [right for right, _ in found], sum(loss for _, loss in found) / count
