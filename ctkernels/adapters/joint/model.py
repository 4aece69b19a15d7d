"""The tuner of an adapter of several methods: runs each method's own tuner on one model, under one name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from torch import Tensor, nn

from .._config import saved_shapes
from .._peft import BASE, check_adapter_name, check_saved, check_state_dict, check_weighted, inject_new
from ..curvature import weighted as weighted_units
from ..curvature.layer import CurvatureLayer
from ..curvature.model import CurvatureModel, attached_to, check_one_active, detach, fix_units, warn_of_merge
from ..jola import weighted as weighted_edits
from ..jola.layer import JolaLayer
from ..jola.model import JolaModel
from .config import JointConfig


class _Lora(LoraModel):
    """LoRA whose layers are below JoLA's, also if they are added later."""

    def _create_and_replace(  # type: ignore[override]  # LoraModel's own differs from its base's
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(target, JolaLayer):
            parent, target_name, target = target, "base_layer", target.base_layer
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)


_TUNERS: dict[str, type[BaseTuner]] = {"lora": _Lora, "jola": JolaModel, "curvature": CurvatureModel}
_MARKERS = tuple(f".{method}_" for method in _TUNERS)  # parts of their tensor names


class JointModel(BaseTuner):
    """Trains several methods on one model as one adapter; created by `peft.get_peft_model(model, JointConfig(...))`.

    Each method's own tuner adds and removes its layers. Operations on all layers (switching, deleting, freezing, saving) are
    implemented here, once.

    One adapter can be active at a time, as curvatures cannot be combined. In evaluation, `adapter_names` of a call selects an
    adapter per sample.

    `merge_and_unload()` folds JoLA's edits and LoRA into the weights. Activations cannot be folded: they stay CT units
    with fixed values, and `ctkernels.save_pretrained` saves such a model.

    Args:
        model: the model to adapt.
        config: the adapter's `JointConfig`.
        adapter_name: its name.

    Raises:
        ValueError: a method finds nothing to adapt, or the model has other adapters. The model is unchanged.

    Examples:
        >>> model = get_peft_model(base, JointConfig(task_type="CAUSAL_LM"))
    """

    prefix = "joint_"
    tuner_layer_cls: Any = (LoraLayer, JolaLayer, CurvatureLayer)
    _create_and_replace: Any = None  # called by a method's tuner on itself

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        _check_plain(model)
        super().__init__(model, *args, **kwargs)
        self.register_load_state_dict_pre_hook(partial(check_state_dict, _MARKERS))

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.peft_config = self.peft_config  # that of a model with joint adapters
        self._tuners: dict[str, Any] = {}  # not registered as children: they share the model

    def _tuner(self, method: str) -> Any:
        """A method's tuner, synchronised with this one."""
        tuner = self._tuners[method]
        tuner.model, tuner.training, tuner.active_adapter = self.model, self.training, self.active_adapter
        return tuner

    # ---- adding an adapter ----

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Adds an adapter to the model: all of its methods, or none."""
        check_adapter_name(adapter_name)
        # A copy: tuners complete their parts of the configuration in place.
        config: Any = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        listed = vars(model).pop("peft_config", None)  # a tuner would adopt this dictionary
        saved = saved_shapes(config)
        try:
            for method, part in config.parts().items():
                if method in self._tuners:
                    tuner = self._tuner(method)
                    tuner.peft_config[adapter_name] = part
                    tuner.inject_adapter(
                        model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
                    )
                else:
                    self._tuners[method] = _TUNERS[method](
                        model, {adapter_name: part}, adapter_name, low_cpu_mem_usage, state_dict
                    )
                    del vars(model)["peft_config"]
            vars(model)["peft_config"] = self.peft_config
            check_saved(saved, _shapes(model, adapter_name), model, config)
        except BaseException:
            if first:
                self._unload(False)
                self._tuners.clear()
            else:
                self._delete(adapter_name)
            del self.peft_config[adapter_name]
            vars(model).pop("peft_config", None)
            if listed is not None:
                vars(model)["peft_config"] = listed
            _restore(flags)
            raise
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if not first:
            _restore(flags)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for method in self._tuners:
            self._tuner(method)._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Adds a combination of adapters, like `add_weighted_adapter` of `JolaModel` and `CurvatureModel`.

        Args:
            adapters: names of the adapters to combine.
            weights: one per adapter.
            adapter_name: name of the new adapter.
            combination_type: only "linear".

        Raises:
            ValueError: an argument is wrong (the message names it), an adapter has LoRA or modules_to_save, or a beta or
                coeff would leave the range between 0 and 1. Nothing is added.

        Examples:
            >>> model = get_peft_model(base, JointConfig(task_type="CAUSAL_LM"), "polite")
            >>> model.add_adapter("short", JointConfig(task_type="CAUSAL_LM"))
            >>> model.add_weighted_adapter(["polite", "short"], [0.5, 0.5], "both")
        """
        check_weighted(self.peft_config, adapters, weights, adapter_name, combination_type)
        configs: Any = self.peft_config
        low_rank = [name for name in adapters if configs[name].lora is not None]
        if low_rank:
            raise ValueError(
                f"adapters must have no LoRA, whose sum has another rank, got {low_rank[0]!r} with it; merge it into the "
                "weights, or combine adapters without"
            )
        attached = attached_to(self.model)
        assert attached is not None
        values = weighted_units.weighted_values(attached.layers, adapters, weights)
        config = JointConfig(
            task_type=configs[adapters[0]].task_type,
            jola=weighted_edits.weighted_config(self.model, adapters),
            curvature=weighted_units.weighted_config(attached.layers, adapters),
        )
        inject_new(self, adapter_name, config)
        weighted_edits.fill_weighted(self.model, adapters, weights, adapter_name)
        weighted_units.fill_weighted(attached.layers, values, adapter_name)

    # ---- switching, deleting ----

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates an adapter.

        Raises:
            ValueError: several names; curvatures cannot be combined.
        """
        check_one_active(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter.

        Raises:
            ValueError: there is none of that name, or it is merged.
        """
        super().delete_adapter(adapter_name)
        self._delete(adapter_name)

    def _delete(self, adapter_name: str) -> None:
        """Deletes an adapter from the layers and from its methods' tuners."""
        delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls)
        for tuner in self._tuners.values():
            tuner.peft_config.pop(adapter_name, None)

    # ---- one adapter per sample ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        with ExitStack() as stack:
            if names is not None:
                if "lora" in self._tuners and isinstance(names, list):
                    known = self._tuners["lora"].peft_config  # peft refuses the names of adapters without LoRA
                    lora_names = [BASE if name in self.peft_config and name not in known else name for name in names]
                    stack.enter_context(
                        self._tuner("lora")._enable_peft_forward_hooks(*args, **kwargs | {"adapter_names": lora_names})
                    )
                by_row: Any = JolaModel._enable_peft_forward_hooks  # on this module, which the call goes through
                stack.enter_context(by_row(self, *args, **kwargs))
                stack.enter_context(self._tuner("curvature")._enable_peft_forward_hooks(*args, **kwargs))
            yield

    # ---- merging, unloading ----

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Folds an adapter's edits and LoRA into the weights, and fixes its curvatures; on an error, does nothing.

        Raises:
            ValueError: there is no adapter of a name, or a layer cannot be merged (see `JolaLayer.merge`).
        """
        warn_of_merge()
        self._tuner("jola").merge_adapter(adapter_names, safe_merge)  # the layers of all methods

    def unmerge_adapter(self) -> None:
        """Restores the original weights, bit for bit."""
        self._tuner("jola").unmerge_adapter()

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> Any:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        return self._unload(merge, progressbar, adapter_names)

    def _unload(self, merge: bool, progressbar: bool = False, adapter_names: Any = None) -> Any:
        """Removes the units of activations, or fixes them if merged, then the layers."""
        if attached_to(self.model) is not None:
            (fix_units if merge else detach)(self.model)
        unload: Any = super()._unload_and_optionally_merge
        if "jola" in self._tuners:
            unload = self._tuner("jola")._unload_and_optionally_merge
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            return unload(merge, progressbar=progressbar, adapter_names=adapter_names)

    # ---- saving ----

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        arguments = (adapter_name, state_dict, unwanted_adapter_names)
        if config.lora is not None:
            return LoraModel._get_adapter_state_dict(model, config.lora, *arguments)
        return super()._get_adapter_state_dict(model, config, *arguments)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if config.lora is not None:
            return LoraModel._remap_adapter_state_dict_for_load(model, config.lora, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_plain(model: nn.Module) -> None:
    """Checks that a model has only joint adapters."""
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "model: expected one without adapters, got a PeftModel; give its base model, and LoRA as JointConfig(lora=...)"
        )
    others = [config for config in getattr(model, "peft_config", {}).values() if not isinstance(config, JointConfig)]
    if others:
        raise ValueError(
            f"model: expected one without other adapters, got one with a {type(others[0]).__name__}; JointConfig(jola=..., "
            "curvature=..., lora=...) holds them all"
        )


def _shapes(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    """The shapes of an adapter's tensors by their names in files, without modules_to_save."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: value.shape for name, value in tensors.items() if any(marker in name for marker in _MARKERS)}


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
