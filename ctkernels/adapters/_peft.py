"""The one place that knows how peft is found and how a method is added to it. Importing it needs peft."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def require_peft(what: str = "ctkernels.adapters", oldest: tuple[int, int] = (0, 18)) -> None:
    """Check that a supported peft is installed.

    Args:
        what: needs it.
        oldest: the oldest version that will do.

    Raises:
        ImportError: peft is missing, or older (the message names the extra to install).
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"{what} needs peft and transformers: pip install 'ctkernels[adapters]' (peft >= {oldest[0]}.{oldest[1]})"
        ) from error
    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if version < oldest:
        raise ImportError(
            f"{what} needs peft >= {oldest[0]}.{oldest[1]}, found {peft.__version__}: pip install -U 'ctkernels[adapters]'"
        )


require_peft()


def add_peft_type(name: str) -> Any:
    """Return the member `name` of `peft.PeftType`, adding it when it is not there.

    peft accepts a method only if its enum lists it, and the enum is closed to subclasses; so the member is built the
    way `enum` builds one, and entered in the enum's three tables. Doing it twice returns the same member.
    """
    from peft import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Register a tuner with peft under `name` (lower case). Registering again is a no-op."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if add_peft_type(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


BASE = "__base__"  # peft's name for no adapter
UNIT = ".jola_unit_"  # in the names of tensors that older files lack, all of them or none
_NAMES_IN_USE = frozenset(dir(nn.ParameterDict()))  # an adapter's name becomes an attribute of one


def check_adapter_name(name: Any) -> None:
    """Check that an adapter's name can be a part of a tensor's name and the name of a folder.

    Raises:
        ValueError: it is empty, a path, has a dot or a character that file systems refuse, or means something already.
    """
    if not isinstance(name, str) or not name.strip() or name in _NAMES_IN_USE or name == BASE:
        raise ValueError(f"adapter_name must be a word that is not in use otherwise, got {name!r}")
    found = re.search(r"""[./\\:*?"<>|\x00-\x1f\x7f]""", name)
    if found:
        raise ValueError(
            f"adapter_name must not contain {found.group()!r}, got {name!r}: it names a folder and a part of tensor names"
        )


def check_weighted(
    configs: Mapping[str, Any], adapters: Any, weights: Any, adapter_name: str, combination_type: str
) -> None:
    """Check the arguments of `add_weighted_adapter`.

    Raises:
        ValueError: adapters that are not there, other modules trained beside them, not one finite weight for each, a name
            that is taken, or a combination other than the linear one.
    """
    unknown = [name for name in adapters if name not in configs]
    if isinstance(adapters, str) or not adapters or unknown:
        raise ValueError(f"adapters must be a list of some of {sorted(configs)}, got {adapters!r}")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be a finite number for each of {list(adapters)}, got {weights!r}")
    if adapter_name in configs:
        raise ValueError(f"adapter_name must be one that is not there yet, got {adapter_name!r}")
    if combination_type != "linear":
        raise ValueError(f"combination_type must be 'linear', got {combination_type!r}")
    beside = [name for name in adapters if configs[name].modules_to_save]
    if beside:
        raise ValueError(
            f"adapters must have no modules_to_save, which add_weighted_adapter does not combine, got {beside[0]!r} with "
            f"{configs[beside[0]].modules_to_save}"
        )


def inject_new(tuner: Any, adapter_name: str, config: Any) -> None:
    """Put an adapter into a tuner's model; an error leaves no trace in its list."""
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        tuner.peft_config.pop(adapter_name, None)
        raise


def check_requested(names: Any, known: set[str], training: bool) -> list[str]:
    """The `adapter_names` of a call as a list.

    Raises:
        ValueError: the model is in training mode (in the words of peft), or there is an unknown name.
    """
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names must be a list of names, got {names!r}")
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"adapter_names must be among {sorted(known)}, got {unknown}")
    return list(names)


def check_length(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hold `adapter_names` against the batch, the first dimension of a call's first tensor; there may be none yet.

    Raises:
        ValueError: they are not as many, in the words of peft.
    """
    named = [kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")]
    tensors = (value for value in (*args, *named, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0)
    rows = next((tensor.shape[0] for tensor in tensors), None)
    if rows is not None and rows != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )


def merged_in_batch(site: str, merged: list[str]) -> ValueError:
    """The error for `adapter_names` while adapters are merged, in the words of peft."""
    return ValueError(
        f"{site}: Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. Merged: "
        f"{merged}"
    )


def pass_adapter_names(names: list[str], thread: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Give a layer the adapters of its samples: a forward pre-hook, for the calls of one thread.

    peft's modules that are trained beside adapters want a name for each row of their input, which has those of a
    sample (beams, returned sequences) side by side.
    """
    if threading.get_ident() == thread:
        trained = hasattr(module, "original_module")
        rows = len(args[0]) // len(names) or 1 if trained and args else 1
        kwargs["adapter_names"] = [name for name in names for _ in range(rows)]
    return args, kwargs


def plain_model(model: Any) -> Any:
    """The model inside all `PeftModel`s around it."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def check_not_nested(model: nn.Module) -> None:
    """Check that what a tuner adapts is no `PeftModel` itself, before adapters are unloaded.

    Raises:
        ValueError: it is; peft would take out the layers of both, and stop there.
    """
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "model: expected a model with one PeftModel around it, got one inside another, which peft takes apart "
            "only halfway; save the adapters of each, or, where JoLA is among them and all fold into weights, save_merged"
        )


@contextmanager
def own_base_layers(model: nn.Module) -> Iterator[None]:
    """Keeps peft's unloading off the model's own modules that happen to have a part named ``base_layer`` (timm's DLA).

    peft takes every module with such a part for one of its layers, unless it brings its way of being unloaded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    way = "unload_and_optionally_merge_module"
    own = [m for m in model.modules() if "base_layer" in m._modules and not isinstance(m, BaseTunerLayer)]
    own = [m for m in own if not hasattr(m, way)]
    for module in own:
        setattr(module, way, lambda module=module, **_: module)
    try:
        yield
    finally:
        for module in own:
            delattr(module, way)


def check_saved(saved: dict[str, torch.Size], own: dict[str, torch.Size], model: nn.Module, config: Any) -> None:
    """Check the tensors of a saved adapter against a model, before it is changed.

    Args:
        saved: shapes of the file's tensors by name; empty if there is no file to check.
        own: shapes of the parameters that the adapter will have, by their name in `model` without the adapter's name.
        model: the base model.
        config: the adapter's configuration.

    Raises:
        ValueError: tensors that are unknown, missing, of another shape, or that would overwrite the base model.
    """
    if not saved or getattr(model, "_checkpoint_conversion_mapping", None):
        return  # in the second case peft renames tensors while it loads them
    start = "base_model.model."
    given = {name.removeprefix(start): shape for name, shape in saved.items()}
    beside: dict[str, torch.Size] = {}
    prefixes = config.tensor_prefixes(vars(config))
    for name, shape in given.items():
        if any(f".{prefix}" in f".{name}" for prefix in prefixes):
            continue
        owner = name.rpartition(".")[0]
        if any(f".{kept}." in f".{owner}." for kept in config.modules_to_save or []):
            beside[name] = shape
        elif _is_embedding(model, owner):
            beside[name] = shape
            warnings.warn(f"The saved adapter replaces the base model's embeddings, {name}", UserWarning, stacklevel=6)
        else:
            raise ValueError(
                f"The saved adapter would overwrite {name} of the base model: expected tensors named "
                f"{', '.join(f'{prefix}*' for prefix in prefixes)} and those of modules_to_save={config.modules_to_save}"
            )
    tensors = {key: value.shape for key, value in [*model.named_parameters(), *model.named_buffers()]}
    for name, shape in beside.items():
        expected = _beside(tensors, name)
        if expected is not None and expected != shape:
            raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(shape)} in the saved adapter")
    check_names(own, {name: shape for name, shape in given.items() if name not in beside})


def _is_embedding(model: Any, name: str) -> bool:
    getters = [getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")]
    try:
        module = model.get_submodule(name)
        return any(get is not None and get() is module for get in getters)
    except (AttributeError, NotImplementedError):
        return False


def _beside(tensors: dict[str, torch.Size], name: str) -> torch.Size | None:
    """The shape of what `modules_to_save` has under this name, also where an adapter wraps it already."""
    owner, _, leaf = name.rpartition(".")
    return tensors.get(name, tensors.get(f"{owner}.original_module.{leaf}"))


def check_names(own: dict[str, torch.Size], given: dict[str, torch.Size]) -> None:
    """Check that a set of tensors is the expected one, but for units, which may be missing altogether.

    Raises:
        ValueError: some are unknown, missing or of another shape.
    """
    if not any(UNIT in name for name in given):
        own = {name: shape for name, shape in own.items() if UNIT not in name}
    foreign = sorted(set(given) - set(own))
    if foreign:
        raise ValueError(f"The adapter does not fit this model: unknown {foreign[:3]}" + ", ..." * (len(foreign) > 3))
    missing = sorted(set(own) - set(given))
    if missing:
        raise ValueError(f"The adapter is incomplete: missing {missing[:3]}" + ", ..." * (len(missing) > 3))
    for name, shape in given.items():
        if shape != own[name]:
            raise ValueError(f"{name}: expected shape {tuple(own[name])}, got {tuple(shape)}")


def check_state_dict(
    markers: tuple[str, ...], model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Refuse an adapter's tensors (those with a marker in their names) that do not fit, before any of them is copied."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = {f"{prefix}{name}": value.shape for name, value in tensors if any(marker in name for marker in markers)}
    if any("_fsdp_wrapped_module" in name for name in own):
        return  # FSDP1 renames and flattens parameters, and checks them itself
    given = {name: value for name, value in state_dict.items() if any(marker in name for marker in markers)}
    adapters = {owner for name in given if (owner := _adapter_of(name, markers)) is not None}
    expected = {name: shape for name, shape in own.items() if _adapter_of(name, markers) in adapters}
    check_names(expected, {name: value.shape for name, value in given.items()})
    for name, value in given.items():
        if not value.is_meta and not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    for name, module in model.named_modules():
        merged = sorted(adapters & set(getattr(module, "merged_adapters", ())))
        if merged and hasattr(module, "base_layer"):
            raise ValueError(f"{name}: cannot load the adapters {merged} while they are merged; unmerge them first")


def _adapter_of(name: str, markers: tuple[str, ...]) -> str | None:
    """Whose tensor it is: "default" of `x.jola_m.default` and of `x.lora_A.default.weight`; None without a marker."""
    for marker in markers:
        parts = name.rpartition(marker)[2].split(".")
        if marker in name and len(parts) > 1:
            return parts[1]
    return None
