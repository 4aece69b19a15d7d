"""Arguments with images: pairs of tensors, data sets or fractions, checked before any long work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from ..._devices import existing_device
from ..labelled import check_classes, check_finite, labels_of, stratified_split

Images = Dataset[Any] | tuple[Tensor, Tensor]


def split(
    train: Images, val: Images | float, test: Images | float, seed: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Training, validation and test data by name, and the fractions that were cut off ``train``."""
    parts = {name: _dataset(data, name) for name, data in (("train", train), ("val", val), ("test", test))}
    fractions = {name: float(data) for name, data in parts.items() if isinstance(data, (int, float))}
    if "train" in fractions:
        raise ValueError(f"train must be a data set or a pair of tensors, got {train!r}")
    if fractions:
        labels = labels_of(parts["train"], "train")
        check_classes(labels, "train")
        rest, *cut = stratified_split(labels, list(fractions.values()), seed, "train")
        for name, part in zip(fractions, cut):
            parts[name] = Subset(parts["train"], part.tolist())
        parts["train"] = Subset(parts["train"], rest.tolist())
    return parts, fractions


def _dataset(data: Any, name: str) -> Any:
    if not isinstance(data, tuple):
        sized = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str)
        if not isinstance(data, (int, float)) and not sized:
            raise ValueError(
                f"{name} must be a data set with a length, a pair of tensors or a fraction, got {type(data).__name__}"
            )
        return data
    if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        raise ValueError(f"{name} must be a pair of tensors (images, labels), got a tuple of {len(data)}")
    images, labels = data
    if len(images) != len(labels):
        raise ValueError(f"{name}: expected as many images as labels, got {len(images)} and {len(labels)}")
    if not images.is_floating_point():
        raise ValueError(f"{name}: images must be floating point, ready for the network, got {images.dtype}")
    check_finite(images, f"{name}: images")
    return TensorDataset(images, labels)


def check_labels(images: dict[str, Any]) -> dict[str, Tensor]:
    """The labels of each data set. ValueError for fewer than two classes, or a class without training images."""
    labels = {name: labels_of(data, name) for name, data in images.items()}
    check_classes(labels["train"], "train")
    known = set(labels["train"].tolist())
    for name, values in labels.items():
        if not len(values):
            raise ValueError(f"{name} must have images, got none")
        if values.min() < 0:
            raise ValueError(f"{name}: labels must not be negative, got {int(values.min())}")
        if unknown := sorted(set(values.tolist()) - known):
            raise ValueError(f"{name} has classes {unknown} that train does not have")
    return labels


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """``device``, or the device of the model for None. ValueError if this machine does not have it."""
    if device is None:
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    return existing_device(device)


def example_of(data: Any, device: torch.device) -> Tensor:
    """The first training image as a batch of one."""
    image = data[0][0]
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"train: images must be floating point tensors, ready for the network, got {kind}")
    return image[None].float().to(device)
