"""Files that installed packages contain, located without importing the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_file(package: str, file: str) -> Path | None:
    """The path of ``file`` in an installed package; None if the package is missing or has no such file."""
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations if spec else None) or ():
        if (Path(root) / file).exists():
            return Path(root) / file
    return None
