"""Labelled images from a folder, an ``.npz`` file, a data set of a library, or a function."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._extras import require
from ..._factories import find_factory
from ..labelled import Splits, check_classes
from . import libraries
from .sets import ImageSet, opened_image

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".jp2", ".j2k", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm"),
)
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # Windows puts them into folders of pictures
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
WORDS = "digits, torchvision:NAME, or a factory module:function"
MOVED = ("fashion-mnist", "mnist-5k", "emoji")  # former names, now functions in examples/data


def find_images(spec: str | os.PathLike[str], beside: str = "") -> Callable[[], Splits]:
    """The function that reads a folder, an ``.npz`` file, or a data set by name; no images are read yet.

    ValueError for an unknown ``spec``; the message also names ``beside``, what else the caller accepts. ImportError for a data
    set of torchvision without that package.
    """
    path = Path(spec)
    if not str(spec).strip():
        raise ValueError(f"data must be a folder of images, an .npz file or one of {WORDS}{beside}, got {str(spec)!r}")
    if path.is_dir():
        return functools.partial(read_folder, path)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise ValueError(
                f"data must be a folder of images, an .npz file or one of {WORDS}{beside}, got the file {path}"
            )
        return functools.partial(read_npz, path)
    if str(spec) == "digits":
        return libraries.digits
    library, _, rest = str(spec).partition(":")
    if library == "torchvision":
        name, _, root = rest.partition(":")
        libraries.torchvision_class(name)
        return functools.partial(libraries.torchvision_data, name, root or "data")
    if rest:
        build = find_factory(str(spec), Splits, "data")
        return lambda: _only_images(build())
    if str(spec) in MOVED:
        function = str(spec).replace("-", "_")
        raise ValueError(f"data: {spec} is now examples.data:{function}, to be had in a clone of the repository")
    raise ValueError(f"data must be a folder of images, an .npz file or one of {WORDS}{beside}; {path} does not exist")


def _only_images(splits: Splits) -> Splits:
    if not isinstance(splits.train, ImageSet):
        raise ValueError(f"data: expected images, got {splits.train.KIND}; tune and compare take them")
    return splits


# --- a folder ---------------------------------------------------------------------------------------------------------


def read_folder(path: str | os.PathLike[str]) -> Splits:
    """Reads images from one subfolder per class, in ``path`` itself or in ``path/train``, ``path/val`` and ``path/test``.

    Files are opened to check that they are images, and decoded when they are used (see :func:`~.images.decoded`). ``val``
    may also be named ``valid`` or ``validation``; it and ``test`` may be missing. Classes are the subfolders of ``train``,
    in alphabetical order, with the images at any depth. Hidden files are ignored; a warning names everything else that is
    not read: files whose suffix is not in ``SUFFIXES``, images outside of classes, folders beside the splits.

    Raises:
        ValueError: there are no class folders, or fewer than two; a class has no images, or one of ``val`` or ``test`` is
            not in ``train``; a file is no image, has several frames, or has values of an unknown range.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"expected a folder of images, {root} is not a folder")
    folders = {split: next((root / n for n in names if (root / n).is_dir()), None) for split, names in FOLDERS.items()}
    if folders["train"] is None:
        if folders["val"] is not None or folders["test"] is not None:
            raise ValueError(f"{root}: expected a folder train beside {_names(root)}, found none")
        return Splits(_read_classes(root, None), None, None, f"folder {root}")
    used = {folder.name for folder in folders.values() if folder is not None}
    if beside := [name for name in _names(root) if name not in used]:
        _warn_unread(root, "folders", beside, f"the splits are {', '.join(sorted(used))}")
    train = _read_classes(folders["train"], None)
    val, test = (None if (f := folders[s]) is None else _read_classes(f, train.classes) for s in ("val", "test"))
    return Splits(train, val, test, f"folder {root}")


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _warn_unread(folder: Path, what: str, names: Sequence[str], reason: str) -> None:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    warnings.warn(f"{folder}: {len(names)} {what} not read ({reason}): {shown}", stacklevel=2)


def _read_classes(folder: Path, classes: tuple[str, ...] | None) -> ImageSet:
    names = _names(folder)
    loose = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not names:
        raise ValueError(
            f"{folder}: expected one subfolder of images per class, found none ({len(loose)} loose images)"
        )
    if classes is not None and (extra := sorted(set(names) - set(classes))):
        raise ValueError(f"{folder}: classes {extra} are not among those of the training images, {list(classes)}")
    classes = classes or tuple(names)
    paths: list[Path] = []
    labels: list[int] = []
    unread: list[str] = []
    for name in names:
        files, others = _files_of_class(folder / name)
        if not files:
            raise ValueError(f"{folder / name}: expected images ({', '.join(SUFFIXES)}), found none")
        paths += files
        labels += [classes.index(name)] * len(files)
        unread += [str(p.relative_to(folder)) for p in others]
    if loose:
        _warn_unread(folder, "images", loose, "they are in no class")
    if unread:
        _warn_unread(folder, "files", unread, f"images end in {', '.join(SUFFIXES)}")
    for file in paths:
        with opened_image(file):
            pass
    images = ImageSet(paths, torch.tensor(labels), classes)
    check_classes(images.labels, str(folder))
    return images


def _files_of_class(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a class, and its other files, by suffix."""
    files: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_dir() or hidden or path.name.lower() in SYSTEM_FILES:
            continue
        (files if path.suffix.lower() in SUFFIXES else others).append(path)
    return files, others


# --- an .npz file -----------------------------------------------------------------------------------------------------


def read_npz(path: str | os.PathLike[str]) -> Splits:
    """Reads arrays of images and labels from an ``.npz`` file, without unpickling.

    Names of arrays: ``x`` or ``images`` with ``y`` or ``labels``; or per split ``x_train`` or ``train_images`` with
    ``y_train`` or ``train_labels``, likewise for ``val`` and ``test`` (as in MedMNIST). Other arrays are ignored. Images
    are uint8, or floating point in [0, 1], of shape (n, H, W), (n, H, W, C) or (n, C, H, W), C = 1 or 3. Labels are
    integers or strings of shape (n,) or (n, 1).

    Raises:
        ValueError: the file is no ``.npz`` file; arrays are missing, ambiguous, of Python objects, or of another shape or
            dtype; values are NaN or out of range; there are not as many labels as images, or there is only one class; or
            ``val`` or ``test`` has a class that ``train`` does not.
    """
    numpy = require("numpy", "lab", "reading .npz files")
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            pairs = _npz_pairs(archive.files, str(path))
            arrays = {name: _native(archive[name]) for pair in pairs.values() for name in pair}
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except _WrongNames:
        raise
    except Exception as error:  # numpy raises many kinds for damaged files: ValueError, BadZipFile, EOFError, ...
        raise ValueError(f"{path}: expected an .npz file of plain arrays: {error}") from error
    names, labels = _npz_labels(arrays, {split: y for split, (_, y) in pairs.items()}, str(path))
    sets = {}
    for split, (x, _) in pairs.items():
        images = _npz_images(arrays[x], f"{path}: {x}")
        if len(images) != len(labels[split]):
            raise ValueError(f"{path}: {x} has {len(images)} images, expected one per label ({len(labels[split])})")
        sets[split] = ImageSet(images, labels[split], names)
        check_classes(labels[split], f"{path}: {pairs[split][1]}")
    return Splits(sets["train"], sets.get("val"), sets.get("test"), f"file {path}")


class _WrongNames(ValueError):
    """A readable file has other names of arrays."""


def _npz_pairs(present: Iterable[str], path: str) -> dict[str, tuple[str, str]]:
    """The names of the arrays of images and labels of each split."""
    pairs: dict[str, tuple[str, str]] = {}
    for split, xs, ys in (
        ("train", ("x", "images", "x_train", "train_images"), ("y", "labels", "y_train", "train_labels")),
        ("val", ("x_val", "val_images"), ("y_val", "val_labels")),
        ("test", ("x_test", "test_images"), ("y_test", "test_labels")),
    ):
        x, y = ([name for name in names if name in present] for names in (xs, ys))
        if len(x) == len(y) == 1:
            pairs[split] = (x[0], y[0])
        elif x or y or split == "train":
            raise _WrongNames(f"{path}: expected one of {xs} with one of {ys}, found {sorted(present)}")
    return pairs


def _native(array: Any) -> Any:
    """Converts an array to the byte order of this machine, as torch requires."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _npz_images(array: Any, name: str) -> Tensor:
    shape, dtype = array.shape, array.dtype
    without_channels = len(shape) == 3
    channels_last = len(shape) == 4 and shape[3] in (1, 3)
    channels_first = len(shape) == 4 and shape[1] in (1, 3)
    if not (without_channels or channels_last or channels_first) or 0 in shape:
        raise ValueError(f"{name} must have the shape (n, H, W), (n, H, W, C) or (n, C, H, W), C = 1 or 3, got {shape}")
    if dtype.name not in ("uint8", "float16", "float32", "float64"):
        raise ValueError(f"{name} must be uint8, or floating point in [0, 1], got {dtype}")
    images = torch.from_numpy(array)
    if channels_last:
        images = images.permute(0, 3, 1, 2)
    if dtype.name == "uint8":
        return images
    bad = (~((images >= 0) & (images <= 1))).flatten(1).any(1).nonzero()[:, 0]  # NaN compares false
    if len(bad):
        values = images[bad[0]]
        raise ValueError(
            f"{name} must be in [0, 1] without NaN: {len(bad)} images are not, the first is number {bad[0].item()}, "
            f"with values from {values.min().item():g} to {values.max().item():g}"
        )
    return images.float()


def _npz_labels(arrays: Any, names: dict[str, str], path: str) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The names of the classes in order, and the labels of each split as int64 indices into them."""
    numpy = require("numpy", "lab", "reading .npz files")
    stored = {}
    for split, name in names.items():
        y = arrays[name]
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.ndim != 1 or y.dtype.kind not in "iuU":
            raise ValueError(
                f"{path}: {name} must be integers or strings of shape (n,), got {y.dtype} of shape {arrays[name].shape}"
            )
        stored[split] = y
    classes = numpy.unique(stored["train"])
    labels = {}
    for split, y in stored.items():
        unknown = numpy.setdiff1d(y, classes)
        if len(unknown):
            raise ValueError(
                f"{path}: {names[split]} has classes {unknown.tolist()} that {names['train']} does not have"
            )
        labels[split] = torch.from_numpy(numpy.searchsorted(classes, y)).to(torch.int64)
    return tuple(str(c) for c in classes), labels
