"""Support for accelerate's offloading, which keeps weights on the CPU or on disk while a module does not run.

accelerate hooks a module's forward: parameters are on the meta device, and on the execution device only during the call.
Parameters of an adapter stay resident: they are small, and used by a layer that accelerate does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def offload_hook(module: nn.Module) -> Any:
    """The hook that fetches a module's weights for its forward, or None."""
    hook = module.__dict__.get("_hf_hook")
    return next((part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "offload", False)), None)


def home(module: nn.Module) -> torch.device | None:
    """The device on which a module computes: its weight's, or the execution device of an offloaded weight. None: unknown."""
    hook = offload_hook(module)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    weight: Any = getattr(module, "weight", getattr(module, "qweight", None))
    return None if weight is None or weight.device.type == "meta" else weight.device


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """Makes a module's offloaded weights available in the block; parameters replaced in it are offloaded instead."""
    hook = offload_hook(module)
    if hook is None or not _on_meta(module):
        yield
        return
    hook.pre_forward(module)
    before = dict(module._parameters)
    try:
        yield
    finally:
        if not _on_meta(module):
            if any(value is not before.get(name) for name, value in module._parameters.items()):
                tensors = [*module._parameters.items(), *module._buffers.items()]
                hook.weights_map = {name: value.detach().cpu() for name, value in tensors if value is not None}
            hook.post_forward(module, None)


def _on_meta(module: nn.Module) -> bool:
    return any(value is not None and value.is_meta for value in module._parameters.values())


def keep_resident(tables: Iterable[nn.Module | None]) -> None:
    """Makes an adapter's parameters resident again, after accelerate has hooked and offloaded the whole model."""
    for table in tables:
        if table is not None and "_hf_hook" in table.__dict__:
            from accelerate.hooks import remove_hook_from_module

            hook = offload_hook(table)
            lost = [
                name for name, _ in table.named_parameters() if hook is not None and hook.weights_map.get(name) is None
            ]
            if lost:
                raise ValueError(
                    f"the parameters of adapters {lost} were offloaded to disk without their values, as "
                    "PeftModel.from_pretrained does with a base model that is partly on disk. Use get_peft_model(base, "
                    "config) and peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder)) instead"
                )
            remove_hook_from_module(table)


def offload_memo(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy` that omits offloaded weights."""
    return {id(module.__dict__["_hf_hook"]): None for module in model.modules() if "_hf_hook" in module.__dict__}


def drop_offloading(model: nn.Module) -> None:
    """Restores the original forwards in a copy made with :func:`offload_memo`."""
    for module in model.modules():
        if "_hf_hook" in module.__dict__:
            del module._hf_hook
            module.forward = module.__dict__.pop("_old_forward")


def whole_state_dict(model: Any) -> dict[str, Any]:
    """Arguments for `save_pretrained` with the offloaded weights that it does not fetch by itself."""
    if getattr(model, "hf_device_map", None) or not any(parameter.is_meta for parameter in model.parameters()):
        return {}
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return {"state_dict": get_state_dict_offloaded_model(model)}
