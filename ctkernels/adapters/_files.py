"""Files of adapters: written atomically, checked before they are read, never unpickled."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._files import temporary_folder

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# Files that determine which weights a loader takes from a folder: transformers reads the first that it finds, with an adapter in
# the same folder on top; vLLM reads every safetensors file.
_MODEL_FILES = re.compile(
    r".*\.safetensors|(pytorch_model|tf_model|flax_model|model|adapter_model)\b.*\.(bin|pt|pth|h5|msgpack)"
    r"|.*\.index\.json|adapter_config\.json"
)


def model_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files in a folder that a loader would read as weights or as an adapter."""
    root = Path(folder)
    if not root.is_dir():
        return []
    return sorted(file for file in root.iterdir() if _MODEL_FILES.fullmatch(file.name))


@contextmanager
def replacing_folder(
    path: str | os.PathLike[str], stale: Callable[[Path], list[Path]] = lambda folder: []
) -> Iterator[Path]:
    """Yields a fresh folder to write to, and moves its files to `path` if the block succeeds.

    The fresh folder is in `path`, so that only `path` needs to be writable, and moving is renaming. Existing files stay until
    every new file is complete. Then those to be replaced, and those that `stale` lists, are moved away, configuration
    files (json) first, and the new ones move in, configuration files last: a process killed in between leaves a folder
    that loaders refuse, never a mixture. An error restores everything.
    """
    target = Path(path)
    if target.is_file():
        raise ValueError(f"path must be a folder, got the file {target}")
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(target) as scratch:
            fresh, aside = scratch / "new", scratch / "old"
            fresh.mkdir()
            aside.mkdir()
            yield fresh
            _exchange(target, fresh, aside, stale(target))
    except BaseException:
        if is_new and not any(target.iterdir()):
            target.rmdir()
        raise


def _exchange(target: Path, fresh: Path, aside: Path, stale: list[Path]) -> None:
    new = [file for file in fresh.rglob("*") if file.is_file()]
    moves: list[tuple[Path, Path]] = []
    for file in sorted(new, key=lambda file: (file.suffix == ".json", str(file))):
        destination = target / file.relative_to(fresh)
        destination.parent.mkdir(parents=True, exist_ok=True)
        moves.append((file, destination))
    old = {*stale, *(destination for _, destination in moves if destination.exists())}
    steps = [
        (file, aside / str(number))
        for number, file in enumerate(sorted(old, key=lambda file: (file.suffix != ".json", str(file))))
    ]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in steps + moves:
            _move(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            _move(destination, source)
        raise


def _move(source: Path, destination: Path) -> None:
    """Renames a file, also across file systems (a folder in the target may be a mount point or a link)."""
    if source.lstat().st_dev == destination.parent.stat().st_dev:
        os.replace(source, destination)
        return
    beside = destination.with_name(f".{destination.name}.tmp")
    try:
        shutil.copy2(source, beside)
        os.replace(beside, destination)
    finally:
        beside.unlink(missing_ok=True)
    source.unlink()


def safetensors_names(path: str | os.PathLike[str]) -> list[str]:
    """The tensor names in a safetensors file.

    Raises:
        ValueError: the file is not safetensors, or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got one that is corrupt or cut short ({error})"
        ) from None


def check_adapter_folder(
    folder: str | os.PathLike[str], peft_type: str, prefixes: Callable[[Mapping[str, Any]], tuple[str, ...]]
) -> dict[str, torch.Size]:
    """Checks a saved adapter before anything is built from it.

    Args:
        folder: of the adapter.
        peft_type: its method.
        prefixes: maps the values of its configuration to the prefixes of tensor names that must exist.

    Returns:
        The shapes of its tensors by name; empty without a weights file.

    Raises:
        ValueError: a missing or unreadable configuration, another method's adapter, weights that are missing, pickled or
            corrupt, or non-finite values.
    """
    root = Path(folder)
    try:
        values = json.loads((root / CONFIG).read_text())
        method = values["peft_type"]
    except FileNotFoundError:
        raise ValueError(f"{root}: expected {CONFIG}, found none") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{root / CONFIG}: expected a JSON object with peft_type, got {error!r}") from None
    if method != peft_type:
        raise ValueError(f"{root}: expected an adapter of type {peft_type}, got {method}")
    if not (root / WEIGHTS).exists():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in root.glob(pattern))
        if pickled:
            raise ValueError(f"{root}: expected {WEIGHTS}, found {pickled[0]}; pickled weights are not loaded")
        return {}
    names = safetensors_names(root / WEIGHTS)
    for prefix in prefixes(values):
        if not any(part.startswith(prefix) for name in names for part in name.split(".")):
            raise ValueError(f"{root / WEIGHTS}: expected tensors named {prefix}*, got {names[:3]}")
    return _shapes(root / WEIGHTS, names)


def _shapes(path: Path, names: list[str]) -> dict[str, torch.Size]:
    from safetensors import safe_open

    shapes = {}
    with safe_open(str(path), framework="pt") as file:
        for name in names:
            value = file.get_tensor(name)
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{path}: expected finite values, got NaN or infinity in {name}")
            shapes[name] = value.shape
    return shapes
