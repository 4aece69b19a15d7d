"""Nouns of WordNet by their definition: prompts with eight answers to choose from."""

from __future__ import annotations

import os
import random
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctkernels.lab.jola import Example, TextData

from .debian import cache, fetched, first, unpack

DEBIAN = Path("/usr/share/wordnet")
# number of the lexicographer file -> the word that answers "This is a kind of"
CLASSES = {
    "04": "act",
    "07": "quality",
    "09": "idea",
    "10": "message",
    "26": "condition",
    "11": "event",
    "14": "group",
    "21": "money",
}
PROMPT = "Definition: {gloss}\nThis is a kind of"


def wordnet(path: str | os.PathLike[str] | None = None, *, per_class: int = 400, download: bool = True) -> TextData:
    """Definitions of nouns, each to be put into one of eight classes; the same examples on every machine.

    The classes are those of WordNet's lexicographers for acts, attributes, cognition, communication, states, events,
    groups and possession. From the first of these that works: the file or folder ``path`` if one is given, and then
    nothing else; the installed Debian package ``wordnet-base``; what an earlier call left in the cache
    (``$XDG_CACHE_HOME/ctkernels``); and, if ``download``, that Debian package fetched with ``apt-get download`` and
    unpacked into the cache, which needs no root; then nltk's download. ``source`` of the result says which it was.

    Args:
        path: ``data.noun`` or a folder with it.
        per_class: examples of each class, drawn with a fixed seed; fewer where a class has fewer.
        download: whether anything may be downloaded.

    Raises:
        ValueError: none worked (the message has one reason each), or ``per_class`` is below 1.

    Example:
        >>> data = wordnet()  # doctest: +SKIP
        >>> data.train[0].choices  # doctest: +SKIP
        ('act', 'quality', 'idea', 'message', 'condition', 'event', 'group', 'money')

    Source: WordNet 3.0, Princeton University (WordNet licence).
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    target = cache("wordnet")
    attempts: list[tuple[str, Callable[[], Path]]]
    if path is not None:
        attempts = [(f"{path}", lambda: Path(path))]
    else:
        attempts = [(f"Debian package in {DEBIAN}", lambda: DEBIAN), (f"cache {target}", lambda: target)]
        if download:
            attempts += [
                ("Debian package wordnet-base, downloaded", lambda: fetched(target, _from_debian, _read_nouns)),
                ("nltk's download", lambda: fetched(target, _from_nltk, _read_nouns)),
            ]
    nouns, source = first("WordNet", attempts, _read_nouns)
    return TextData(_examples(nouns, per_class), source=f"WordNet nouns, {source}")


def _examples(glosses: dict[str, list[str]], per_class: int) -> tuple[Example, ...]:
    shuffle: Any = random.Random("wordnet").shuffle
    words = tuple(CLASSES.values())
    examples = []
    for number, word in CLASSES.items():
        unique = sorted(set(glosses[number]))
        shuffle(unique)
        examples += [Example(PROMPT.format(gloss=gloss), word, words) for gloss in unique[:per_class]]
    shuffle(examples)
    return tuple(examples)


def _read_nouns(place: Path) -> dict[str, list[str]]:
    """Glosses without their usage examples, by lexicographer file."""
    path = place / "data.noun" if place.is_dir() else place
    if not path.is_file():
        raise ValueError(f"no data.noun in {place}")
    found: dict[str, list[str]] = {number: [] for number in CLASSES}
    for line in path.read_text(encoding="utf-8").splitlines():
        head, separator, gloss = line.partition(" | ")
        fields = head.split()
        if separator and len(fields) > 1 and fields[1] in found:
            text = gloss.split('; "')[0].strip()
            if text:
                found[fields[1]].append(text)
    if not all(found.values()):
        raise ValueError(f"{path} is not WordNet's data.noun: classes without definitions")
    return found


def _from_debian(folder: Path) -> Path:
    return unpack("wordnet-base", folder) / "usr/share/wordnet"


def _from_nltk(folder: Path) -> Path:
    import nltk

    try:
        if not nltk.download("wordnet", download_dir=str(folder), quiet=True):
            raise ValueError("the download failed")
    except urllib.error.URLError as error:
        raise ValueError(f"the download failed: {error}") from error
    archive = folder / "corpora/wordnet.zip"
    if archive.is_file():
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder / "corpora")
    return folder / "corpora/wordnet"
