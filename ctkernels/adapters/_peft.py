"""The one place that knows how peft is found and how a method is added to it. Importing it needs peft."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def require_peft() -> None:
    """Check that a supported peft is installed.

    Raises:
        ImportError: peft is missing, or older than 0.18 (the message names the extra to install).
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "ctkernels.adapters needs peft and transformers: pip install 'ctkernels[adapters]' (peft >= 0.18, < 0.22)"
        ) from error
    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if version < (0, 18):
        raise ImportError(
            f"ctkernels.adapters needs peft >= 0.18, < 0.22, found {peft.__version__}: "
            "pip install -U 'ctkernels[adapters]'"
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


def check_state_dict(part: str, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse an adapter's tensors (those with `part` in their names) that do not fit, before any of them is copied."""
    parameters = model.named_parameters(remove_duplicate=False)
    own = {f"{prefix}{name}": value for name, value in parameters if part in name}
    if any("_fsdp_wrapped_module" in name for name in own):
        return  # FSDP1 renames and flattens parameters, and checks them itself
    given = {name: value for name, value in state_dict.items() if part in name}
    foreign = sorted(set(given) - set(own))
    if foreign:
        raise ValueError(f"The adapter does not fit this model: unknown {foreign[:3]}" + ", ..." * (len(foreign) > 3))
    adapters = {name.rsplit(".", 1)[-1] for name in given}
    missing = sorted(name for name in own if name.rsplit(".", 1)[-1] in adapters and name not in given)
    if missing:
        raise ValueError(f"The adapter is incomplete: missing {missing[:3]}" + ", ..." * (len(missing) > 3))
    for name, value in given.items():
        if value.shape != own[name].shape:
            raise ValueError(f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(value.shape)}")
