"""Loads labelled examples of any kind (images, texts, time series) by name."""

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
    """Reads labelled images, texts or time series.

    Args:
        spec: Images: a folder, an ``.npz`` file, ``"digits"`` (scikit-learn's), or ``"torchvision:Flowers102"`` or
            ``"torchvision:Flowers102:FOLDER"`` for a class of ``torchvision.datasets`` with its files in FOLDER (default
            ``data``), downloaded if missing. Texts: a ``.jsonl``, ``.csv`` or ``.parquet`` file, or a folder of such, with
            prompts and answers, which are the classes, or ``"datasets:NAME"`` (see :func:`~.jola.read_texts`). Time series:
            a ``.ts`` file (see :func:`read_series`), a folder with one, or ``"aeon:NAME"`` for a data set in the package
            aeon. Or a function, ``"package.module:function"`` or ``"file.py:function"``, without arguments, that returns
            :class:`Splits` or :class:`~.jola.TextData`.

    Raises:
        ValueError: ``spec`` has another form, or its content is not labelled examples.
        ImportError: a package is missing; the message names the extra.

    Examples:
        >>> splits = load_data("photos/")
        >>> splits.train.classes
        ('cat', 'dog')
    """
    return find_data(spec)()


def find_data(spec: str | os.PathLike[str]) -> Callable[[], Splits]:
    """The function that reads the data of :func:`load_data`; no examples are read yet.

    Raises:
        ValueError: ``spec`` is unknown.
        ImportError: a package that it needs is missing.
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

    def load() -> Splits:
        data = build()
        return labelled_texts(data) if isinstance(data, TextData) else data

    return load


def has_texts(path: Path) -> bool:
    """Whether ``path`` is a file of prompts and answers, or a folder with training ones."""
    if path.is_dir():
        return any((path / f"{name}{suffix}").is_file() for name in SPLITS["train"] for suffix in READERS)
    return path.is_file() and path.suffix.lower() in READERS


def labelled_texts(data: TextData) -> Splits:
    """Converts prompts with answers to labelled texts, whose classes are the answers.

    Raises:
        ValueError: there are fewer than two answers, or validation or test answers without a training example.
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
