"""Reads adapters for a pool, from saved folders and from models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .._config import AdapterConfig
from .._files import WEIGHTS
from ..strength import Scaled


class Source(NamedTuple):
    """An adapter: its configuration, its tensors by their names in the base model, and its strengths by site, if not 1."""

    config: Any
    state: dict[str, Tensor]
    strengths: dict[str, float]


def read_adapter(source: Any, adapter: str | None, config_class: type[AdapterConfig]) -> Source:
    """Reads an adapter.

    Args:
        source: a folder written by `save_pretrained` or `save_adapter`, or a `PeftModel`.
        adapter: the adapter of a `PeftModel`; None if it has only one.
        config_class: the required class of the configuration.

    Raises:
        ValueError: there is no such adapter, it belongs to another method, its file cannot be read, or it has non-finite
            values or modules_to_save.
    """
    if isinstance(source, (str, os.PathLike)):
        if adapter is not None:
            raise ValueError(f"adapter: a folder holds one adapter, so expected None, got {adapter!r}")
        read = _from_folder(Path(source), config_class)
    else:
        read = _from_model(source, adapter, config_class)
    if read.config.modules_to_save:
        raise ValueError(
            f"source: expected an adapter of its own, got one with modules_to_save={read.config.modules_to_save}, "
            "which a pool has no place for; load it with PeftModel.from_pretrained"
        )
    start = "base_model.model."
    return read._replace(state={name.removeprefix(start): value.detach() for name, value in read.state.items()})


def _from_folder(folder: Path, config_class: type[AdapterConfig]) -> Source:
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise ValueError(f"source: expected a PeftModel or the folder of a saved adapter, got {str(folder)!r}")
    config = config_class.from_pretrained(str(folder))
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"source: expected {folder / WEIGHTS}, found none")
    return Source(config, load_file(folder / WEIGHTS), {})


def _from_model(model: Any, adapter: str | None, config_class: type[AdapterConfig]) -> Source:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(f"source: expected a PeftModel or the folder of a saved adapter, got {type(model).__name__}")
    names = list(model.peft_config)
    if adapter is None and len(names) > 1:
        raise ValueError(f"adapter: the model has several, so expected one of {names}, got None")
    name = names[0] if adapter is None else adapter
    if name not in names:
        raise ValueError(f"adapter: expected one of {names}, got {name!r}")
    config: Any = model.peft_config[name]
    if not isinstance(config, config_class):
        raise ValueError(f"source: expected an adapter of type {config_class.method}, got {config.peft_type.value}")
    # peft's own function also removes the adapter's name inside tensor names: that of an adapter "1" in layers.1
    marker, end = f".{config_class.method.lower()}_", f".{name}"
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {key.removesuffix(end): value for key, value in tensors if marker in key and key.endswith(end)}
    broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise ValueError(f"source: expected finite values, got NaN or infinity in {broken[0]}")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Scaled)]
    strengths = {layer.site: layer.get_scale(name) for layer in layers if name in layer.strength}
    return Source(config, state, strengths)
