"""Saves adapters, and models with merged adapters, atomically: an interruption leaves the old files intact."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from .._card import CARD
from ..steering.scan import is_steered
from ._files import model_files, replacing_folder
from ._offload import fetched, whole_state_dict
from ._peft import check_adapter_name, plain_model
from .jola.bias import config_parts, switch_on
from .jola.fold import Kept, copied, stack
from .jola.layer import JolaLayer
from .jola.packing import lay_out_as_loaded, packing
from .jola.runtimes import TARGETS
from .serving import engines
from .serving.placement import EditedSite, Placement, choose_placement, targets_of
from .serving.verify import Expected, Merged, expect


def save_adapter(model: Any, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Saves the adapters of a `PeftModel` like `model.save_pretrained`, but atomically.

    `save_pretrained` writes in place: an interruption leaves a truncated file (which loading refuses). This function writes
    every file to a temporary folder in `path` and renames it at the end.

    Args:
        model: a `PeftModel`.
        path: folder to write to; other files in it stay.
        kwargs: passed to `save_pretrained`, for example `selected_adapters`; `safe_serialization` must be True.

    Raises:
        ValueError: path is a file, or a folder with a model (transformers would load the adapter on top of it); an
            adapter's name cannot be a folder's name; or `safe_serialization` is False.

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
            "this adapter on top. Choose another folder"
        )
    with replacing_folder(folder) as fresh:
        for subfolder in ("", *names):  # existing model cards are extended
            if (folder / subfolder / CARD).is_file():
                (fresh / subfolder).mkdir(exist_ok=True)
                shutil.copy2(folder / subfolder / CARD, fresh / subfolder)
        model.save_pretrained(str(fresh), **kwargs)


def save_merged(
    model: Any,
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    inputs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Merged:
    """Saves a model with its active adapters merged, for plain transformers and the runtimes that read its files.

    JoLA's multiplicative edit is folded into the weights. The additive one becomes a bias of the output projection or, as
    attention weights sum to 1, of the value projection, if heads that share values share the offset (`additive="kv_group"`,
    or no shared heads). If the architecture lacks such a bias, a switch of its config adds it (`attention_bias` of Llama and
    others), or the model is saved as an equivalent architecture (Mistral and Qwen2 as Llama). The first option that all
    target runtimes read is used; `docs/serving.md` has the table. LoRA and other mergeable adapters are merged too, in the
    order of their nesting.

    Before the files get their names, the saved model is loaded and compared with the adapted one: in vLLM if that is the
    target and is installed, else in transformers. The model itself is unchanged.

    Args:
        model: a `PeftModel` with JoLA adapters, or a transformers model with JoLA layers, unmerged.
        path: folder to write to; its files are replaced only when all new ones are complete.
        target: the runtime that will serve it: "transformers", "vllm" or "llama.cpp" (for its converter; `save_gguf` writes
            its format directly). None: all that are known to serve the family.
        overwrite: remove existing weights and adapters from the folder, which a loader would read as parts of the new model.
        verify: load and compare, which takes the memory of a second model.
        inputs: keyword arguments of the compared forward; None: random ones.
        kwargs: passed to `save_pretrained`.

    Returns:
        A printable record of what was saved, and its error.

    Raises:
        ValueError: there is no JoLA adapter; the target reads no bias for the additive edits (the message says which
            runtime does); the saved model's error exceeds rounding; the base is sharded; adapters are already merged, or
            cannot be folded into weights; the model is steered; the folder has weights or adapters; the target is unknown.
            Nothing is written.

    Examples:
        >>> print(save_merged(model, "merged"))
        merged for ...
        >>> plain = AutoModelForCausalLM.from_pretrained("merged")
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    base = plain_model(model)
    existing = [] if overwrite else model_files(path)
    if existing:
        names = ", ".join(file.name for file in existing[:3]) + ", ..." * (len(existing) > 3)
        raise ValueError(
            f"path: expected a folder without weights or adapters, got {os.fspath(path)} with {names}; a loader would "
            "take them for parts of the merged model. Choose another folder, or overwrite=True to take them out"
        )
    if not hasattr(base, "save_pretrained"):
        raise ValueError(
            f"model: expected a transformers model, got {type(base).__name__}; use model.merge_and_unload()"
        )
    stacks = tuner_stacks(base)
    expected = expect(base, inputs) if verify else None
    with plain(base, stacks, target) as (chosen, zeros), replacing_folder(path, stale=model_files) as folder:
        if not verify and (chosen.values or chosen.home):
            raise ValueError(
                f"verify must be True where additive edits become {chosen.where}: whether that is the same is seen only "
                "when the saved model runs"
            )
        _write(base, folder, chosen, zeros if target == "llama.cpp" else [], kwargs)
        runtime, error = ("", 0.0) if expected is None else _compare(base, folder, chosen, target, expected)
        result = Merged(os.fspath(path), targets_of(base, target), chosen.where, runtime, error)
        if expected is None:
            return result
        # Log-probabilities change at most twice as much as logits.
        return result.judged(expected, expected.tolerance * (2 if runtime == "vllm" else 1))


def _write(model: Any, folder: Path, chosen: Placement, left_out: list[str], kwargs: dict[str, Any]) -> None:
    """Writes the merged model. `left_out`: zero biases that plain transformers adds itself."""
    lay_out_as_loaded(model)
    values = {**whole_state_dict(model), **kwargs}
    if chosen.home is None:
        if left_out:
            state = values.get("state_dict") or model.state_dict()
            values["state_dict"] = {name: value for name, value in state.items() if name not in left_out}
        model.save_pretrained(folder, **values)
        return
    state = dict(values.pop("state_dict", None) or model.state_dict())
    other = chosen.home.model(state)
    other.generation_config = getattr(model, "generation_config", None)
    other.save_pretrained(folder, state_dict=state, **values)


def _compare(model: Any, folder: Path, chosen: Placement, target: str | None, expected: Expected) -> tuple[str, float]:
    """Runs the saved model; (runtime, error)."""
    if target == "vllm" and "input_ids" in expected.inputs and engines.installed("vllm"):
        return "vllm", engines.error("vllm", folder, expected.inputs["input_ids"], expected.output)
    architecture: Any = type(model) if chosen.home is None else chosen.home.architecture
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    options = {"attn_implementation": getattr(model.config, "_attn_implementation", None)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = architecture.from_pretrained(folder, dtype=getattr(model, "dtype", None), **options)
    quantised = getattr(again, "is_quantized", False)
    return "transformers", expected.error(again if quantised else again.to(device))


def tuner_stacks(model: nn.Module) -> list[list[Any]]:
    """The tuner layers of each projection, outermost first; raises if one cannot be folded."""
    tops: dict[int, Any] = {id(child): child for _, _, child in _wrappers(model) if isinstance(child, BaseTunerLayer)}
    stacks: list[list[Any]] = []
    for top in tops.values():
        if getattr(top, "edits", None) == "block":  # lies on no projection
            top.check_merge()
        else:
            stacks.append(list(stack(top)))
    _check(model, stacks, [child for _, _, child in _wrappers(model) if isinstance(child, AuxiliaryTrainingWrapper)])
    return stacks


def _wrappers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    return [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(owner, BaseTunerLayer)
    ]


@contextmanager
def plain(model: Any, stacks: list[list[Any]], target: str | None) -> Iterator[tuple[Placement, list[str]]]:
    """Context in which the model is merged and without peft's wrappers; restores it afterwards, bit for bit.

    Yields the placement of the additive edits, and the names of zero biases that came with it.
    """
    wrappers = _wrappers(model)
    bases = [layers[-1].get_base_layer() for layers in stacks]
    shared = _shared(model, bases)
    kept = [(base, layers, Kept(base, layers)) for base, layers in zip(bases, stacks)]
    config: Any = getattr(model, "config", None)
    settings = [(part, dict(part.__dict__)) for part in config_parts(config).values()] if config is not None else []
    empty = [(owner, key) for owner in model.modules() for key, value in owner._parameters.items() if value is None]
    marks: dict[str, Any] = {
        name: model.__dict__.pop(name) for name in ("peft_config", "_hf_peft_config_loaded") if name in vars(model)
    }
    try:
        for owner, name, child in wrappers:
            setattr(owner, name, child.get_base_layer() if isinstance(child, BaseTunerLayer) else _trained(child))
        edited = _edited(model, stacks)
        chosen = choose_placement(model, edited, target, engines.installed)
        by_value = {id(edit.layer) for edit in edited} if chosen.values else set()
        for layers, base in zip(stacks, bases):
            with fetched(base):
                copied(base)  # other methods merge in-place
                layers[0].merge(**{"additive": False} if id(layers[0]) in by_value else {})
        _untie(model, shared)
        for edit in edited if chosen.values else ():
            values: Any = model.get_submodule((chosen.values or {})[edit.site])
            kept.append((values, [], Kept(values, [])))
            _add_bias(values, edit.layer.offsets(edit.layer.merged_adapters), model)
        zeros = [] if chosen.switch is None else switch_on(model, chosen.switch)
        yield chosen, zeros
    finally:
        for owner, name, child in wrappers:
            setattr(owner, name, child)
        for base, layers, before in reversed(kept):
            before.restore(base, layers)
        for owner, key in empty:
            owner._parameters[key] = None
        for part, fields in settings:
            part.__dict__.clear()
            part.__dict__.update(fields)
        model.__dict__.update(marks)


def _edited(model: nn.Module, stacks: list[list[Any]]) -> list[EditedSite]:
    """The sites with an additive edit and without a bias."""
    names = {id(module): name for name, module in model.named_modules()}
    return [
        EditedSite(names[id(layer.get_base_layer())], layer, position == 0)
        for layers in stacks
        for position, layer in enumerate(layers)
        if isinstance(layer, JolaLayer) and not layer.has_own_bias()
        if bool(layer.factors(layer.check_merge())[1].any())
    ]


def _add_bias(projection: Any, offset: Tensor, model: Any) -> None:
    """Adds an offset to a projection's bias, creating it if needed."""
    with fetched(projection):
        before = projection.bias
        weight = projection.weight
        dtype = weight.dtype if weight.is_floating_point() else getattr(model, "dtype", torch.float32)
        total = offset.flatten().to(weight.device)
        if before is not None:
            total, dtype = total + before.detach(), before.dtype
        projection.bias = nn.Parameter(total.to(dtype), requires_grad=False)


def _check(model: nn.Module, stacks: list[list[Any]], others: list[Any]) -> None:
    """Raises for adapters that cannot be folded, before anything is changed."""
    for layers in stacks:
        for layer in layers:
            site = getattr(layer, "site", type(layer).__name__)
            if layer.merged:
                raise ValueError(f"{site}: save_merged needs unmerged adapters, got {layer.merged_adapters} merged")
            if not hasattr(layer, "base_layer"):
                raise ValueError(
                    f"{site}: a {type(layer).__name__} cannot be folded into weights, so plain transformers would not "
                    "compute it. ctkernels.save_pretrained(model.merge_and_unload(), path) keeps the merged model with its "
                    "units, for ctkernels.load_pretrained; save_adapter keeps the adapters; or unload the curvature adapter"
                )
        base, site = layers[-1].get_base_layer(), getattr(layers[-1], "site", type(layers[-1]).__name__)
        if packing(base, site).quantised:
            if len(layers) > 1:
                raise ValueError(
                    f"{site}: cannot merge a stack of adapters into a quantised projection, which would be quantised again "
                    "for each; load the base model without quantisation and merge there"
                )
            if getattr(model, "hf_quantizer", None) is None:
                raise ValueError(
                    f"{site} is quantised, but the model's config has no quantization_config: transformers would load the saved "
                    "weights wrongly. Load the base with a quantization_config, or without quantisation"
                )
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
    """Pairs of modules that share a weight; the first will be merged."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for value in module._parameters.values():
            if value is not None:
                owners.setdefault(id(value), []).append(module)
    return [(base, other) for base in bases for other in owners[id(base.weight)] if other is not base]


def _untie(model: Any, shared: list[tuple[nn.Module, nn.Module]]) -> None:
    """Marks shared weights as untied in the config.

    Raises:
        ValueError: the config cannot express it, so that plain transformers would tie them again.
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
