"""One training run with accelerate: validation after every epoch, the best epoch kept. Importing it needs accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from .._distributed import Group
from ..labelled import batches
from .config import TransferConfig
from .folds import FoldLog
from .heads import logits_of
from .state import batch_norms, ends_with_single, state_of, training_mode


def make_accelerator(precision: str = "no", cpu: bool = False) -> Accelerator:
    """An accelerator for the GPU of this process or the CPU. All processes share each batch."""
    return Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # torchvision's Swin passes the weights of some layers to a function, so their LoRA is never called
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def train(
    accelerator: Accelerator,
    network: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    examples: Dataset[Any],
    val: Dataset[Any],
    config: TransferConfig,
    seed: int,
    advance: Callable[[int], object] = lambda step: None,
    others: Sequence[FoldLog] = (),
) -> FoldLog:
    """Trains the parameters in ``groups``, each with its rate, by Adam on cross-entropy.

    Training ends early if the loss is not finite. ``others``: logs of the same run on other folds.
    """
    training, bn_train, workers = config.training, config.bn != "eval", config.workers
    size = training.batch_size
    single = bn_train and ends_with_single(examples, size)
    order = torch.Generator().manual_seed(seed)
    loader = batches(examples, size, workers, shuffle=True, generator=order, drop_last=single)
    optimizer = torch.optim.Adam([dict(group) for group in groups])
    rates = [group["lr"] for group in optimizer.param_groups]
    wrapped, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    log, step, diverged = FoldLog(others=others), 0, False
    while len(log.epochs) < training.epochs and not diverged:
        losses = []
        with training_mode(network, bn_train):
            for batch, labels in loader:
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * training.factor(step, len(loader))
                with accelerator.autocast():
                    loss = functional.cross_entropy(logits_of(wrapped, batch).float(), labels)
                losses.append(float(accelerator.reduce(loss.detach(), "mean")))
                diverged = not math.isfinite(losses[-1])
                if diverged:
                    break
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                advance(1)
        _broadcast_statistics(accelerator, network)
        right, val_loss = score(accelerator, network, val, size, workers)
        metrics = {"train_loss": sum(losses) / len(losses), "loss": val_loss}
        log.add_scored(
            metrics, right, lambda: {name: value.cpu() for name, value in state_of(network, bn_train).items()}
        )
    accelerator.free_memory(wrapped, optimizer, loader)
    log.details["diverged"] = diverged or any(other.details["diverged"] for other in others)
    return log


def _broadcast_statistics(accelerator: Accelerator, network: nn.Module) -> None:
    """Broadcasts the batch-normalisation statistics of rank 0, as each process saw only its part of the batches."""
    if accelerator.num_processes > 1:
        for module in batch_norms(network):
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)


def score(
    accelerator: Accelerator, network: nn.Module, data: Dataset[Any], batch_size: int, workers: int = 0
) -> tuple[list[bool], float]:
    """Whether each example is classified correctly, in order, and the mean loss. Processes share the examples."""
    group = Group(accelerator.process_index, accelerator.num_processes)
    count: int = len(data)  # type: ignore[arg-type]
    share = Subset(data, range(group.rank, count, group.size))
    scored: list[tuple[bool, float]] = []
    network.eval()
    with torch.inference_mode(), accelerator.autocast():
        for batch, labels in batches(share, batch_size, workers):
            logits = logits_of(network, batch.to(accelerator.device)).float()
            labels = labels.to(accelerator.device)
            losses = functional.cross_entropy(logits, labels, reduction="none")
            scored += zip((logits.argmax(1) == labels).tolist(), losses.tolist())
    scored = group.interleave(scored, count)
    return [right for right, _ in scored], sum(loss for _, loss in scored) / count
