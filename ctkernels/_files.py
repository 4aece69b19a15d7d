"""Writing files so that a reader sees the old content or the new, never half of it."""

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
except ImportError:  # not on Windows, where leftovers then stay
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside ``path``; rename it to ``path`` on success, delete it on error.

    Missing parent folders are made. The temporary name keeps the suffix, so writers that look at it still work. What
    killed writers of ``path`` left behind is deleted; the files of those at work are locked.

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
            raise OSError(error.errno, error.strerror, str(target)) from error  # a full disk does not say which file
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; give what open() would have given
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _reserve(target: Path) -> tuple[int, Path]:
    """A new file beside ``target``, open and locked for as long as this process lives."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".tmp{target.suffix}", dir=target.parent)
        if not _lock(descriptor) or os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # another process took it for a leftover, before it was locked


def _clean(target: Path) -> None:
    """Delete the temporary files of ``target`` that no living process has locked."""
    ours = re.compile(rf"\.{re.escape(target.stem)}-\w{{8}}\.tmp{re.escape(target.suffix)}")
    for file in target.parent.iterdir():
        if not ours.fullmatch(file.name):
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
    """Give a hidden folder inside ``parent``, deleted when the block ends; then also those of killed processes.

    It is locked while this process lives, as the files of :func:`replacing` are.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".saving-", suffix=".tmp", dir=parent))
        descriptor = _open_folder(folder)
        if descriptor is None or not _lock(descriptor) or os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # another process took it for a leftover, before it was locked
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
    """Whether the file could be locked: not if another process holds it, nor where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 through a temporary name (see :func:`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: the file is not there or is no JSON (see :func:`parse_json`); the message names it.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is cut short or otherwise no JSON, has NaN or an infinity, which JSON does not have, a name
            twice in one object, or too many brackets in one another.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found
