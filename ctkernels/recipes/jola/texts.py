"""Prompts with answers: read from JSONL, CSV or Parquet, and drawn into training, validation and test."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._extras import require

SUFFIXES = (".jsonl", ".csv", ".parquet")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
CHOICE_SEPARATOR = "|"


@dataclass(frozen=True)
class Example:
    """A prompt, the answer that should follow it, and the answers to choose from if there are any."""

    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer:
            raise ValueError(f"prompt and answer must not be empty, got {self.prompt!r} and {self.answer!r}")
        if self.choices is not None:
            if len(set(self.choices)) != len(self.choices) or len(self.choices) < 2:
                raise ValueError(f"choices must be two or more different ones, got {list(self.choices)}")
            if self.answer not in self.choices:
                raise ValueError(f"answer must be one of the choices {list(self.choices)}, got {self.answer!r}")


@dataclass(frozen=True)
class TextData:
    """Examples to train on; where given, examples for validation and for test; and where they came from."""

    train: tuple[Example, ...]
    val: tuple[Example, ...] | None = None
    test: tuple[Example, ...] | None = None
    source: str = "memory"

    def __post_init__(self) -> None:
        kinds = {e.choices is None for part in (self.train, self.val, self.test) for e in part or ()}
        if len(kinds) > 1:
            raise ValueError(f"{self.source}: choices must be given for every example or for none, got a mixture")

    @property
    def has_choices(self) -> bool:
        return self.train[0].choices is not None

    def digest(self) -> str:
        """A short name for the content: the same for the same examples in the same order."""
        parts = [[[e.prompt, e.answer, e.choices] for e in part or ()] for part in (self.train, self.val, self.test)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """One seed's examples."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]


def draw(data: TextData, seed: int, *, train: int = 200, val: int = 100, test: int | None = 300) -> Draw:
    """Draw training and validation examples for a seed; the test examples are the same for every seed.

    Args:
        data: what to draw from. Missing validation and test examples come out of ``data.train``.
        seed: of the training and validation examples.
        train: examples to train on.
        val: examples to validate on.
        test: at most so many to test on; None takes all, which needs ``data.test``.

    Raises:
        ValueError: not enough examples; the message says how many there are.

    Example:
        >>> draw(data, seed=0, train=200).train[0].prompt  # doctest: +SKIP
    """
    for name, count in (("train", train), ("val", val), ("test", test)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    pool = list(data.train)
    if data.test is None:
        if test is None:
            raise ValueError("test must be a number where the data has no test examples of its own, got None")
        random.Random("test").shuffle(pool)
        tested, pool = pool[:test], pool[test:]
    else:
        tested = list(data.test)
        random.Random("test").shuffle(tested)
        tested = tested[:test]
    needed = train + (val if data.val is None else 0)
    if len(pool) < needed:
        raise ValueError(
            f"{data.source}: {train} training{'' if data.val else f' and {val} validation'} examples were asked for, "
            f"{len(pool)} are there{'' if data.test else f' beside {len(tested)} for test'}"
        )
    random.Random(f"train {seed}").shuffle(pool)
    if data.val is None:
        validated = pool[train : train + val]
    else:
        validated = list(data.val)
        random.Random(f"val {seed}").shuffle(validated)
        validated = validated[:val]
    return Draw(tuple(pool[:train]), tuple(validated), tuple(tested))


def read_texts(path: str | os.PathLike[str]) -> TextData:
    """Read prompts with answers from a file, or from a folder with ``train``, ``val`` and ``test`` files.

    Files are JSONL, CSV or Parquet (``.jsonl``, ``.csv``, ``.parquet``) with the columns ``prompt`` and ``answer`` and,
    if answers are to be chosen, ``choices``: a list, or in CSV a JSON list or words between ``|``.

    Raises:
        ValueError: no such file, another format, a column missing, a value that is no text, an answer that is none of
            its choices; the message names the file and the row.
        ImportError: pyarrow is missing and the file is Parquet.

    Example:
        >>> read_texts("questions.jsonl").train[0].answer  # doctest: +SKIP
    """
    root = Path(path)
    if root.is_dir():
        found = {
            split: next((f for n in names for s in SUFFIXES if (f := root / f"{n}{s}").is_file()), None)
            for split, names in SPLITS.items()
        }
        if found["train"] is None:
            names = sorted(f.name for f in root.iterdir())
            raise ValueError(f"{root}: expected train.jsonl, train.csv or train.parquet, found {names[:8]}")
        parts = {split: None if file is None else _read(file) for split, file in found.items()}
        return TextData(parts["train"] or (), parts["val"], parts["test"], f"folder {root}")
    if not root.is_file():
        raise ValueError(f"data must be a {', '.join(SUFFIXES)} file or a folder of such; {root} does not exist")
    return TextData(_read(root), source=f"file {root}")


def _read(path: Path) -> tuple[Example, ...]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"data must be a {', '.join(SUFFIXES)} file, got {path}")
    try:
        examples = tuple(
            _example(row, f"{path}: row {number}") for number, row in enumerate(readers[path.suffix](path), 1)
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error
    if not examples:
        raise ValueError(f"{path}: expected at least one row, found none")
    return examples


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict) or not {"prompt", "answer"} <= set(row):
        found = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected prompt and answer, found {found}")
    choices = row.get("choices")
    if isinstance(choices, str):
        choices = _split(choices, where) if choices.strip() else None
    values: Sequence[Any] = [row["prompt"], row["answer"], *(choices or ())]
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{where}: prompt, answer and choices must be text, got {value!r}")
    try:
        return Example(row["prompt"], row["answer"], None if choices is None else tuple(choices))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _split(text: str, where: str) -> list[Any]:
    if not text.lstrip().startswith("["):
        return text.split(CHOICE_SEPARATOR)
    try:
        return list(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: choices must be a JSON list or words between |: {error}") from None


def _jsonl(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}: line {number} is not JSON: {error}") from None


def _csv(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: Path) -> Iterable[Any]:
    pyarrow = require("pyarrow", "jola", "reading Parquet files")
    parquet = require("pyarrow.parquet", "jola", "reading Parquet files")
    try:
        return parquet.ParquetFile(path).read().to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a Parquet file: {error}") from error
