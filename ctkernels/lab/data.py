"""Labelled examples of any kind by name: images, texts, time series."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .._factories import find_factory
from .images.data import find_images
from .jola.texts import HUB, READERS, SPLITS, Example, TextData, find_texts
from .labelled import Splits, check_classes
from .series import find_series
from .texts import TextSet

OTHERS = "; or texts (.jsonl, .csv, .parquet or datasets:NAME), or series (.ts, aeon:NAME)"


def load_data(spec: str | os.PathLike[str]) -> Splits:
    """Read labelled images, texts or time series; ``spec`` tells which.

    Images: a folder of them, an ``.npz`` file, ``"digits"`` (scikit-learn's), or ``"torchvision:Flowers102"`` or
    ``"torchvision:Flowers102:FOLDER"`` for a class of ``torchvision.datasets``, whose files are in, or go to, FOLDER
    (default ``data``). Texts: a ``.jsonl``, ``.csv`` or ``.parquet`` file or a folder of such, with a prompt and an answer,
    which is the class, or ``"datasets:NAME"`` (see :func:`~.jola.read_texts`). Time series: a ``.ts`` file (see
    :func:`read_series`), a folder with one, or ``"aeon:NAME"`` for those that come with the package aeon. And
    ``"package.module:function"`` or ``"file.py:function"``, a function that takes nothing and returns :class:`Splits`, or
    prompts with answers.

    Raises:
        ValueError: ``spec`` is none of these, or what it holds is not labelled examples; the message says what was found.
        ImportError: a package is missing; the message names the extra.

    Examples:
        >>> splits = load_data("photos/")
        >>> splits.train.classes
        ('cat', 'dog')
    """
    return find_data(spec)()


def find_data(spec: str | os.PathLike[str]) -> Callable[[], Splits]:
    """The function by which :func:`load_data` will read, found without reading any examples.

    Raises:
        ValueError: ``spec`` is nothing that is known.
        ImportError: the package it asks for is missing.
    """
    series = find_series(spec)
    if series is not None:
        return series
    path, name = Path(spec), str(spec)
    if has_texts(path) or name.startswith(HUB):
        read = find_texts(spec)
        return lambda: labelled_texts(read())
    factory = ":" in name and not path.exists() and not name.startswith("torchvision:")
    if not factory:
        return find_images(spec, OTHERS)
    build = find_factory(name, (Splits, TextData), "data")

    def made() -> Splits:
        data = build()
        return labelled_texts(data) if isinstance(data, TextData) else data

    return made


def has_texts(path: Path) -> bool:
    """Whether ``path`` is a file of texts or a folder of such."""
    if path.is_dir():
        return any((path / f"{name}{suffix}").is_file() for name in SPLITS["train"] for suffix in READERS)
    return path.is_file() and path.suffix.lower() in READERS


def labelled_texts(data: TextData) -> Splits:
    """Prompts with answers as texts with classes: the answers.

    Raises:
        ValueError: fewer than two answers, or one to predict that no training example has.
    """
    classes = tuple(sorted({example.answer for example in data.train}))

    def texts(examples: Sequence[Example] | None, name: str) -> TextSet | None:
        if examples is None:
            return None
        if unknown := sorted({example.answer for example in examples} - set(classes)):
            raise ValueError(f"{data.source}: {name} has answers that train does not have: {unknown[:5]}")
        labels = torch.tensor([classes.index(example.answer) for example in examples])
        return TextSet([example.prompt for example in examples], labels, classes)

    train = texts(data.train, "train")
    assert train is not None
    check_classes(train.labels, data.source)
    return Splits(train, texts(data.val, "val"), texts(data.test, "test"), data.source)
