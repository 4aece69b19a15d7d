"""Files of trained weights, and digests that detect a damaged file or another network."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import require
from .._factories import told
from .._files import read_json, replacing


def save_weights(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a .safetensors file. Returns its record: ``bytes`` and ``sha256``.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: value.contiguous() for name, value in state.items()}, temporary)
        except SafetensorError as error:  # safetensors wraps errors of the file system
            raise OSError(f"{path} cannot be written: {error}") from error
        return _record(temporary)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file.

    Raises:
        ValueError: the file is missing or damaged; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a .safetensors file: {error}") from error


def load_adapter(model: nn.Module, folder: Path, name: str) -> Any:
    """Loads a PEFT adapter from ``folder`` into ``model`` without unpickling.

    Raises:
        ValueError: the adapter is missing, damaged, or of another network; the message starts with ``name``.
        ImportError: peft is missing.
    """
    peft = require("peft", "adapters", "loading an adapter")
    from .. import adapters  # noqa: F401  (peft knows this library's methods once they are imported)

    if not (folder / "adapter_model.safetensors").is_file():  # else peft asks the hub for it
        raise ValueError(f"{folder}: expected adapter_model.safetensors, found none")
    read_json(folder / "adapter_config.json")
    read_weights(folder / "adapter_model.safetensors")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: what is in {folder} does not fit {type(model).__name__}: {told(error)}") from error


def damage(path: Path, record: Mapping[str, Any] | None) -> str | None:
    """Why the file does not match its ``record``; None if it does. Without a record, the file must be readable."""
    if not path.is_file():
        return f"its weights, {path}, are gone"
    if record is None:
        try:
            read_weights(path)
        except ValueError as error:
            return str(error)
    elif _record(path) != record:
        return f"its weights, {path}, are not those that it left"
    return None


def digest_of(model: nn.Module) -> str:
    """A short hash of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_same(what: str, expected: str, got: str) -> None:
    """ValueError if this machine loaded something with another digest than the machine that runs the comparison."""
    if got != expected:
        raise ValueError(
            f"{what}: machine {socket.gethostname()} loads another than the one that is compared, expected the digest "
            f"{expected}, got {got}"
        )


def _record(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
