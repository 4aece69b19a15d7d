"""Saves and loads steered networks, and networks with merged curvature adapters.

One safetensors file has the weights and, in its header, the units. Other loaders recognise neither the file's name nor the
names in it, and cannot mistake it for the plain network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _marks
from ._card import counted, write_card
from ._extras import require
from ._files import parse_json, replacing
from .steering import Steering, handle_of, steer
from .steering.scan import is_steered

FILE = "ctkernels.safetensors"
FORMAT = 1
PREFIX = "steered."  # of every weight in the file
_OTHERS = (
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_config.json",
    "model.safetensors.index.json",
)


def save_pretrained(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Saves a steered model, or one with a merged curvature adapter, with all its weights.

    Other libraries find no model in the folder, so none can load it as the plain network. Fusion is not saved; fuse again
    after loading.

    Args:
        model: a model that :func:`steer` was called on, or the result of ``merge_and_unload()`` of a curvature adapter.
        path: a folder without other models; its ``ctkernels.safetensors`` is replaced when the new file is complete, and its
            model card, ``README.md``, gets instructions for loading.

    Returns:
        The file.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``model`` is not a module.
        ValueError: the model has no CT unit, or unmerged adapters, or NaN in a weight; the folder contains another model or
            an adapter.

    Examples:
        >>> handle = ctkernels.steer(model, beta=0.9)
        >>> file = ctkernels.save_pretrained(model, "steered")
        >>> model = ctkernels.load_pretrained("steered", Network())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    safetensors = require("safetensors.torch", "adapters", "saving a steered model")
    folder = Path(path)
    _check_folder(folder)
    header, tensors = _content(model)
    target = folder / FILE
    with replacing(target) as temporary:
        safetensors.save_file(tensors, str(temporary), metadata={"ctkernels": json.dumps(header)})
    write_card(folder, _card_text(header))
    return target


def load_pretrained(path: str | os.PathLike[str], base: nn.Module | None = None) -> Any:
    """Loads a model saved by :func:`save_pretrained`.

    Args:
        path: the folder.
        base: the plain network, of the saved class and shapes, which receives the saved weights and units. None constructs it,
            for models of transformers and timm.

    Returns:
        ``base``, or the new network, in evaluation mode. If it was steered, :func:`handle_of` returns its handle.

    Raises:
        ImportError: safetensors, or the network's library, is not installed.
        ValueError: the file is missing, truncated, of another format, or contains NaN; ``base`` is of another class, is
            steered, or has other weights or activations. ``base`` is unchanged.

    Examples:
        >>> model = ctkernels.load_pretrained("steered", Network())
        >>> ctkernels.handle_of(model).beta = 0.95
    """
    require("safetensors", "adapters", "loading a steered model")
    file = Path(path) / FILE
    header, tensors = _read(file)
    model = _build(header["builder"], file) if base is None else base
    if not isinstance(model, nn.Module):
        raise ValueError(f"base: expected a torch.nn.Module, got {type(model).__name__}")
    if _class_of(model) != header["class"]:
        raise ValueError(f"base: expected a {header['class']}, as in {file}, got a {_class_of(model)}")
    if is_steered(model):
        raise ValueError("base: expected the plain network, got one with CT units; remove() its handle first")
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    weights |= {name: weights[first] for name, first in header["shared"].items()}
    if base is None:
        dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
        model.to(next(iter(dtypes)) if len(dtypes) == 1 else None)
    _check_weights(model, weights, file)
    if "steering" in header:
        _restore_steering(model, header["steering"], file)
    else:
        from .adapters.curvature import fixed

        units = {name.removeprefix("units."): value for name, value in tensors.items() if name.startswith("units.")}
        fixed.restore(model, header["curvature"], units, file)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if name in weights:
                value.copy_(weights[name])
    return model.eval()


def _check_folder(folder: Path) -> None:
    """ValueError for a file, or a folder with another model."""
    if folder.is_file():
        raise ValueError(f"path: expected a folder, got the file {folder}")
    others = [name for name in _OTHERS if (folder / name).exists()]
    if others:
        raise ValueError(
            f"path: expected a folder without another model, got {folder} with {others[0]}, which loaders would read as the "
            "plain network; choose another folder"
        )


def _content(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of the file. ValueError for a model that cannot be saved."""
    tuners = [type(m).__name__ for m in model.modules() if any(c.__name__ == "BaseTunerLayer" for c in type(m).__mro__)]
    if tuners:
        raise ValueError(
            f"model: expected one without adapters, got a {tuners[0]} in it; merge it first (merge_and_unload), or save the "
            "adapter by its own save_pretrained"
        )
    header: dict[str, Any] = {"format": FORMAT, "class": _class_of(model), "builder": _builder(model)}
    tensors: dict[str, Tensor] = {}
    weights = model.state_dict()
    if _marks.STEERING in vars(model):
        header["steering"] = _steering(handle_of(model))
    elif is_steered(model):
        from .adapters.curvature import fixed

        header["curvature"], units = fixed.describe(model)
        tensors |= {f"units.{name}": value for name, value in units.items()}
        unit_names = fixed.names(model)
        weights = {name: value for name, value in weights.items() if name not in unit_names}
    else:
        raise ValueError(
            f"model: expected one with CT units that steer() made, or a merged curvature adapter, got a {type(model).__name__} "
            "without; a plain model is saved by its own library"
        )
    header["shared"] = {}
    first_names: dict[Any, str] = {}
    for name, value in weights.items():
        _refuse_nan(name, value)
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        first = first_names.setdefault(key, name) if value.numel() else name
        if first == name:
            tensors[PREFIX + name] = value.detach().cpu().contiguous()
        else:
            header["shared"][name] = first
    return header, tensors


def _card_text(header: Mapping[str, Any]) -> str:
    """The text of the model card."""
    if "steering" in header:
        values = list(header["steering"]["values"].values())
        betas = sorted({f"{beta:g}" for beta, _ in values})
        shown = ", ".join(betas[:8]) + ", ..." * (len(betas) > 8)
        origin = f"of {counted(len(values), 'activation')} was set: beta is {shown} (1 is plain)"
    else:
        origin = "of its activations was learned, and an adapter merged"
    if header["builder"] is None:
        lines = [
            f"base = ...  # a {header['class']}",
            'model = ctkernels.load_pretrained(".", base)  # the folder of this file',
        ]
    else:
        lines = ['model = ctkernels.load_pretrained(".")  # the folder of this file']
    return (
        f"# Network with curvature\n\nA `{header['class']}` with all its weights. The curvature {origin}: "
        "[Curvature Tuning](https://arxiv.org/abs/2502.07783). To load it:\n\n"
        '```sh\npip install "ctkernels[adapters]"\n```\n\n```python\nimport ctkernels\n\n' + "\n".join(lines) + "\n```"
    )


def _class_of(model: nn.Module) -> str:
    cls = type(model)
    cls = getattr(cls, _marks.BASE, cls)
    return f"{cls.__module__}.{cls.__qualname__}"


def _refuse_nan(name: str, value: Tensor) -> None:
    if value.is_floating_point() and bool(value.isnan().any()):
        raise ValueError(f"model: expected weights without NaN, got NaN in {name}")


# ---- construction of networks ------------------------------------------------------------------------------------------


def _builder(model: nn.Module) -> dict[str, Any] | None:
    """A description of the plain network, for its construction by transformers or timm; None for other networks."""
    config: Any = getattr(model, "config", None)
    cls = getattr(type(model), _marks.BASE, type(model))
    if cls.__module__.startswith("transformers.") and hasattr(config, "to_dict"):
        return {
            "library": "transformers",
            "class": cls.__name__,
            "config": json.loads(config.to_json_string(use_diff=False)),
        }
    pretrained: Any = getattr(model, "pretrained_cfg", None)
    if cls.__module__.startswith("timm.") and isinstance(pretrained, Mapping) and pretrained.get("architecture"):
        return {
            "library": "timm",
            "architecture": pretrained["architecture"],
            "num_classes": getattr(model, "num_classes", 1000),
        }
    return None


def _build(builder: Any, file: Path) -> Any:
    if builder is None:
        raise ValueError(
            f"base: expected the plain network, as {file} is of none that transformers or timm make; got None"
        )
    if builder["library"] == "timm":
        timm = require("timm", "recipes", "making the network anew")
        return timm.create_model(builder["architecture"], pretrained=False, num_classes=builder["num_classes"])
    transformers = require("transformers", "adapters", "making the network anew")
    cls = getattr(transformers, builder["class"], None)
    if cls is None:
        raise ValueError(f"base: expected the plain network, as this transformers has no {builder['class']}; got None")
    return cls(cls.config_class.from_dict(builder["config"]))


# ---- the file ----------------------------------------------------------------------------------------------------------


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"path: expected a folder with {FILE}, found none in {file.parent}")
    try:
        with safe_open(str(file), framework="pt") as opened:
            text = (opened.metadata() or {}).get("ctkernels")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a safetensors file, got one that is corrupt or cut short ({error})"
        ) from None
    header = parse_json(text) if text is not None else None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        version = header.get("format") if isinstance(header, dict) else None
        raise ValueError(f"{file}: expected a file of save_pretrained, format {FORMAT}, got format {version}")
    for name, value in tensors.items():
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ValueError(f"{file}: expected weights without NaN, got NaN in {name.removeprefix(PREFIX)}")
    return header, tensors


def _check_weights(model: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    tensors = model.state_dict(keep_vars=True)
    problems = {
        "has no": [name for name in weights if name not in tensors],
        "has beyond the file's": [name for name in tensors if name not in weights],
    }
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"base: expected the weights of {file}, got one that {what} {', '.join(names[:3])}{more}")
    for name, value in weights.items():
        for kind in ("shape", "dtype"):
            expected, actual = getattr(value, kind), getattr(tensors[name], kind)
            if expected != actual:
                shown = [tuple(v) if kind == "shape" else v for v in (expected, actual)]
                raise ValueError(f"base: expected {name} of {kind} {shown[0]}, as in {file}, got {shown[1]}")


# ---- steering ----------------------------------------------------------------------------------------------------------


def _steering(handle: Steering) -> dict[str, Any]:
    return {
        "activations": sorted({site.activation for site in handle.sites}),
        "beta": handle.beta,
        "coeff": handle.coeff,
        "values": {name: list(pair) for name, pair in handle.values().items()},
    }


def _restore_steering(model: nn.Module, saved: dict[str, Any], file: Path) -> None:
    handle = steer(model, saved["beta"], saved["coeff"], saved["activations"])
    values = {name: list(pair) for name, pair in handle.values().items()}
    if values != saved["values"]:
        handle.remove()
        differing = sorted(
            name for name in {*values, *saved["values"]} if values.get(name) != saved["values"].get(name)
        )
        raise ValueError(f"base: expected the activations of {file}, got others: {', '.join(differing[:3])}")
