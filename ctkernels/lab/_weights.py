"""Files of trained weights, and digests by which a damaged file or another network is noticed."""

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
    """Write a .safetensors file. Returns its record: ``bytes`` and ``sha256``.

    Raises:
        OSError: the file cannot be written, as the disk is full, say.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: value.contiguous() for name, value in state.items()}, temporary)
        except SafetensorError as error:  # no OSError, though it is one
            raise OSError(f"{path} cannot be written: {error}") from error
        return _record(temporary)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file.

    Raises:
        ValueError: there is no such file, or it is damaged; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected a .safetensors file: {error}") from error


def load_adapter(model: nn.Module, folder: Path, name: str) -> Any:
    """Put PEFT's adapter in ``folder`` on ``model``; nothing is unpickled.

    Raises:
        ValueError: it is not there, damaged, or of another network; ``name`` begins the message.
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
    """The reason why a file is not the one that ``record`` describes; None if it is. Without a record it must be readable."""
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
    """ValueError if what a machine loaded has another digest than where the comparison runs."""
    if got != expected:
        raise ValueError(
            f"{what}: machine {socket.gethostname()} loads another than the one that is compared, expected the digest "
            f"{expected}, got {got}"
        )


def _record(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
