"""A file of a Debian package, without root: downloaded with apt-get and unpacked into a folder."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


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


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
