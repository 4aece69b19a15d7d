"""Frozen features: hook points where they are read, and their extraction for several settings in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from .._distributed import Group
from ..labelled import collate_of


@dataclass(frozen=True)
class HookPoint:
    """Where features are read: the ``side`` ("input" or "output") of the submodule ``layer`` ("": the network)."""

    layer: str
    side: str

    def __str__(self) -> str:
        return f"{self.side} of {self.layer or 'the network'}"

    @contextmanager
    def capture(self, model: nn.Module, gradients: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yields a function from a batch (b, ...) to its features (b, d), float32.

        With ``gradients``, features are differentiable with respect to the batch.
        """
        captured: list[Any] = []
        module = model.get_submodule(self.layer)
        if self.side == "input":
            hook = module.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        else:
            hook = module.register_forward_hook(lambda _, args, output: captured.append(output))

        def features(batch: Tensor) -> Tensor:
            captured.clear()
            with nullcontext() if gradients else torch.inference_mode():
                model(batch)
            if not captured:
                raise ValueError(f"feature_layer {self.layer!r} is not used when the network runs")
            return pool(captured.pop()).float()

        try:
            yield features
        finally:
            hook.remove()


def find_hook_point(model: nn.Module, example: Tensor, feature_layer: str | None = None) -> HookPoint:
    """Chooses the hook point for features.

    It is the output of the submodule ``feature_layer``, if given. Else it is the input of the classifier:
    ``model.get_classifier()`` of timm's networks, otherwise the last ``nn.Linear`` that runs, if the network's output has
    its shape. Without a classifier it is the network's output. ``example`` is a batch for the network.

    Raises:
        ValueError: there is no submodule of that name; the message lists the names.
    """
    names = {module: name for name, module in model.named_modules()}
    if feature_layer is not None:
        if feature_layer not in names.values():
            raise ValueError(
                f"feature_layer must be one of {sorted(n for n in names.values() if n)}, got {feature_layer!r}"
            )
        return HookPoint(feature_layer, "output")
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    if isinstance(classifier, nn.Module) and classifier in names and not isinstance(classifier, nn.Identity):
        return HookPoint(names[classifier], "input")
    ran: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: ran.append((name, output.shape)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.inference_mode():
            output = output_tensor(model(example))
    finally:
        for hook in hooks:
            hook.remove()
    if ran and ran[-1][1] == output.shape:
        return HookPoint(ran[-1][0], "input")
    return HookPoint("", "output")


def output_tensor(value: Any) -> Tensor:
    """The tensor in the output of a network: itself, ``.logits``, or the first item of a tuple or a dictionary."""
    if isinstance(value, Tensor):
        return value
    if isinstance(getattr(value, "logits", None), Tensor):
        return value.logits
    items = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(items, Sequence) and items and isinstance(items[0], Tensor):
        return items[0]
    raise ValueError(f"the network must give a tensor, or a tuple or dictionary of tensors, got {type(value).__name__}")


def pool(value: Any) -> Tensor:
    """Averages (b, tokens, d) over tokens, and (b, d, ...) over positions, to (b, d)."""
    x = output_tensor(value)
    if x.dim() < 2:
        raise ValueError(f"features must have at least two dimensions, got the shape {tuple(x.shape)}")
    if x.dim() == 2:
        return x
    return x.mean(1) if x.dim() == 3 else x.flatten(2).mean(2)


def passes(samples: int, dim: int, settings: int, memory_limit: int) -> list[range]:
    """Divides ``settings`` among passes over the data whose float32 features (samples, dim) fit into ``memory_limit`` bytes.

    Each pass has at least one setting.
    """
    at_once = min(settings, max(1, memory_limit // (4 * samples * dim)))
    return [range(i, min(i + at_once, settings)) for i in range(0, settings, at_once)]


def extract(
    parts: Sequence[Dataset[Any]],
    networks: Sequence[Callable[[Tensor], Tensor]],
    dim: int,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    group: Group,
    advance: Callable[[int], object],
) -> Tensor:
    """Reads the data once and runs every network on every batch.

    Whole batches are distributed among the processes, so that batches do not depend on the number of processes.

    Returns:
        float32 (len(networks), n, dim) on the CPU of rank 0; empty, (len(networks), 0, dim), on other ranks.

    Raises:
        ValueError: an image has NaN or infinity; the message has its number.
    """
    data: ConcatDataset[Any] = ConcatDataset(parts)
    batches = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    most = max(map(len, batches), default=0)
    unlabelled = _Unlabelled(data)
    loader = iter(
        DataLoader(
            unlabelled,
            batch_sampler=batches[group.rank :: group.size],  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=unlabelled.collate,
        )
    )
    result = torch.empty(len(networks), len(data) if group.rank == 0 else 0, dim)
    for start in range(0, len(batches), group.size):
        block = torch.zeros(len(networks), most, dim, device=device)
        if start + group.rank < len(batches):
            images = next(loader)
            finite = images.isfinite().flatten(1).all(1)
            if not finite.all():
                number = batches[start + group.rank][int((~finite).nonzero()[0, 0])]
                raise ValueError(f"images must be finite, number {number} (counted over {len(parts)} parts) is not")
            images = images.to(device)
            for k, network in enumerate(networks):
                block[k, : len(images)] = network(images)
                advance(1)
        for rank, received in enumerate(group.gather(block)):
            if start + rank < len(batches):
                span = batches[start + rank]
                result[:, span.start : span.stop] = received[:, : len(span)].cpu()
    return result


class _Unlabelled(Dataset[Tensor]):
    """The examples of a data set without their labels: floating point in float32, or token numbers."""

    def __init__(self, data: ConcatDataset[Any]) -> None:
        self.data, self.collate_items = data, collate_of(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        example = torch.as_tensor(self.data[index][0])
        return example.float() if example.is_floating_point() else example

    def collate(self, examples: Sequence[Tensor]) -> Tensor:
        return self.collate_items([(example, 0) for example in examples])[0]
