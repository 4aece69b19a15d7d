"""Converts a model to an equivalent architecture that has biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rehomed(NamedTuple):
    """An equivalent architecture: its class and config."""

    architecture: type
    config: Any

    def model(self, state: dict[str, Tensor]) -> Any:
        """A model of the architecture on the meta device, for `save_pretrained`; adds zeros for missing biases to `state`.

        Raises:
            ValueError: the architectures have other parameters.
        """
        with torch.device("meta"):
            model: Any = self.architecture(self.config)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        like = next(iter(state.values()))
        for name in shapes.keys() - state.keys():
            if name.endswith(".bias"):
                state[name] = torch.zeros(shapes[name], dtype=like.dtype, device=like.device)
        differing = sorted(
            name for name in shapes.keys() | state.keys() if shapes.get(name) != getattr(state.get(name), "shape", None)
        )
        if differing:
            raise ValueError(f"{self.architecture.__name__} has other parameters than the model: {differing[:3]}")
        return model


def rehomed(model: nn.Module, family: str, switches: Iterable[str]) -> Rehomed | str:
    """The equivalent of a model in another family with the biases of the config `switches`, or the reason against it."""
    import transformers

    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        return f"its attention sees {window} tokens back, and that of {family!r} sees all"
    template = transformers.AutoConfig.for_model(family)
    source = _class_prefix(type(config))
    name = _class_prefix(type(template)) + type(model).__name__.removeprefix(source)
    architecture = getattr(transformers, name, None)
    if architecture is None or not type(model).__name__.startswith(source):
        return f"transformers has no {family!r} model for a {type(model).__name__}"
    fields = config.to_dict()
    values = {key: fields[key] for key in template.to_dict() if key in fields and key not in _OWN_FIELDS}
    values |= dict.fromkeys(switches, True)
    other = type(template)(**values)
    other._attn_implementation = config._attn_implementation
    return Rehomed(architecture, other)


_OWN_FIELDS = (
    *("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map"),
    *("attention_bias", "mlp_bias"),
)


def _class_prefix(config: type) -> str:
    return config.__name__.removesuffix("Config")
