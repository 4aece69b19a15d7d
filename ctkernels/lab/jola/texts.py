"""Prompts with answers: read from JSONL, CSV or Parquet, and drawn into training, validation and test."""

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
ANSWER = ("answer", "completion")  # the names of the answer's column: this library's and TRL's


@dataclass(frozen=True)
class Example:
    """A prompt, the answer that should follow it, and the answers to choose from if there are any."""

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
class Split:
    """One seed's examples."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]


def draw(data: TextData, seed: int, *, train: int = 200, val: int = 100, test: int | None = 300) -> Split:
    """Draw training and validation examples for a seed; the test examples are the same for every seed.

    Args:
        data: what to draw from. Missing validation and test examples come out of ``data.train``.
        seed: of the training and validation examples.
        train: examples to train on.
        val: examples to validate on.
        test: at most so many to test on; None takes all, which needs ``data.test``.

    Raises:
        ValueError: not enough examples; the message says how many there are.

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
    return Split(tuple(pool[:train]), tuple(validated), tuple(tested))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")


def read_texts(path: str | os.PathLike[str]) -> TextData:
    """Read prompts with answers from a file, or from a folder with ``train``, ``val`` and ``test`` files.

    ``"package.module:function"`` or ``"file.py:function"`` is a function that takes nothing and returns them.
    ``"datasets:NAME"`` or ``"datasets:NAME:CONFIG"`` is what the package datasets loads by that name, from the hub or from
    a folder; texts with a class label count as prompts, and the names of their classes as answers.

    Files are JSONL, CSV or Parquet (``.jsonl``, ``.csv``, ``.parquet``), text in UTF-8, with the columns ``prompt`` and
    ``answer`` (or ``completion``, as TRL has it) and, if answers are to be chosen, ``choices``: a list, or in CSV a JSON
    list or words between ``|``. Other columns are not used. In CSV a value with a comma, a quote or a line break stands in
    double quotes, and quotes in it are doubled.

    Raises:
        ValueError: no such file or several for one split, another format or encoding, a column missing or there twice, a
            row with more or fewer values than columns, a value that is no text or empty, an answer that is none of its
            choices; the message names the file and the line (of Parquet the row).
        ImportError: pyarrow or datasets is missing where it is needed.

    Examples:
        >>> read_texts("questions.jsonl").train[0].answer
        'Paris'
    """
    return find_texts(path)()


def find_texts(path: str | os.PathLike[str]) -> Callable[[], TextData]:
    """The function by which :func:`read_texts` will read, found without reading any examples. ValueError for none."""
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
    """The file as text, without a byte order mark."""
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
    """The rows that are not empty, with the line each begins at. Quotes that do not fit are refused."""
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
    """Without the csv module's limit on a field, which is one for all of the process."""
    before = csv.field_size_limit(2**31 - 1)  # a C long, which may have 32 bits
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _answer_column(columns: Sequence[str], expected: str) -> str:
    """The name of the answer's column, which stands beside ``prompt``; ValueError where there is none, or both."""
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
