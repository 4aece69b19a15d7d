"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers then stay
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside ``path``; rename it to ``path`` on success, delete it on error.

    Missing parent folders are made. The temporary name keeps the suffix, so writers that look at it still work. What
    killed writers of ``path`` left behind is deleted; the files of those at work are locked.

    Example:
        >>> with replacing("result.json") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("{}")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    descriptor, temporary = _reserve(target)
    try:
        yield temporary
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
