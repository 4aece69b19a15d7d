"""Putting a saved adapter in the place of one that is on a model, so that a compiled model needs no new graph."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from ._config import AdapterConfig, saved_shapes
from ._peft import check_names

# What does not change what an adapter computes in evaluation beyond the tensors in its file, and their names.
_FREE = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "input_shape", "activations"),
    *("init_std", "init_log_alpha", "init_beta", "init_coeff", "init_lora_weights"),
    *("freeze_gates", "gate_rate", "gate_sampling", "lora_dropout"),
}


def hotswap_adapter(model: Any, path: str | os.PathLike[str], adapter: str = "default") -> None:
    """Give an adapter of a model the values of a saved one, in place.

    Parameters stay the objects that they are, so a compiled model runs on without being compiled anew, and other
    adapters of the model stay as they are. Like `peft.utils.hotswap.hotswap_adapter`, which knows LoRA alone.

    Args:
        model: a `PeftModel` with a JoLA, curvature or joint adapter, unmerged; it may be compiled by `torch.compile`.
        path: the folder of the saved adapter.
        adapter: the name of the one that is replaced; the name stays.

    Raises:
        ValueError: there is no such adapter, it is merged or sharded (by FSDP2), or the saved one is of another method, edits
            other sites or heads, has other settings that matter, or values that are not finite. Nothing is changed then.

    Examples:
        >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
        >>> save_adapter(model, "adapter")
        >>> compiled = torch.compile(model)
        >>> hotswap_adapter(compiled, "adapter")
    """
    model = getattr(model, "_orig_mod", model)
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise ValueError(f"adapter: expected one of {sorted(configs)}, got {adapter!r}")
    config = configs[adapter]
    if not isinstance(config, AdapterConfig):
        raise ValueError(
            f"adapter: expected a JoLA, curvature or joint adapter, got a {type(config).__name__}; peft has a hotswap_adapter "
            "for LoRA"
        )
    if not os.path.isdir(path):
        raise ValueError(f"path: expected the folder of a saved adapter, got {os.fspath(path)!r}")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter in module.merged_adapters:
            raise ValueError(f"{name}: swapping needs an unmerged adapter, got {adapter!r} merged")
    other = type(config).from_pretrained(os.fspath(path))
    saved_shapes(other)  # there is no injection that would take them
    for field, (present, new) in _differences(config.to_dict(), other.to_dict()).items():
        raise ValueError(
            f"{os.fspath(path)}: expected {field}={present!r} as in adapter {adapter!r}, got {new!r}; load it beside that with "
            "load_adapter"
        )
    state = load_peft_weights(os.fspath(path), device="cpu")
    present = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    sharded = [name for name, value in present.items() if hasattr(value, "device_mesh")]
    if sharded:
        raise ValueError(
            f"model: expected an adapter that is whole on every rank, got {sharded[0]} sharded; load it before"
        )
    check_names(
        {name: value.shape for name, value in present.items()}, {name: value.shape for name, value in state.items()}
    )
    set_peft_model_state_dict(model, state, adapter_name=adapter)


def _differences(present: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The fields that matter and differ, those of methods within a joint configuration under their dotted names."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in sorted({*present, *new} - _FREE):
        one, two = present.get(field), new.get(field)
        if field in ("jola", "curvature", "lora") and isinstance(one, Mapping) and isinstance(two, Mapping):
            found |= _differences(one, two, prefix=f"{field}.")
        elif _plain(one) != _plain(two):
            found[f"{prefix}{field}"] = one, two
    return found


def _plain(value: Any) -> str:
    """A value as it is in a file, where tuples and sets are lists."""
    return json.dumps(value, sort_keys=True, default=sorted)
