"""Base class of adapter configurations: reading and writing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import PeftConfig

from .._files import write_text
from ._files import check_adapter_folder
from ._peft import method_key
from .card import write_adapter_card

_SAVED = "_saved_shapes"


class AdapterConfig(PeftConfig):
    """A configuration that is written atomically, and whose folder is checked before it is read."""

    method: ClassVar[str]

    @classmethod
    def tensor_prefixes(cls, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Prefixes of an adapter's tensor names, after the module's name. `values`: of its configuration."""
        return (f"{cls.method.lower()}_",)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary."""
        return super().to_dict() | {"peft_type": self.method}

    @classmethod
    def from_peft_type(cls, **values: Any) -> Any:
        """A configuration of this class, with the fields of a file."""
        if cls.method == values.get("peft_type"):
            values["peft_type"] = method_key(cls.method)
        return super().from_peft_type(**values)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json` atomically, and the model card if the folder has weights."""
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory must be a folder, got the file {save_directory}")
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        values = self.to_dict()
        if auto_mapping is not None:
            values["auto_mapping"] = auto_mapping
        text = json.dumps(values, indent=2, sort_keys=True, default=sorted) + "\n"  # sets become lists
        write_text(os.path.join(save_directory, "adapter_config.json"), text)
        write_adapter_card(save_directory, values)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Reads the configuration of a saved adapter, after checking a local folder (nothing is unpickled).

        The first adapter created from it is checked against the saved weights before the model is changed. For an
        adapter without these weights, use `dataclasses.replace(config)`.

        Raises:
            ValueError: the folder has no readable safetensors file, only a pickle, non-finite values, or another
                method's adapter.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        shapes = check_adapter_folder(folder, cls.method, cls.tensor_prefixes) if os.path.isdir(folder) else {}
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if shapes:
            config.__dict__[_SAVED] = shapes
        return config


def saved_shapes(config: PeftConfig) -> dict[str, torch.Size]:
    """Shapes of the saved tensors of a configuration read from a folder, at the first call; empty otherwise."""
    return config.__dict__.pop(_SAVED, {})
