"""Files of adapters: written under a temporary name and renamed, checked before they are read, never unpickled."""

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

# What decides which weights are loaded from a folder: transformers reads the first of these that it finds and puts an
# adapter beside them on top, vLLM reads every safetensors file.
_MODEL_FILES = re.compile(
    r".*\.safetensors|(pytorch_model|tf_model|flax_model|model|adapter_model)\b.*\.(bin|pt|pth|h5|msgpack)"
    r"|.*\.index\.json|adapter_config\.json"
)


def model_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files in a folder that a loader would take for a model's weights or for an adapter."""
    root = Path(folder)
    if not root.is_dir():
        return []
    return sorted(file for file in root.iterdir() if _MODEL_FILES.fullmatch(file.name))


@contextmanager
def replacing_folder(
    path: str | os.PathLike[str], stale: Callable[[Path], list[Path]] = lambda folder: []
) -> Iterator[Path]:
    """Give a fresh folder to write to, and move its files to `path` when the block ends without an error.

    The fresh folder lies in `path`, so that only `path` has to be writable, and moving is renaming. The files already
    in `path` stay as they are until every new file is complete. Then those in the way, and those that `stale` lists,
    are set aside, configuration files (json) first, and the new ones take their places, configuration files last: a
    process killed meanwhile leaves a folder that loaders refuse, never a mixture. An error puts everything back.
    """
    target = Path(path)
    if target.is_file():
        raise ValueError(f"path must be a folder, got the file {target}")
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(target) as room:
            fresh, aside = room / "new", room / "old"
            fresh.mkdir()
            aside.mkdir()
            yield fresh
            _exchange(target, fresh, aside, stale(target))
    except BaseException:
        if made and not any(target.iterdir()):
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
    """Rename, also between file systems (a folder inside the target can be a mounted one, or a link)."""
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


def check_adapter_folder(
    folder: str | os.PathLike[str], peft_type: str, prefixes: Callable[[Mapping[str, Any]], tuple[str, ...]]
) -> dict[str, torch.Size]:
    """Check a saved adapter before anything is built from it.

    Args:
        folder: where it lies.
        peft_type: its method.
        prefixes: of the names of its tensors, all of which must be there, by the values of its configuration.

    Returns:
        the shapes of its tensors by name; empty if there are no weights beside the configuration.

    Raises:
        ValueError: no configuration or an unreadable one, another method's adapter, weights missing, pickled or
            corrupt, or values that are not finite.
    """
    root = Path(folder)
    try:
        values = json.loads((root / CONFIG).read_text())
        found = values["peft_type"]
    except FileNotFoundError:
        raise ValueError(f"{root}: expected {CONFIG}, found none") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{root / CONFIG}: expected a JSON object with peft_type, got {error!r}") from None
    if found != peft_type:
        raise ValueError(f"{root}: expected an adapter of type {peft_type}, got {found}")
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
