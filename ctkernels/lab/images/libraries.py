"""Data sets of installed libraries: scikit-learn's digits, and the data sets of torchvision."""

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
    """scikit-learn's handwritten digits, 1,797 images of 8 x 8, all of them for training.

    Source: Alpaydin and Kaynak 1998, the test part of the UCI set (CC BY 4.0).
    """
    bunch = require("sklearn.datasets", "lab", "the digits").load_digits()
    images, labels = torch.from_numpy(bunch.images).float() / 16, torch.from_numpy(bunch.target).long()
    return Splits(ImageSet(images, labels, tuple("0123456789")), None, None, "scikit-learn's digits")


# --- torchvision ------------------------------------------------------------------------------------------------------


class Decoded:
    """The images of a torchvision data set as uint8 tensors (C, H, W), decoded when they are read."""

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
    """Reads a data set of torchvision, such as ``"Flowers102"``, with all its splits; downloads it if files are missing.

    Raises:
        ValueError: there is no such class, or it needs other arguments; its files are missing and cannot be downloaded; or
            it does not have one label per image.
        ImportError: torchvision is missing.
    """
    make, parameters = torchvision_class(name)
    parts: dict[str, tuple[Any, ...]] = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
    sets: dict[str, ImageSet | None] = {}
    for part, splits in parts.items():
        if "train" in parameters:
            options: list[dict[str, Any]] = [] if part == "val" else [{"train": part == "train"}]
        elif "split" in parameters:
            options = [{"split": split} for split in splits]
        else:
            options = [{}] if part == "train" else []
        sets[part] = _first(lambda **o: make(root, **o), options, f"torchvision's {name}", "download" in parameters)
    if sets["train"] is None:
        raise ValueError(f"torchvision's {name} has no training images")
    return Splits(sets["train"], sets["val"], sets["test"], f"torchvision's {name} in {root}")


def torchvision_class(name: str) -> tuple[Callable[..., Any], Collection[str]]:
    """The class of a data set, and the names of its arguments. ValueError and ImportError as in :func:`torchvision_data`."""
    datasets = require("torchvision.datasets", "lab", "torchvision's data sets")
    make = getattr(datasets, name, None) if name in datasets.__all__ else None
    if make is None:
        raise ValueError(f"torchvision has no data set {name!r}; it has {', '.join(datasets.__all__)}")
    parameters = inspect.signature(make).parameters
    if "root" not in parameters:
        raise ValueError(f"torchvision's {name} does not take a root folder")
    return make, list(parameters)


def _first(make: Callable[..., Any], options: Sequence[dict[str, Any]], name: str, downloads: bool) -> ImageSet | None:
    """The data set with the first of ``options`` whose split exists; None if none does."""
    for arguments in options:
        try:
            try:
                dataset = make(**arguments)
            except RuntimeError:  # its files are missing
                if not downloads:
                    raise
                dataset = make(**arguments, download=True)
        except ValueError as error:  # torchvision's error for a split that the data set does not have
            if "split" in str(error).lower():
                continue
            raise ValueError(f"{name}: {error}") from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{name}: its files are not there, and could not be fetched: {error}") from error
        return _as_images(dataset, name)
    return None


def _as_images(dataset: Any, name: str) -> ImageSet:
    private = getattr(dataset, "_labels", None)  # of Flowers102, DTD, Food101, FGVCAircraft
    try:
        labels = labels_of(dataset, name) if private is None else torch.as_tensor(private).to(torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected one class per image: {error}") from error
    check_classes(labels, name)
    classes = getattr(dataset, "classes", None) or [str(n) for n in range(int(labels.max()) + 1)]
    return ImageSet(Decoded(dataset), labels, tuple(map(str, classes)))
