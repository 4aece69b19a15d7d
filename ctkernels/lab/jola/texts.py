"""Prompts with answers: their files (JSONL, CSV, Parquet), and splits by seed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..._extras import require
from ..._factories import find_factory, told
from ..._files import parse_json

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
HUB = "datasets:"
CHOICE_SEPARATOR = "|"
ANSWER = ("answer", "completion")  # names of the column of answers: this library's and TRL's


@dataclass(frozen=True)
class Example:
    """A prompt, its right answer, and the answers to choose from, if any."""

    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for text in (self.prompt, self.answer, *(self.choices or ())):
            if not isinstance(text, str):
                raise ValueError(f"prompt, answer and choices must be text, got {text!r}")
            if "\0" in text or not _encodable(text):
                raise ValueError(f"text must have neither NUL nor half a surrogate pair, got {_shown(text)}")
        if not self.prompt.strip() or not self.answer.strip():
            raise ValueError(f"prompt and answer must not be empty, got {self.prompt!r} and {self.answer!r}")
        if self.choices is not None:
            if not all(choice.strip() for choice in self.choices):
                raise ValueError(f"choices must not be empty, got {list(self.choices)}")
            if len(set(self.choices)) != len(self.choices) or len(self.choices) < 2:
                raise ValueError(f"choices must be two or more different ones, got {list(self.choices)}")
            if self.answer not in self.choices:
                raise ValueError(f"answer must be one of the choices {list(self.choices)}, got {self.answer!r}")


@dataclass(frozen=True)
class TextData:
    """Training examples, validation and test examples if the data has them, and their source."""

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
        """A short hash of the examples in their order."""
        parts = [[[e.prompt, e.answer, e.choices] for e in part or ()] for part in (self.train, self.val, self.test)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """The examples of one seed."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]


def draw(data: TextData, seed: int, *, train: int = 200, val: int = 100, test: int | None = 300) -> Split:
    """Draws training and validation examples for a seed; the test examples are the same for every seed.

    Args:
        data: the examples. Missing validation and test examples are taken from ``data.train``.
        seed: of the training and validation examples.
        train: number of training examples.
        val: number of validation examples.
        test: maximal number of test examples; None: all of ``data.test``.

    Raises:
        ValueError: there are too few examples; the message says how many there are.

    Examples:
        >>> draw(data, seed=0, train=8, val=4, test=4).train[0].answer
        'Madrid'
    """
    for name, count in (("train", train), ("val", val), ("test", test)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    pool = list(data.train)
    if data.test is None:
        if test is None:
            raise ValueError("test must be a number where the data has no test examples of its own, got None")
        random.Random("test").shuffle(pool)
        test_set, pool = pool[:test], pool[test:]
    else:
        test_set = list(data.test)
        random.Random("test").shuffle(test_set)
        test_set = test_set[:test]
    needed = train + (val if data.val is None else 0)
    if len(pool) < needed:
        raise ValueError(
            f"{data.source}: {train} training{'' if data.val else f' and {val} validation'} examples were asked for, "
            f"{len(pool)} are there{'' if data.test else f' beside {len(test_set)} for test'}"
        )
    random.Random(f"train {seed}").shuffle(pool)
    if data.val is None:
        val_set = pool[train : train + val]
    else:
        val_set = list(data.val)
        random.Random(f"val {seed}").shuffle(val_set)
        val_set = val_set[:val]
    return Split(tuple(pool[:train]), tuple(val_set), tuple(test_set))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")


def read_texts(path: str | os.PathLike[str]) -> TextData:
    """Reads prompts with answers from a file, or from a folder with ``train``, ``val`` and ``test`` files.

    A path ``"package.module:function"`` or ``"file.py:function"`` names a function without arguments that returns them.
    ``"datasets:NAME"`` or ``"datasets:NAME:CONFIG"`` is a data set that the package datasets loads, from the hub or from a
    folder; texts with a class label are prompts, and the names of their classes are answers.

    Files are JSONL, CSV or Parquet (``.jsonl``, ``.csv``, ``.parquet``), with text in UTF-8, the columns ``prompt`` and
    ``answer`` (or ``completion``, as in TRL) and, for multiple choice, ``choices``: a list, or in CSV a JSON list or words
    separated by ``|``. Other columns are ignored. In CSV, a value with a comma, a quote or a line break needs double
    quotes, and quotes in it are doubled.

    Raises:
        ValueError: the file is missing, there are several for one split, it has another format or encoding, a column is
            missing or duplicated, a row has more or fewer values than columns, a value is no text or empty, or an answer
            is not among its choices; the message names the file and the line (of Parquet the row).
        ImportError: pyarrow or datasets is missing where it is needed.

    Examples:
        >>> read_texts("questions.jsonl").train[0].answer
        'Paris'
    """
    return find_texts(path)()


def find_texts(path: str | os.PathLike[str]) -> Callable[[], TextData]:
    """The function that reads the data of :func:`read_texts`; no examples are read yet. ValueError for an unknown path."""
    root = Path(path)
    if str(path).startswith(HUB):
        name, _, configuration = str(path).removeprefix(HUB).partition(":")
        if not name.strip():
            raise ValueError(f"data must be {HUB}NAME or {HUB}NAME:CONFIG, got {str(path)!r}")
        require("datasets", "trainers", "data by a name of the hub")
        return partial(_from_datasets, name, configuration or None)
    if not root.is_file() and not root.is_dir():
        if str(path) == "wordnet":
            raise ValueError("data: wordnet is now examples.data:wordnet, to be had in a clone of the repository")
        if ":" in str(path):
            return find_factory(str(path), TextData, "data")
        raise ValueError(f"data must be a {', '.join(SUFFIXES)} file or a folder of such; {root} does not exist")
    if root.is_file():
        if root.suffix.lower() not in READERS:
            raise ValueError(f"data must be a {', '.join(SUFFIXES)} file or a folder of such, got the file {root}")
        return lambda: TextData(_read(root), source=f"file {root}")
    files = _split_files(root)

    def read() -> TextData:
        parts = {split: None if file is None else _read(file) for split, file in files.items()}
        return TextData(parts["train"] or (), parts["val"], parts["test"], f"folder {root}")

    return read


def _from_datasets(name: str, configuration: str | None) -> TextData:
    datasets = require("datasets", "trainers", "data by a name of the hub")
    title = f"data {HUB + name!r}"
    try:
        loaded = datasets.load_dataset(name, configuration)
    except Exception as error:  # of the hub, of the network, of what is there
        raise ValueError(f"{title}: datasets.load_dataset raised {told(error)}") from error
    parts: dict[str, tuple[Example, ...] | None] = {}
    for split, names in SPLITS.items():
        there = [found for found in names if found in loaded]
        parts[split] = _rows_of(loaded[there[0]], f"{title}: {there[0]}") if there else None
    if not parts["train"]:
        raise ValueError(f"{title}: expected examples in a split train, found {sorted(map(str, loaded))}")
    return TextData(parts["train"], parts["val"], parts["test"], f"{HUB}{name}")


def _rows_of(split: Any, where: str) -> tuple[Example, ...]:
    """The examples of a split of datasets."""
    classes = getattr(split.features.get("label"), "names", None)
    rows: Iterator[Any]
    if "prompt" not in split.column_names and "text" in split.column_names and classes:
        rows = ({"prompt": row["text"], "answer": classes[row["label"]]} for row in split)
    else:
        _check_columns(split.column_names, where)
        rows = iter(split)
    return tuple(_example(row, f"{where}, row {number}") for number, row in enumerate(rows, 1))


def _split_files(root: Path) -> dict[str, Path | None]:
    """The file of each split in a folder."""
    files = [f for f in sorted(root.iterdir()) if f.is_file() and f.suffix.lower() in SUFFIXES]
    chosen: dict[str, Path | None] = {}
    for split, names in SPLITS.items():
        fit = [f for f in files if f.stem in names]
        if len(fit) > 1:
            raise ValueError(f"{root}: expected one file for {split}, found {[f.name for f in fit]}")
        chosen[split] = fit[0] if fit else None
    if chosen["train"] is None:
        others = sorted(f.name for f in root.iterdir())
        raise ValueError(f"{root}: expected train.jsonl, train.csv or train.parquet, found {others[:8]}")
    return chosen


def _read(path: Path) -> tuple[Example, ...]:
    examples = tuple(_example(row, where) for where, row in READERS[path.suffix.lower()](path))
    if not examples:
        raise ValueError(f"{path}: expected at least one row, found none")
    return examples


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected prompt and answer, found {type(row).__name__}")
    answer = _answer_column(sorted(map(str, row)), f"{where}: expected")
    choices = row.get("choices")
    if isinstance(choices, str):
        choices = _split(choices, where) if choices.strip() else None
    if choices is not None and not isinstance(choices, list):
        raise ValueError(f"{where}: choices must be a list, got {choices!r}")
    try:
        return Example(row["prompt"], row[answer], None if choices is None else tuple(choices))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _split(text: str, where: str) -> Any:
    if not text.lstrip().startswith("["):
        return text.split(CHOICE_SEPARATOR)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: choices must be a JSON list or words between |: {error}") from None


def _text(path: Path) -> str:
    """The text of a file, without a byte order mark."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: expected UTF-8 text: {error}; save the file as UTF-8") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(io.StringIO(_text(path), newline=None), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: expected JSON: {error}") from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _csv_rows(path)
    where, columns = next(rows, ("", []))
    if columns:
        _check_columns(columns, where)
    for where, row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"{where}: expected {len(columns)} values ({', '.join(columns)}), found {len(row)}; "
                "a value with a comma in it needs double quotes"
            )
        yield where, dict(zip(columns, row))


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not empty, each with its first line. Misplaced quotes are refused."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            with _fields_of_any_length():
                row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{where}: expected CSV with commas and double quotes: {error}") from None
        if row:
            yield where, row


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lifts the csv module's limit on the length of a field, a global setting."""
    limit = csv.field_size_limit(2**31 - 1)  # a C long, which may have 32 bits
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _answer_column(columns: Sequence[str], expected: str) -> str:
    """The name of the column of answers. ValueError unless there is exactly one, and a column ``prompt``."""
    names = [name for name in ANSWER if name in columns]
    if "prompt" not in columns or not names:
        raise ValueError(f"{expected} prompt and answer, found {list(columns)}")
    if len(names) > 1:
        raise ValueError(f"{expected} prompt and one of {' and '.join(ANSWER)}, found both; leave one of them out")
    return names[0]


def _check_columns(columns: Sequence[str], where: str) -> None:
    _answer_column(columns, f"{where}: expected the columns")
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{where}: expected columns of different names, found {twice} more than once")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow = require("pyarrow", "lab", "reading Parquet files")
    parquet = require("pyarrow.parquet", "lab", "reading Parquet files")
    try:
        table = parquet.ParquetFile(path).read()
        _check_columns(table.column_names, str(path))
        rows = table.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: expected a Parquet file: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
SUFFIXES = tuple(READERS)
