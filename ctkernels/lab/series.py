"""Labelled time series: ``.ts`` files of the UCR and UEA archives, and their standardisation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._packages import package_file
from .labelled import InputOptions, LabelledSet, Splits, check_classes, check_finite

SUFFIX = ".ts"
TRAIN, TEST = "_TRAIN", "_TEST"  # in names of files in the archives


@dataclass(frozen=True)
class Standardise:
    """Subtracts a mean and divides by a deviation, per channel.

    Args:
        mean, std: of each channel.
        length: of the series.

    Raises:
        ValueError: a deviation that is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    length: int

    def __post_init__(self) -> None:
        if not min(self.std) > 0:
            raise ValueError(f"series must vary in every channel, got the deviations {list(self.std)}")

    def __call__(self, raw: Tensor) -> Tensor:
        return (raw - torch.tensor(self.mean)[:, None]) / torch.tensor(self.std)[:, None]

    def blank(self) -> Tensor:
        """A batch of one series of zeros."""
        return torch.zeros(1, len(self.mean), self.length)

    def entries(self) -> dict[str, Any]:
        """The arguments as plain values."""
        return {"mean": list(self.mean), "std": list(self.std), "length": self.length}

    @classmethod
    def restored(cls, values: Mapping[str, Any], network: nn.Module) -> Standardise:
        """Constructs it from :meth:`entries`."""
        return cls(tuple(values["mean"]), tuple(values["std"]), int(values["length"]))


@dataclass(frozen=True)
class SeriesSet(LabelledSet):
    """Labelled time series; item ``i`` is the series, float32 (channels, length), and its label.

    Args:
        series: float32 (n, channels, length).
        labels: int64 (n,), each an index into ``classes``.
        classes: names of the classes.
        preprocess: :class:`Standardise`. None by default: the series unchanged.
    """

    KIND: ClassVar[str] = "series"
    EXAMPLES: ClassVar[str] = "series"

    series: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    preprocess: Any = field(default=lambda raw: raw)

    def preparation(self, options: InputOptions, network: nn.Module, fitted: bool = True) -> Standardise:
        if options.normalise != "target":
            raise ValueError(f"normalise must be target for series, got {options.normalise}")
        _, channels, length = self.series.shape
        if not fitted:
            return Standardise((0.0,) * channels, (1.0,) * channels, length)
        values = self.series.double()
        mean, std = values.mean((0, 2)), values.std((0, 2), correction=0)
        return Standardise(tuple(mean.tolist()), tuple(std.tolist()), length)

    def check(self) -> None:
        check_finite(self.series, "series")


def find_series(spec: str | os.PathLike[str]) -> Callable[[], Splits] | None:
    """The function that reads a ``.ts`` file, a folder with one, or ``aeon:NAME``; None for other specs.

    Raises:
        ValueError: the package aeon has no such data set.
        ImportError: aeon is missing.
    """
    path, text = Path(spec), str(spec)
    if text.startswith("aeon:"):
        path = packaged_series(text.partition(":")[2])
    if path.is_dir() and (files := sorted(path.glob(f"*{TRAIN}{SUFFIX}"))):
        if len(files) > 1:
            raise ValueError(f"{path}: expected one *{TRAIN}{SUFFIX}, found {[file.name for file in files]}")
        return functools.partial(read_series, files[0])
    return functools.partial(read_series, path) if path.is_file() and path.suffix == SUFFIX else None


def packaged_series(name: str) -> Path:
    """The folder of a data set in the package aeon, which is not imported because of its many dependencies."""
    root = package_file("aeon", "datasets/data")
    if root is None:
        raise ImportError("data aeon:NAME needs a package: pip install --no-deps aeon")
    names = sorted(file.parent.name for file in root.glob(f"*/*{TRAIN}{SUFFIX}"))
    if name not in names:
        raise ValueError(f"data: aeon has no series {name!r} for classification, only {', '.join(names)}")
    return root / name


def read_series(path: str | os.PathLike[str]) -> Splits:
    """Reads time series from a ``.ts`` file, the format of the UCR and UEA archives.

    Test series are read from ``NAME_TEST.ts`` beside ``NAME_TRAIN.ts``; there is no validation file. All series must have
    the same length, without missing values.

    Raises:
        ValueError: the file is missing or has another format, series of several lengths, missing values, time stamps, no
            class labels, or fewer than two classes; or the test file has a class that the training file does not.

    Examples:
        >>> read_series("GunPoint_TRAIN.ts").train.classes
        ('1', '2')
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    series, names = _read(file)
    classes = tuple(sorted(set(names)))
    train = _set(file, series, names, classes)
    check_classes(train.labels, str(file))
    test_file = file.with_name(file.name.replace(TRAIN, TEST))
    test = _set(test_file, *_read(test_file), classes) if test_file != file and test_file.is_file() else None
    if test is not None and test.series.shape[1:] != train.series.shape[1:]:
        shapes = f"{tuple(test.series.shape[1:])} and {tuple(train.series.shape[1:])}"
        raise ValueError(f"{test_file}: expected series of the shape of the training series, got {shapes}")
    return Splits(train, None, test, f"file {file}")


def _set(file: Path, series: Tensor, names: Sequence[str], classes: tuple[str, ...]) -> SeriesSet:
    if unknown := sorted(set(names) - set(classes)):
        raise ValueError(f"{file}: classes {unknown} are not among those of the training series, {list(classes)}")
    return SeriesSet(series, torch.tensor([classes.index(name) for name in names]), classes)


def _read(file: Path) -> tuple[Tensor, list[str]]:
    """The series, float32 (n, channels, length), and their labels."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text: {error}") from None
    header: dict[str, str] = {}
    rows: list[list[list[float]]] = []
    names: list[str] = []
    in_header = True
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith(("#", "%")):
            continue
        if in_header:
            key, _, value = line.partition(" ")
            if not key.startswith("@"):
                raise ValueError(f"{file}:{number}: expected a header line with @ before @data, found {line[:40]!r}")
            header[key[1:].lower()] = value.strip().lower()
            in_header = key.lower() != "@data"
            continue
        *channels, name = line.split(":")
        try:
            rows.append([[float(value) for value in channel.split(",")] for channel in channels])
        except ValueError as error:
            raise ValueError(f"{file}:{number}: expected numbers with commas, no values missing: {error}") from None
        names.append(name.strip())
        if not channels or [len(c) for c in rows[-1]] != [len(c) for c in rows[0][:1]] * len(rows[0]):
            raise ValueError(f"{file}:{number}: expected all series to have the channels and the length of the first")
    if header.get("timestamps") == "true" or not header.get("classlabel", "").startswith("true"):
        raise ValueError(f"{file}: expected '@classLabel true ...' and no time stamps, found {header}")
    if not rows:
        raise ValueError(f"{file}: expected series after @data, found none")
    series = torch.tensor(rows, dtype=torch.float32)
    check_finite(series, f"{file}: series")
    return series, names
