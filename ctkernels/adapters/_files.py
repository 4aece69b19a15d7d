"""Files of adapters: written under a temporary name and renamed, checked before they are read, never unpickled."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a fresh folder to write to, and move its files to `path` when the block ends without an error.

    The files already in `path` stay as they are until every new file is complete; then each is replaced by a rename,
    configuration files (json) last.
    """
    target = Path(path)
    if target.is_file():
        raise ValueError(f"path must be a folder, got the file {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield fresh
        target.mkdir(exist_ok=True)
        files = sorted(
            (file for file in fresh.rglob("*") if file.is_file()), key=lambda file: (file.suffix == ".json", str(file))
        )
        for file in files:
            destination = target / file.relative_to(fresh)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def safetensors_names(path: str | os.PathLike[str]) -> list[str]:
    """The tensor names in a safetensors file.

    Raises:
        ValueError: the file is not safetensors, or is cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got one that is corrupt or cut short ({error})"
        ) from None


def check_adapter_folder(folder: str | os.PathLike[str], peft_type: str) -> None:
    """Check a saved adapter before anything is built from it.

    Raises:
        ValueError: no configuration or an unreadable one, another method's adapter, weights missing, pickled or
            corrupt.
    """
    root = Path(folder)
    try:
        values = json.loads((root / CONFIG).read_text())
        found = values["peft_type"]
    except FileNotFoundError:
        raise ValueError(f"{root}: expected {CONFIG}, found none") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{root / CONFIG}: expected a JSON object with peft_type, got {error!r}") from None
    if found != peft_type:
        raise ValueError(f"{root}: expected an adapter of type {peft_type}, got {found}")
    if not (root / WEIGHTS).exists():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in root.glob(pattern))
        if pickled:
            raise ValueError(f"{root}: expected {WEIGHTS}, found {pickled[0]}; pickled weights are not loaded")
        return
    names = safetensors_names(root / WEIGHTS)
    prefix = f"{peft_type.lower()}_"
    if not any(part.startswith(prefix) for name in names for part in name.split(".")):
        raise ValueError(f"{root / WEIGHTS}: expected tensors named {prefix}*, got {names[:3]}")
