"""The configuration of an adapter of several methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig

from .._config import AdapterConfig
from .._peft import method_key, require_peft
from ..curvature.config import CurvatureConfig
from ..jola.config import JolaConfig

# The methods, in the order of injection: LoRA's layers are below JoLA's.
METHODS: dict[str, type[PeftConfig]] = {"lora": LoraConfig, "jola": JolaConfig, "curvature": CurvatureConfig}
# Fields of the whole adapter, which its parts do not repeat.
_COMMON = ("task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")


@dataclass
class JointConfig(AdapterConfig):
    """Configuration of one adapter with JoLA's edits, trainable Curvature Tuning and, optionally, LoRA.

    Each method works as it does alone: JoLA edits the attention heads, Curvature Tuning the activations. LoRA on an output
    projection that JoLA edits is below the edit: the projection `(W + BA)` receives the edited heads.

    Args:
        jola: JoLA's part, or a dictionary of its fields. Default: `JolaConfig()`.
        curvature: the part of Curvature Tuning, likewise. Default: `CurvatureConfig()`.
        lora: LoRA's part, likewise. Default: None, no LoRA.
        modules_to_save: other modules to train and save with the adapter. Like `task_type`, set it here and not in a part.

    Raises:
        ValueError: a part is not a configuration of its method, or sets a field that belongs here, or a LoRA trains
            biases; the message names the field.
        ImportError: peft is older than 0.21, which cannot save an adapter of several methods.

    Examples:
        >>> config = JointConfig(task_type="CAUSAL_LM", jola=JolaConfig(gate_sampling="row"))
        >>> model = get_peft_model(base, config)
    """

    method: ClassVar[str] = "JOINT"

    jola: JolaConfig = field(default_factory=JolaConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    lora: LoraConfig | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        require_peft("JointConfig", (0, 21))
        super().__post_init__()
        self.peft_type = method_key(self.method)
        for name, kind in METHODS.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = kind.from_peft_type(**value)
                setattr(self, name, value)
            if not isinstance(value, kind) and (name, value) != ("lora", None):
                expected = f"a {kind.__name__}" + " or None" * (name == "lora")
                raise ValueError(f"JointConfig: {name} must be {expected}, got {value!r}")
        for name, config in self._methods().items():
            for key in ("task_type", "modules_to_save"):
                value = getattr(config, key)
                if value and value != getattr(self, key):
                    raise ValueError(f"JointConfig: give {key} to JointConfig itself, got {value!r} in {name}")
        if self.lora is not None and self.lora.bias != "none":
            raise ValueError(f"JointConfig: lora.bias must be 'none', got {self.lora.bias!r}")

    @classmethod
    def tensor_prefixes(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Prefixes of the methods' tensor names."""
        return tuple(f"{name}_" for name in METHODS if values.get(name) is not None)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary. Parts do not repeat fields of the whole adapter."""
        values = super().to_dict()
        for name, config in self._methods().items():
            part = config.to_dict()
            values[name] = {key: part[key] for key in part if key not in (*_COMMON, "modules_to_save")}
        return values

    def parts(self) -> dict[str, PeftConfig]:
        """The complete configurations of its methods by name, in the order of injection."""
        for config in self._methods().values():
            for key in (*_COMMON, "modules_to_save"):
                setattr(config, key, getattr(self, key))
        return self._methods()

    def _methods(self) -> dict[str, PeftConfig]:
        return {name: getattr(self, name) for name in METHODS if getattr(self, name) is not None}
