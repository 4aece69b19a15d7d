"""What :func:`search_beta` is given, checked before any long work starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from .._devices import existing_device
from .images.sets import check_classes, labels_of, stratified_split

DEFAULT_BETAS = tuple(round(0.70 + 0.01 * i, 2) for i in range(31))
MEAN_FREE = "mean-free"
Images = Dataset[Any] | tuple[Tensor, Tensor]


def check_betas(betas: Iterable[float] | None) -> set[float]:
    grid = {float(b) for b in (DEFAULT_BETAS if betas is None else betas)}
    if not grid:
        raise ValueError("betas must hold at least one value, got none")
    if bad := sorted(b for b in grid if not 0 <= b <= 1):
        raise ValueError(f"betas must be in [0, 1], got {bad}")
    return grid


def coeff_at(coeff: float | str, beta: float) -> float:
    """``coeff`` itself, or for ``"mean-free"`` the coefficient at which a unit of ``beta`` has no mean shift.

    The integral of (unit - ReLU) over all x is (pi^2 / 6) s^2 ((1 - c) - c / beta^2), s = 1 - beta. It is zero at
    c = beta^2 / (1 + beta^2): 0.5 near beta = 1, 0.448 at 0.9, 0.329 at 0.7. At c = 0.5 it is negative for beta < 1.

    Example:
        >>> coeff_at("mean-free", 1.0)
        0.5
    """
    return beta**2 / (1 + beta**2) if isinstance(coeff, str) else coeff


def check_numbers(*, coeff: float | str, batch_size: int, workers: int, memory_limit: int) -> None:
    if coeff != MEAN_FREE and (isinstance(coeff, str) or not 0 <= coeff <= 1):
        raise ValueError(f"coeff must be in [0, 1], got {coeff!r}; or be {MEAN_FREE!r}")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("memory_limit", memory_limit, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def split(
    train: Images, val: Images | float, test: Images | float, seed: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """The three data sets, and the fractions that were cut off ``train`` by name."""
    given = {name: _dataset(data, name) for name, data in (("train", train), ("val", val), ("test", test))}
    fractions = {name: float(data) for name, data in given.items() if isinstance(data, (int, float))}
    if "train" in fractions:
        raise ValueError(f"train must be a data set or a pair of tensors, got {train!r}")
    if fractions:
        labels = labels_of(given["train"], "train")
        check_classes(labels, "train")
        rest, *parts = stratified_split(labels, list(fractions.values()), seed, "train")
        for name, part in zip(fractions, parts):
            given[name] = Subset(given["train"], part.tolist())
        given["train"] = Subset(given["train"], rest.tolist())
    return given, fractions


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
    if bad := int((~images.flatten(1).isfinite().all(1)).sum()):
        raise ValueError(f"{name}: images must be finite, {bad} of {len(images)} have NaN or infinity")
    return TensorDataset(images, labels)


def check_labels(images: dict[str, Any]) -> dict[str, Tensor]:
    """The labels of each data set. At least two classes to learn, and none to predict that was not learnt."""
    labels = {name: labels_of(data, name) for name, data in images.items()}
    check_classes(labels["train"], "train")
    known = set(labels["train"].tolist())
    for name, found in labels.items():
        if not len(found):
            raise ValueError(f"{name} must have images, got none")
        if found.min() < 0:
            raise ValueError(f"{name}: labels must not be negative, got {int(found.min())}")
        if unknown := sorted(set(found.tolist()) - known):
            raise ValueError(f"{name} has classes {unknown} that train does not have")
    return labels


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """``device``, or where the model is. ValueError if there is no such device here."""
    if device is None:
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    return existing_device(device)


def example_of(data: Any, place: torch.device) -> Tensor:
    """The first training image as a batch of one."""
    image = data[0][0]
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"train: images must be floating point tensors, ready for the network, got {kind}")
    return image[None].float().to(place)
