"""Saving adapters, and models with adapters folded in, so that an interruption leaves the old files whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .._card import CARD
from ..steering.scan import is_steered
from ._files import model_files, replacing_folder
from ._offload import fetched, whole_state_dict
from ._peft import check_adapter_name, plain_model
from .jola.bias import config_parts, hold_bias
from .jola.fold import Kept, copied, mergeable, stack
from .jola.layer import JolaLayer
from .jola.runtimes import TARGETS


def save_adapter(model: Any, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save the adapters of a `PeftModel` as `model.save_pretrained` does, but never half.

    `save_pretrained` writes in place, so an interruption there leaves a file cut short (which loading refuses). Here
    every file is written to a temporary folder inside `path` and renamed at the end.

    Args:
        model: a `PeftModel`.
        path: folder to write to; other files in it stay.
        kwargs: passed to `save_pretrained`, for example `selected_adapters`; `safe_serialization` stays True.

    Raises:
        ValueError: path is a file, or a folder with a model of its own (transformers would put the adapter on top of it);
            an adapter's name is no name for a folder; pickled weights are asked for.

    Examples:
        >>> save_adapter(model, "adapter")
        >>> model = PeftModel.from_pretrained(base, "adapter")
    """
    if not kwargs.get("safe_serialization", True):
        raise ValueError("safe_serialization must be True: pickled weights are not written")
    names = list(kwargs.get("selected_adapters") or model.peft_config)
    for name in names:
        check_adapter_name(name)
    folder = Path(path)
    if (folder / "config.json").exists() and any("adapter" not in file.name for file in model_files(folder)):
        raise ValueError(
            f"path: expected a folder without a model in it, got {folder}; transformers would load that model and put "
            "this adapter on top. Choose a folder of its own"
        )
    with replacing_folder(folder) as fresh:
        for place in ("", *names):  # model cards are extended, not begun anew
            if (folder / place / CARD).is_file():
                (fresh / place).mkdir(exist_ok=True)
                shutil.copy2(folder / place / CARD, fresh / place)
        model.save_pretrained(str(fresh), **kwargs)


def save_merged(
    model: Any, path: str | os.PathLike[str], *, target: str | None = None, overwrite: bool = False, **kwargs: Any
) -> None:
    """Save a model with its active adapters folded in, for plain transformers; the model itself is unchanged.

    JoLA's multiplicative edit always fits. The additive one needs a bias in the projection: where the architecture has
    none but a config switch for it (`attention_bias` of Llama and others), the switch is set and the biases that come
    with it are zero. A warning names runtimes that are known to lose them. LoRA and other adapters that fold into
    weights are merged too, in the order in which they lie on each other.

    Args:
        model: a `PeftModel` with JoLA adapters, or a transformers model with JoLA layers, not merged.
        path: folder to write to; its files are replaced only when all new ones are complete.
        target: the runtime that is to serve it: "transformers", "vllm" or "llama.cpp"; one that is known to lose a part of
            the model is refused. None: a warning names all that do.
        overwrite: take out the weights and adapters that are in the folder already. A loader would take those for
            parts of the new model.
        kwargs: passed to `save_pretrained`.

    Raises:
        ValueError: there is no JoLA adapter; the architecture, or the target, cannot hold the bias; the base is
            quantised or sharded; adapters are merged, or cannot be folded into weights; the model is steered; the folder
            has weights or adapters in it; the target is unknown.

    Examples:
        >>> save_merged(model, "merged")
        >>> plain = AutoModelForCausalLM.from_pretrained("merged")
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    base = plain_model(model)
    found = [] if overwrite else model_files(path)
    if found:
        names = ", ".join(file.name for file in found[:3]) + ", ..." * (len(found) > 3)
        raise ValueError(
            f"path: expected a folder without weights or adapters, got {os.fspath(path)} with {names}; a loader would "
            "take them for parts of the merged model. Choose another folder, or overwrite=True to take them out"
        )
    if not hasattr(base, "save_pretrained"):
        raise ValueError(
            f"model: expected a transformers model, got {type(base).__name__}; use model.merge_and_unload()"
        )
    with _plain(base, target), replacing_folder(path, stale=model_files) as folder:
        base.save_pretrained(folder, **{**whole_state_dict(base), **kwargs})


@contextmanager
def _plain(model: nn.Module, target: str | None) -> Iterator[None]:
    """Merge the model and take peft's wrappers out of it; everything is put back afterwards, bit for bit."""
    wrappers = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(owner, BaseTunerLayer)
    ]
    tops = {id(child): child for _, _, child in wrappers if isinstance(child, BaseTunerLayer)}
    stacks: list[list[Any]] = [list(stack(top)) for top in tops.values()]
    _check(model, stacks, [child for _, _, child in wrappers if isinstance(child, AuxiliaryTrainingWrapper)])
    bases = [layers[-1].get_base_layer() for layers in stacks]
    shared = _shared(model, bases)
    kept = [Kept(base, layers) for base, layers in zip(bases, stacks)]
    config: Any = getattr(model, "config", None)
    settings = [(part, dict(part.__dict__)) for part in config_parts(config).values()] if config is not None else []
    empty = [(owner, key) for owner in model.modules() for key, value in owner._parameters.items() if value is None]
    marks: dict[str, Any] = {
        name: model.__dict__.pop(name) for name in ("peft_config", "_hf_peft_config_loaded") if name in vars(model)
    }
    try:
        for layers, base in zip(stacks, bases):
            with fetched(base):
                copied(base)  # other methods merge in place
                layers[0].merge()
        for owner, name, child in wrappers:
            setattr(owner, name, child.get_base_layer() if isinstance(child, BaseTunerLayer) else _trained(child))
        _untie(model, shared)
        made = {id(base) for base, before in zip(bases, kept) if base.bias is not None and not before.has_bias}
        created = [name for name, module in model.named_modules() if id(module) in made]
        problem = hold_bias(model, created, target) if created else None
        if problem:
            raise ValueError(
                f"Cannot save a merged model: {problem}. Save the adapter instead, or train with edit='multiplicative'."
            )
        yield
    finally:
        for owner, name, child in wrappers:
            setattr(owner, name, child)
        for layers, base, before in zip(stacks, bases, kept):
            before.restore(base, layers)
        for owner, key in empty:
            owner._parameters[key] = None
        for part, values in settings:
            part.__dict__.clear()
            part.__dict__.update(values)
        model.__dict__.update(marks)


def _check(model: nn.Module, stacks: list[list[Any]], others: list[Any]) -> None:
    """Refuse what cannot be folded, before anything is changed."""
    for layers in stacks:
        for layer in layers:
            site = getattr(layer, "site", type(layer).__name__)
            if layer.merged:
                raise ValueError(f"{site}: save_merged needs unmerged adapters, got {layer.merged_adapters} merged")
            if not hasattr(layer, "base_layer"):
                raise ValueError(
                    f"{site}: a {type(layer).__name__} cannot be folded into weights, so plain transformers would not "
                    "compute it; unload that adapter, or save the adapters instead"
                )
        mergeable(layers[-1].get_base_layer(), getattr(layers[-1], "site", type(layers[-1]).__name__))
    if not any(isinstance(layer, JolaLayer) for layers in stacks for layer in layers):
        raise ValueError("model: expected one with a JoLA adapter, got one without")
    for other in others:
        if not isinstance(other, ModulesToSaveWrapper):
            raise ValueError(f"save_merged knows no plain form of a {type(other).__name__}; save the adapters instead")
    if is_steered(model):
        raise ValueError(
            "model: expected plain activations, got CT units (it is steered, or has a merged curvature adapter), which "
            "plain transformers would not compute; remove() the steering first, or save the adapter instead"
        )


def _trained(wrapper: Any) -> nn.Module:
    names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[names[0]] if names else wrapper.original_module


def _shared(model: nn.Module, bases: list[Any]) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of modules with one weight, the first of them to be merged."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for value in module._parameters.values():
            if value is not None:
                owners.setdefault(id(value), []).append(module)
    return [(base, other) for base in bases for other in owners[id(base.weight)] if other is not base]


def _untie(model: Any, shared: list[tuple[nn.Module, nn.Module]]) -> None:
    """Tell the config that weights that were one are two now.

    Raises:
        ValueError: it has no word for it, so that plain transformers would make them one again.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for base, other in shared:
        ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
        if any(base is end for end in ends) and any(other is end for end in ends):
            model.config.tie_word_embeddings = False
        else:
            raise ValueError(
                f"{names[id(base)]}: its weight is also that of {names.get(id(other), 'another module')}, and plain "
                "transformers would share it again when it loads the merged model; save the adapter instead"
            )
