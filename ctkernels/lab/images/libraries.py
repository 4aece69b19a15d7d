"""Data sets of installed libraries: scikit-learn's digits, and torchvision's classes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._extras import require
from ..labelled import Splits, check_classes, labels_of
from .sets import ImageSet, UnreadableImage, decoded


def digits() -> Splits:
    """Handwritten digits, 1,797 images of 8 x 8, that come with scikit-learn. Only training images.

    Source: Alpaydin and Kaynak 1998, the test part of the UCI set (CC BY 4.0).
    """
    bunch = require("sklearn.datasets", "lab", "the digits").load_digits()
    images, labels = torch.from_numpy(bunch.images).float() / 16, torch.from_numpy(bunch.target).long()
    return Splits(ImageSet(images, labels, tuple("0123456789")), None, None, "scikit-learn's digits")


# --- torchvision ------------------------------------------------------------------------------------------------------


class Decoded:
    """The images of a torchvision data set as uint8 tensors (C, H, W), decoded when they are asked for."""

    def __init__(self, dataset: Any, indices: Tensor | None = None) -> None:
        self.dataset = dataset
        self.indices = torch.arange(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | Tensor) -> Any:
        if isinstance(index, Tensor):
            return Decoded(self.dataset, self.indices[index])
        number = int(self.indices[index])
        try:
            return decoded(self.dataset[number][0])
        except Exception as error:  # Pillow raises nearly anything for damaged files
            name = type(self.dataset).__name__
            raise UnreadableImage(f"cannot read image {number} of {name}: {error or type(error).__name__}") from error


def torchvision_data(name: str, root: str | os.PathLike[str]) -> Splits:
    """A data set of torchvision by its class, ``"Flowers102"``, with the splits it has; downloaded if it is not there.

    Args:
        name: of a classification data set in ``torchvision.datasets`` that takes a root folder.
        root: where its files are, or go.

    Raises:
        ValueError: no such class, or one that needs other arguments; its files are neither there nor to be had; labels
            that are not one class per image.
        ImportError: torchvision is missing.
    """
    make, known = torchvision_class(name)
    parts: dict[str, tuple[Any, ...]] = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
    sets: dict[str, ImageSet | None] = {}
    for part, splits in parts.items():
        if "train" in known:
            options: list[dict[str, Any]] = [] if part == "val" else [{"train": part == "train"}]
        elif "split" in known:
            options = [{"split": split} for split in splits]
        else:
            options = [{}] if part == "train" else []
        sets[part] = _first(lambda **o: make(root, **o), options, f"torchvision's {name}", "download" in known)
    if sets["train"] is None:
        raise ValueError(f"torchvision's {name} has no training images")
    return Splits(sets["train"], sets["val"], sets["test"], f"torchvision's {name} in {root}")


def torchvision_class(name: str) -> tuple[Callable[..., Any], Collection[str]]:
    """A data set's class, and the names of its arguments. ValueError and ImportError as :func:`torchvision_data`."""
    datasets = require("torchvision.datasets", "lab", "torchvision's data sets")
    make = getattr(datasets, name, None) if name in datasets.__all__ else None
    if make is None:
        raise ValueError(f"torchvision has no data set {name!r}; it has {', '.join(datasets.__all__)}")
    known = inspect.signature(make).parameters
    if "root" not in known:
        raise ValueError(f"torchvision's {name} does not take a root folder")
    return make, list(known)


def _first(make: Callable[..., Any], options: Sequence[dict[str, Any]], name: str, downloads: bool) -> ImageSet | None:
    """The first of the splits that the class has."""
    for chosen in options:
        try:
            try:
                dataset = make(**chosen)
            except RuntimeError:  # its files are not there
                if not downloads:
                    raise
                dataset = make(**chosen, download=True)
        except ValueError as error:  # what torchvision says of a split that it does not have
            if "split" in str(error).lower():
                continue
            raise ValueError(f"{name}: {error}") from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{name}: its files are not there, and could not be fetched: {error}") from error
        return _as_images(dataset, name)
    return None


def _as_images(dataset: Any, name: str) -> ImageSet:
    hidden = getattr(dataset, "_labels", None)  # of Flowers102, DTD, Food101, FGVCAircraft
    try:
        labels = labels_of(dataset, name) if hidden is None else torch.as_tensor(hidden).to(torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected one class per image: {error}") from error
    check_classes(labels, name)
    classes = getattr(dataset, "classes", None) or [str(n) for n in range(int(labels.max()) + 1)]
    return ImageSet(Decoded(dataset), labels, tuple(map(str, classes)))
