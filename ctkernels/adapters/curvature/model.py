"""The tuner of Curvature Tuning: attaches CT units to a model's activations, and detaches them."""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ... import _marks
from ...steering.activations import ACTIVATIONS, select
from ...steering.handle import listed, nothing_found
from ...steering.patch import MODULE, AttributeEdit, LocalCopy, apply_patches, revert_patches
from ...steering.scan import ScanResult, Site, Unsteered, cached_class_code, is_steered, scan
from .._config import saved_shapes
from .._peft import (
    BASE,
    check_adapter_name,
    check_length,
    check_not_nested,
    check_requested,
    check_saved,
    check_state_dict,
    check_weighted,
    inject_new,
    own_base_layers,
    pass_adapter_names,
    plain_model,
)
from .config import CurvatureConfig
from .layer import CurvatureLayer, FixedUnit, Original
from .layout import Channels, SiteCall, channels_of, find_channels, find_samples
from .per_sample import adapters_by_sample
from .weighted import fill_weighted, weighted_config, weighted_values


@dataclass
class Attached:
    """Record of what was attached to a model, stored on the model, for further adapters."""

    modules: list[nn.Module]
    edits: list[AttributeEdit]
    copies: list[LocalCopy]
    sites: dict[str, Site]
    layers: dict[str, CurvatureLayer]  # by site
    samples: dict[str, bool] | None = (
        None  # by site, whether dimension 0 of its input holds the samples; None: not searched
    )


class CurvatureModel(BaseTuner):
    """Trains the curvature of a model's activations; created by `peft.get_peft_model(model, CurvatureConfig(...))`.

    Every activation of the model gets a `CurvatureLayer`; an adapter has parameters in those that its configuration
    selects, and the others run the original activation. `disable_adapter()` restores the original outputs, `unload()` also
    the original modules. One adapter can be active at a time; in evaluation, `adapter_names` of a call selects an adapter
    per sample, "__base__" for none, in one pass.

    It can be on top of a LoRA adapter: `get_peft_model(lora_model, CurvatureConfig())` trains both.

    Args:
        model: the model to adapt.
        config: the adapter's `CurvatureConfig`.
        adapter_name: its name.

    Raises:
        ValueError: there is no activation to adapt (near misses are listed), its channels cannot be found, or the
            model is steered. The model is unchanged.

    Examples:
        >>> model = get_peft_model(resnet18(), CurvatureConfig(modules_to_save=["fc"]))
        >>> model.print_trainable_parameters()
        trainable params: ...
    """

    prefix = "curvature_"
    tuner_layer_cls = CurvatureLayer

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.register_load_state_dict_pre_hook(partial(check_state_dict, (".curvature_",)))

    # ---- adding an adapter ----

    @cached_class_code()
    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter to the model; the first one also attaches the layers."""
        name: Any = kwargs.get("adapter_name", args[0] if args else None)
        check_adapter_name(name)
        config: Any = self.peft_config[name]
        if any(other is config for key, other in self.peft_config.items() if key != name):
            self.peft_config[name] = config = copy.copy(config)
        first = attached_to(model) is None
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        groups = _group_sites(model, config)
        if first:
            _attach(model)
            # Before peft's injection, which restores the flags that it finds.
            self._mark_only_adapters_as_trainable(model)
        attached = attached_to(model)
        assert attached is not None
        self._groups = {id(attached.layers[sites[0]]): (sites, channels) for sites, channels in groups}
        self._targets = {key for key, module in model.named_modules() if id(module) in self._groups}
        try:
            super().inject_adapter(model, *args, **kwargs)
        except BaseException:
            if first:
                detach(model)
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        shapes: dict[str, torch.Size] = {}
        for key in self._targets:
            _, channels = self._groups[id(model.get_submodule(key))]
            size = torch.Size((1 if channels is None else channels.size,))
            shapes |= {f"{key}.{table}": size for table in CurvatureLayer.adapter_layer_names}
        check_saved(saved_shapes(peft_config), shapes, model, peft_config)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        attached = attached_to(self.model)
        for layer in attached.layers.values() if attached is not None else ():
            layer.keep_resident()  # loading into an offloaded model offloads the adapter too
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        # `_group_sites` selects the sites; peft warns if an adapter excludes modules and none is of this type.
        return key in self._targets or (_ExcludedModule() if peft_config.exclude_modules else False)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        sites, channels = self._groups[id(target)]
        target.update_layer(adapter_name, peft_config, channels)
        attached = attached_to(self.model)
        assert attached is not None
        for site in sites[1:]:
            attached.layers[site].follow(adapter_name, peft_config, target)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezes everything except adapters, also of other methods, and modules_to_save."""
        kept: set[int] = set()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                tables = (getattr(module, name, None) for name in module.adapter_layer_names)
                kept.update(id(p) for table in tables if isinstance(table, nn.Module) for p in table.parameters())
            elif isinstance(module, AuxiliaryTrainingWrapper):
                kept.update(id(parameter) for parameter in module.parameters())
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates an adapter.

        Raises:
            ValueError: several names; units cannot be combined.
        """
        check_one_active(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Adds an adapter whose distance from the neutral beta and coeff is the weighted sum of other adapters' distances.

        With weights that sum to 1 its beta and coeff are weighted means; the units' outputs are not. It is not activated.

        Args:
            adapters: names of the adapters to combine.
            weights: one per adapter.
            adapter_name: name of the new adapter.
            combination_type: only "linear".

        Raises:
            ValueError: an argument is wrong (the message names it), an adapter has modules_to_save, or a beta or coeff
                would leave the range between 0 and 1. Nothing is added.

        Examples:
            >>> model = get_peft_model(resnet18(), CurvatureConfig(), "digits")
            >>> model.add_adapter("letters", CurvatureConfig())
            >>> model.add_weighted_adapter(["digits", "letters"], [0.5, 0.5], "both")
        """
        check_weighted(self.peft_config, adapters, weights, adapter_name, combination_type)
        attached = attached_to(self.model)
        assert attached is not None
        values = weighted_values(attached.layers, adapters, weights)
        inject_new(self, adapter_name, weighted_config(attached.layers, adapters))
        fill_weighted(attached.layers, values, adapter_name)

    # ---- one adapter per sample ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        requested = kwargs.pop("adapter_names", None)
        if requested is None:
            yield
            return
        attached = attached_to(self.model)
        assert attached is not None
        names = check_requested(requested, {*self.peft_config, BASE}, self.training)
        check_length(names, args, kwargs)
        self._find_samples(attached)
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        hook = partial(pass_adapter_names, names, threading.get_ident())
        handles = [wrapper.register_forward_pre_hook(hook, with_kwargs=True) for wrapper in wrappers]
        try:
            with adapters_by_sample(list(attached.layers.values()), names):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @cached_class_code()
    def _find_samples(self, attached: Attached) -> None:
        """Finds, once, the activations with the samples in dimension 0."""
        if attached.samples is None:
            configs: list[Any] = list(self.peft_config.values())
            shape = next((config.input_shape for config in configs if config.input_shape is not None), None)
            attached.samples = find_samples(self.model, None if shape is None else tuple(shape), _strip)
            for name, layer in attached.layers.items():
                layer.samples_first = attached.samples.get(name)

    # ---- merging, unloading ----

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fixes an adapter's values. A nonlinearity cannot be folded into weights: the units stay, at their cost."""
        warn_of_merge()
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> Any:
        check_not_nested(self.model)
        attached = attached_to(self.model)
        assert attached is not None
        if merge:
            warn_of_merge()
            for layer in attached.layers.values():
                layer.merge(safe_merge, adapter_names)
        unload: Any = super()._unload_and_optionally_merge
        with own_base_layers(self.model):
            model = unload(merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        if merge:
            fix_units(model)
        else:
            detach(model)
        return model


def check_one_active(adapter_name: str | list[str]) -> None:
    """Checks that at most one adapter is activated: units cannot be combined."""
    if not isinstance(adapter_name, str) and len(adapter_name) > 1:
        raise ValueError(f"adapter_name: one curvature adapter can be active at a time, got {list(adapter_name)}")


def warn_of_merge() -> None:
    """Warns that merging a curvature adapter only fixes its values."""
    warnings.warn(
        "A nonlinearity cannot be folded into the weights: merging fixes the learned values, and the activations stay "
        "fused CT units, with what those cost at run time. They are part of this object, not of its weights: a saved "
        "state_dict has their values under names that the plain network does not know, and save_pretrained refuses. "
        "To keep the result, save the adapter (save_pretrained of the PeftModel, before merging) and merge after "
        "loading.",
        UserWarning,
        stacklevel=4,
    )


def _refuse_to_save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Replaces `save_pretrained` of a transformers model while it has CT units."""
    if getattr(model, "_hf_peft_config_loaded", False):  # after `add_adapter`, it saves only the adapter
        return type(model).save_pretrained(model, *args, **kwargs)  # type: ignore[attr-defined]
    raise ValueError(
        f"save_pretrained: a {type(model).__name__} with CT units cannot be saved as a plain one; it would load without "
        "them and compute something else. Save the adapter instead (save_pretrained of the PeftModel, before merging), "
        "and load it with PeftModel.from_pretrained; or use ctkernels.save_pretrained after merging"
    )


def refuse_plain_saving(model: nn.Module) -> None:
    """Prevents a transformers model from being saved as the plain one."""
    plain = plain_model(model)  # a PeftModel only saves its adapters
    if hasattr(plain, "save_pretrained"):
        plain.__dict__[_marks.SAVE_PRETRAINED] = partial(_refuse_to_save, plain)


# ------------------------------------------------------------------------------------------------ attaching, detaching


def attached_to(model: nn.Module) -> Attached | None:
    """The record of what is attached to `model`, or None."""
    return model.__dict__.get(_marks.CURVATURE)


def _make_layer(site: Site, device: torch.device | None) -> Any:
    return CurvatureLayer(site.name, site.activation, device)


def scan_all(model: nn.Module) -> ScanResult:
    """Scans every use of every activation of a model, with a layer without adapters for each."""
    return scan(model, frozenset(ACTIVATIONS), split=True, make_unit=_make_layer)


def child_name(key: str) -> str:
    """The name of the child with the layer of site `key`."""
    return _marks.CHILD if key == MODULE else f"{_marks.CHILD}_" + re.sub(r"\W+", "_", key).strip("_")


def _attach(model: nn.Module) -> None:
    """Attaches a layer without adapters to every activation of the model."""
    result = scan_all(model)
    apply_patches(result.swaps, result.edits)
    for swap in result.swaps:
        layer: Any
        for key, layer in swap.units.items():
            swap.module._modules[child_name(key)] = layer
    layers = {site.name: layer for site, layer in zip(result.sites, result.units)}
    for name, layer in layers.items():
        layer.__dict__["around"] = _around(model, name)
    sites = {site.name: site for site in result.sites}
    refuse_plain_saving(model)
    model.__dict__[_marks.CURVATURE] = Attached(
        [swap.module for swap in result.swaps], result.edits, result.copies, sites, layers
    )


def _around(model: nn.Module, site: str) -> nn.Module:
    """The innermost module that a site is in."""
    while site:
        site = site.rpartition(".")[0]
        try:
            return model.get_submodule(site)
        except AttributeError:  # the last parts of the name are those of a call
            continue
    return model


def detach(model: nn.Module) -> None:
    """Reverts `_attach`: restores the model's modules and classes."""
    attached = model.__dict__.pop(_marks.CURVATURE)
    plain_model(model).__dict__.pop(_marks.SAVE_PRETRAINED, None)
    for module in attached.modules:
        for key in vars(module).get(_marks.UNITS, {}):
            module._modules.pop(child_name(key), None)
    revert_patches(attached.modules, attached.edits, attached.copies)


def fix_units(model: nn.Module) -> None:
    """Replaces layers with a merged adapter by fixed units, which do not need peft."""
    attached = model.__dict__.pop(_marks.CURVATURE)
    fixed: dict[int, FixedUnit] = {}
    for module in attached.modules:
        for key, layer in list(module._ctu.items()):
            module._modules.pop(child_name(key), None)
            name = layer.adapter_in_use()
            if name is None:
                module._ctu[key] = Original()
                continue
            shared = id(layer.parameters_of(name)[0])
            if shared not in fixed:
                beta, coeff = layer.logits_of(name)
                fixed[shared] = FixedUnit(beta, coeff, layer.curvature_channels[name], layer.site)
                module._modules[child_name(key)] = fixed[shared]
            module._ctu[key] = fixed[shared]


# ---------------------------------------------------------------------------------------------------------------- sites


def find_activations(model: nn.Module) -> list[Site]:
    """Lists the places where `model` applies an activation, with the names that `CurvatureConfig` uses.

    Examples:
        >>> [site.name for site in find_activations(resnet18())][:3]
        ['relu', 'layer1.0.relu', 'layer1.0.relu#2']
    """
    attached = attached_to(model)
    return list(attached.sites.values()) if attached is not None else scan_all(model).sites


def _group_sites(model: nn.Module, config: CurvatureConfig) -> list[tuple[list[str], Channels | None]]:
    """The sites of an adapter, grouped by shared parameters; writes the layout to `config`."""
    attached = attached_to(model)
    if attached is None and is_steered(model):
        raise ValueError("model: expected one that is not steered, got one that is; remove() its handle first")
    result = ScanResult(sites=list(attached.sites.values())) if attached is not None else scan_all(model)
    settle_layout(model, config, result)
    return sharing_groups(model, config, result.sites)


def settle_layout(model: nn.Module, config: CurvatureConfig, result: ScanResult) -> None:
    """Writes the selected sites and their channels to the configuration's `layout`, unless it has one."""
    if config.layout is None:
        sites = _selected(model, config, result)
        by_channel = config.granularity == "channel"
        config.layout = _layout(model, config, sites) if by_channel else dict.fromkeys(site.name for site in sites)


def sharing_groups(
    model: nn.Module, config: CurvatureConfig, sites: list[Site]
) -> list[tuple[list[str], Channels | None]]:
    """The sites in a configuration's layout, grouped by shared parameters; the first of a group owns them.

    Raises:
        ValueError: the layout names a site that the model does not have.
    """
    assert config.layout is not None
    known = {site.name: site for site in sites}
    foreign = [name for name in config.layout if name not in known]
    if foreign:
        raise ValueError(
            f"layout: expected activations of this {type(model).__name__} ({_some(list(known))}), got {_some(foreign)}"
        )
    groups: dict[Any, list[str]] = {}
    for name, site in known.items():  # in the model's order, not the file's: the first of a group owns the parameters
        if name not in config.layout:
            continue
        neutral = ACTIVATIONS[site.activation]
        shared = {"shared": (neutral.beta, neutral.coeff)}.get(config.granularity)
        groups.setdefault(shared or (site.module if config.share == "module" and site.module else name), []).append(
            name
        )
    result: list[tuple[list[str], Channels | None]] = []
    for names in groups.values():
        if config.granularity != "channel":
            result.append((names, None))
            continue
        entries = [None if config.layout[name] is None else Channels(*config.layout[name]) for name in names]
        alike = len(set(entries)) == 1
        result += [(names, entries[0])] if alike else [([name], entry) for name, entry in zip(names, entries)]
    return result


def _selected(model: nn.Module, config: CurvatureConfig, result: ScanResult) -> list[Site]:
    selection = select(config.activations)
    targets = SimpleNamespace(
        target_modules=r".*" if config.target_modules is None else config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        target_parameters=None,
    )
    sites = [site for site in result.sites if site.activation in selection]
    if not sites:
        result.skipped += [
            Unsteered(site.name, site.activation, "it is not among the activations") for site in result.sites
        ]
        raise ValueError(nothing_found(model, selection, result))
    chosen = [site for site in sites if check_target_module_exists(targets, site.name)]
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} matched no "
            f"activation. Activations of this model: {_some([site.name for site in sites], 8)}"
        )
    missed = [miss for miss in result.missed if miss.activation in selection]
    if missed:
        _warn(f"{len(missed)} activations cannot be adapted:\n{listed(missed, limit=10)}")
    return chosen


def _layout(model: nn.Module, config: CurvatureConfig, sites: list[Site]) -> dict[str, Any]:
    """{site: [dimension, channels]}, or None if unknown."""
    shape = None if config.input_shape is None else tuple(config.input_shape)
    uses, problem = find_channels(model, shape, _strip)
    reached = {site.module or site.name for site in sites if site.name in uses}
    # Some calls of a module may be in branches that the model does not take.
    unreached = [site.name for site in sites if (site.module or site.name) not in reached]
    if problem and unreached:
        raise ValueError(
            f"the channels of {_some(unreached)} could not be found: calling a copy of the model stopped with "
            f"{problem}. Give input_shape, or layout for these sites, or choose granularity='layer'"
        )
    if not reached:
        raise ValueError(f"no call of the model reaches {_some(unreached)}; give layout, or choose granularity='layer'")
    if unreached:
        _warn(f"no call of the model reaches {_some(unreached)}: they keep their activation")
    channels_at = {site.name: channels_of(uses[site.name]) for site in sites if site.name in uses}
    unknown = [name for name, channels in channels_at.items() if channels is None]
    if unknown:
        calls = "; ".join(f"{name}: {_show(uses[name])}" for name in unknown[:3])
        _warn(
            f"no single dimension holds the channels of {len(unknown)} activations, which get one beta and coeff each "
            f"(layout can say more): {calls}" + "; ..." * (len(unknown) > 3)
        )
    return {name: None if channels is None else [*channels] for name, channels in channels_at.items()}


def _warn(text: str) -> None:
    warnings.warn(f"CurvatureConfig: {text}", UserWarning, stacklevel=9)


def _strip(model: nn.Module) -> None:
    if attached_to(model) is not None:
        detach(model)


def _show(uses: list[SiteCall]) -> str:
    calls = dict.fromkeys((use.shape, "unknown" if use.axis is None else use.axis) for use in uses)
    return ", ".join(f"{shape} with channels in dimension {axis}" for shape, axis in calls)


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
