"""vLLM plugin that serves unmerged JoLA adapters, a different one per request: docs/pool.md.

vLLM loads it in each of its processes through the entry point `vllm.general_plugins`. It only affects engines started with
`additional_config={"ctkernels": "jola"}`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

OPTION = "ctkernels"
METHOD = "jola"


def register() -> None:
    """Makes engines with the option manage JoLA adapters instead of LoRA. A second call does nothing."""
    try:
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "ctkernels: this vLLM is not known, it cannot serve JoLA adapters: %s", error
        )
        return
    original = LoRAModelRunnerMixin.load_lora_model
    if getattr(original, "serves_jola", False):
        return

    @functools.wraps(original)
    def load_lora_model(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        fields = jola_fields(vllm_config.additional_config)
        if fields is None:
            return original(self, model, vllm_config, device)
        from .adapters.pool.vllm_engine import JolaManager

        self.lora_manager = JolaManager(vllm_config, model, device, fields)
        return model

    load_lora_model.serves_jola = True  # type: ignore[attr-defined]
    LoRAModelRunnerMixin.load_lora_model = load_lora_model


def jola_fields(additional_config: Any) -> dict[str, Any] | None:
    """Reads the fields of the `JolaConfig` from an engine's option; None for an engine without it.

    Raises:
        ValueError: the option is neither "jola" nor {"jola": fields}.

    Examples:
        >>> from ctkernels.vllm import jola_fields
        >>> jola_fields({"ctkernels": {"jola": {"edit": "additive"}}})
        {'edit': 'additive'}
    """
    option = additional_config.get(OPTION) if isinstance(additional_config, dict) else None
    if option is None:
        return None
    if option == METHOD:
        return {}
    if isinstance(option, dict) and set(option) == {METHOD} and isinstance(option[METHOD], dict):
        return option[METHOD]
    raise ValueError(
        f"additional_config[{OPTION!r}]: expected {METHOD!r}, or {{{METHOD!r}: fields of the JolaConfig}}, got {option!r}"
    )
