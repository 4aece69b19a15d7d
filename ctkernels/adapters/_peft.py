"""Integration with peft: version check, registration of methods, checks of names and saved tensors."""

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
    """Checks that a supported version of peft is installed.

    Args:
        what: the feature that needs it, for the message.
        oldest: the oldest supported version.

    Raises:
        ImportError: peft is missing or too old (the message names the extra to install).
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


_BESIDE = "CTKERNELS_"  # before the name of a method that peft has itself


class Method(str):
    """The key of one of this package's methods in peft's tables.

    peft and transformers compare it with strings and with members of `peft.PeftType`, which are strings too, and read its
    `value`. So the enum, which cannot be extended, needs no member for it.
    """

    @property
    def value(self) -> str:
        """The method's name, with which its tensors begin and which is in an adapter's file."""
        return self.removeprefix(_BESIDE)


def method_key(name: str) -> Method:
    """The key of the method `name` (upper case): its name, unless peft has a method of that name itself."""
    from peft import PeftType

    return Method(f"{_BESIDE}{name}" if name in PeftType.__members__ else name)


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Enters a tuner into peft's tables, as `peft.utils.register_peft_method` does for members of its enum.

    A method of peft's own with that name stays as it is: peft then loads adapters by name with its own code, and this
    package's class serves those that are made from this package's configuration.
    """
    from peft import mapping

    tables: Any = mapping  # typed for members of the enum
    key = method_key(name.upper())
    tables.PEFT_TYPE_TO_CONFIG_MAPPING[key] = config_cls
    tables.PEFT_TYPE_TO_TUNER_MAPPING[key] = model_cls
    tables.PEFT_TYPE_TO_PREFIX_MAPPING[key] = f"{name}_"


BASE = "__base__"  # peft's name for no adapter
UNIT = ".jola_unit_"  # part of the names of tensors that older files lack altogether
_NAMES_IN_USE = frozenset(dir(nn.ParameterDict()))  # an adapter's name becomes an attribute of a ParameterDict


def check_adapter_name(name: Any) -> None:
    """Checks that an adapter's name can be part of tensor names and the name of a folder.

    Raises:
        ValueError: it is empty or reserved, or contains a dot or a character that file systems refuse.
    """
    if not isinstance(name, str) or not name.strip() or name in _NAMES_IN_USE or name == BASE:
        raise ValueError(f"adapter_name must be a word that is not in use otherwise, got {name!r}")
    forbidden = re.search(r"""[./\\:*?"<>|\x00-\x1f\x7f]""", name)
    if forbidden:
        raise ValueError(
            f"adapter_name must not contain {forbidden.group()!r}, got {name!r}: it names a folder and a part of tensor names"
        )


def check_weighted(
    configs: Mapping[str, Any], adapters: Any, weights: Any, adapter_name: str, combination_type: str
) -> None:
    """Checks the arguments of `add_weighted_adapter`.

    Raises:
        ValueError: unknown adapters, adapters with modules_to_save, a number of finite weights other than that of adapters,
            a name in use, or a combination other than the linear one.
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
    """Adds an adapter to a tuner's model; on an error, removes it from the tuner's list."""
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        tuner.peft_config.pop(adapter_name, None)
        raise


def check_requested(names: Any, known: set[str], training: bool) -> list[str]:
    """The `adapter_names` of a call as a list.

    Raises:
        ValueError: the model is in training mode (peft's message), or a name is unknown.
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
    """Check the length of `adapter_names` against the batch size, the first dimension of the call's first tensor, if any.

    Raises:
        ValueError: they differ (peft's message).
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
    """The error, with peft's message, for `adapter_names` while adapters are merged."""
    return ValueError(
        f"{site}: Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. Merged: "
        f"{merged}"
    )


def pass_adapter_names(names: list[str], thread: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Forward pre-hook that passes the samples' adapters to a layer, for the calls of one thread.

    peft's wrappers of modules_to_save expect a name for each row of their input, in which the rows of a sample (beams,
    returned sequences) are adjacent.
    """
    if threading.get_ident() == thread:
        trained = hasattr(module, "original_module")
        rows = len(args[0]) // len(names) or 1 if trained and args else 1
        kwargs["adapter_names"] = [name for name in names for _ in range(rows)]
    return args, kwargs


def plain_model(model: Any) -> Any:
    """The model inside any number of `PeftModel`s."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def check_not_nested(model: nn.Module) -> None:
    """Checks, before adapters are unloaded, that a tuner's model is not a `PeftModel` itself.

    Raises:
        ValueError: it is; peft would remove the layers of both but not the inner PeftModel.
    """
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "model: expected a model with one PeftModel around it, got one inside another, which peft takes apart "
            "only halfway; save the adapters of each, or, where JoLA is among them and all fold into weights, save_merged"
        )


@contextmanager
def own_base_layers(model: nn.Module) -> Iterator[None]:
    """Protects the model's own modules with a child named ``base_layer`` (timm's DLA) from peft's unloading.

    peft unloads every module with such a child, unless it has its own method for that.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    method = "unload_and_optionally_merge_module"
    modules = [m for m in model.modules() if "base_layer" in m._modules and not isinstance(m, BaseTunerLayer)]
    modules = [m for m in modules if not hasattr(m, method)]
    for module in modules:
        setattr(module, method, lambda module=module, **_: module)
    try:
        yield
    finally:
        for module in modules:
            delattr(module, method)


def check_saved(saved: dict[str, torch.Size], expected: dict[str, torch.Size], model: nn.Module, config: Any) -> None:
    """Checks the tensors of a saved adapter against a model, before the model is changed.

    Args:
        saved: shapes of the file's tensors by name; empty without a file.
        expected: shapes of the adapter's parameters, by their names in `model` without the adapter's name.
        model: the base model.
        config: the adapter's configuration.

    Raises:
        ValueError: tensors that are unknown, missing, of another shape, or that would overwrite the base model.
    """
    if not saved or getattr(model, "_checkpoint_conversion_mapping", None):
        return  # in the second case peft renames tensors while loading
    shapes = {name.removeprefix("base_model.model."): shape for name, shape in saved.items()}
    beside: dict[str, torch.Size] = {}  # tensors of modules_to_save, and of replaced embeddings
    prefixes = config.tensor_prefixes(vars(config))
    for name, shape in shapes.items():
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
        current = _beside(tensors, name)
        if current is not None and current != shape:
            raise ValueError(f"{name}: expected shape {tuple(current)}, got {tuple(shape)} in the saved adapter")
    check_names(expected, {name: shape for name, shape in shapes.items() if name not in beside})


def _is_embedding(model: Any, name: str) -> bool:
    getters = [getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")]
    try:
        module = model.get_submodule(name)
        return any(get is not None and get() is module for get in getters)
    except (AttributeError, NotImplementedError):
        return False


def _beside(tensors: dict[str, torch.Size], name: str) -> torch.Size | None:
    """The current shape of a tensor in `modules_to_save`, also if another adapter already wraps its module."""
    owner, _, leaf = name.rpartition(".")
    return tensors.get(name, tensors.get(f"{owner}.original_module.{leaf}"))


def check_names(expected: dict[str, torch.Size], shapes: dict[str, torch.Size]) -> None:
    """Checks the names and shapes of tensors. Units may be missing altogether.

    Raises:
        ValueError: some are unknown, missing or of another shape.
    """
    if not any(UNIT in name for name in shapes):
        expected = {name: shape for name, shape in expected.items() if UNIT not in name}
    foreign = sorted(set(shapes) - set(expected))
    if foreign:
        raise ValueError(f"The adapter does not fit this model: unknown {foreign[:3]}" + ", ..." * (len(foreign) > 3))
    missing = sorted(set(expected) - set(shapes))
    if missing:
        raise ValueError(f"The adapter is incomplete: missing {missing[:3]}" + ", ..." * (len(missing) > 3))
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(f"{name}: expected shape {tuple(expected[name])}, got {tuple(shape)}")


def check_state_dict(
    markers: tuple[str, ...], model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Checks an adapter's tensors (with a marker in their names) in a state dict, before any is copied."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shapes = {f"{prefix}{name}": value.shape for name, value in tensors if any(marker in name for marker in markers)}
    if any("_fsdp_wrapped_module" in name for name in shapes):
        return  # FSDP1 renames and flattens parameters, and checks them itself
    values = {name: value for name, value in state_dict.items() if any(marker in name for marker in markers)}
    adapters = {owner for name in values if (owner := _adapter_of(name, markers)) is not None}
    expected = {name: shape for name, shape in shapes.items() if _adapter_of(name, markers) in adapters}
    check_names(expected, {name: value.shape for name, value in values.items()})
    for name, value in values.items():
        if not value.is_meta and not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    for name, module in model.named_modules():
        merged = sorted(adapters & set(getattr(module, "merged_adapters", ())))
        if merged and hasattr(module, "base_layer"):
            raise ValueError(f"{name}: cannot load the adapters {merged} while they are merged; unmerge them first")


def _adapter_of(name: str, markers: tuple[str, ...]) -> str | None:
    """The adapter in a tensor's name: "default" in `x.jola_m.default` and `x.lora_A.default.weight`; None without a marker."""
    for marker in markers:
        parts = name.rpartition(marker)[2].split(".")
        if marker in name and len(parts) > 1:
            return parts[1]
    return None
