"""Atomic file writes, and strict JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows; leftovers then stay
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name next to ``path``; renames the file to ``path`` on success, deletes it on error.

    Creates missing parent folders. The temporary name keeps the suffix, for writers that depend on it. Deletes files left
    behind by killed writers of ``path``; locks mark those of living ones.

    Examples:
        >>> with replacing("result.json") as temporary:
        ...     size = temporary.write_text("{}")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    descriptor, temporary = _reserve(target)
    try:
        try:
            yield temporary
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(target)) from error  # adds the file's name, on a full disk
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # the permissions of open(); mkstemp makes private files
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _reserve(target: Path) -> tuple[int, Path]:
    """Creates a file next to ``target``, open and locked until this process ends."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".tmp{target.suffix}", dir=target.parent)
        if not _lock(descriptor) or os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # deleted as a leftover by another process, before it was locked


def _clean(target: Path) -> None:
    """Deletes the temporary files of ``target`` that no living process has locked."""
    temporary = re.compile(rf"\.{re.escape(target.stem)}-\w{{8}}\.tmp{re.escape(target.suffix)}")
    for file in target.parent.iterdir():
        if not temporary.fullmatch(file.name):
            continue
        try:
            descriptor = os.open(file, os.O_RDWR)
        except OSError:  # renamed or deleted since, or another user's
            continue
        try:
            if _lock(descriptor, wait=False):
                file.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yields a hidden folder in ``parent``, deleted at the end together with those of killed processes.

    It is locked until this process ends, like the files of :func:`replacing`.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".saving-", suffix=".tmp", dir=parent))
        descriptor = _open_folder(folder)
        if descriptor is None or not _lock(descriptor) or os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # deleted as a leftover by another process, before it was locked
    try:
        yield folder
        for other in parent.glob(".saving-????????.tmp"):
            if other != folder and (leftover := _open_folder(other)) is not None:
                if _lock(leftover, wait=False):
                    shutil.rmtree(other, ignore_errors=True)
                os.close(leftover)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _open_folder(folder: Path) -> int | None:
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:  # deleted since, another user's, or on Windows, where folders cannot be opened
        return None


def _lock(descriptor: int, wait: bool = True) -> bool:
    """Locks a file; False if another process holds the lock, or without support for locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` as UTF-8, atomically (see :func:`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: the file is missing or invalid (see :func:`parse_json`); the message names it.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None


def parse_json(text: str) -> Any:
    """Parses JSON strictly.

    Raises:
        ValueError: the text is not JSON, has NaN or infinity, duplicate names in an object, or too deep nesting.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return values
