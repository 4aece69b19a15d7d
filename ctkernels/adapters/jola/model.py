"""The tuner: adds JoLA layers to a model and removes them."""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..._marks import ATTENTION_FUSION, BLOCK_OUTPUT
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
)
from .bias import hold_bias
from .blocks import block_widths, default_outputs, find_blocks, output_heads
from .config import JolaConfig
from .coverage import left_out
from .fold import to_merge
from .layer import KINDS, BlockOutput, JolaLayer
from .sites import SiteHeads, default_targets, near_misses, site_heads, unused_sites, unwrapped
from .weighted import fill_weighted, weighted_config


class JolaModel(BaseTuner):
    """Edits the attention heads, MLPs or blocks of a model; created by `peft.get_peft_model(model, JolaConfig(...))`.

    Args:
        model: the model to adapt.
        config: the adapter's `JolaConfig`.
        adapter_name: its name.

    Raises:
        ValueError: no site was found, or one cannot be edited; the message names the module. The model is unchanged.

    Source: JoLA, arXiv 2502.01179.

    Examples:
        >>> import ctkernels.adapters
        >>> base = AutoModelForCausalLM.from_pretrained("llama")
        >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
    """

    prefix = "jola_"
    tuner_layer_cls = JolaLayer

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.register_load_state_dict_pre_hook(partial(check_state_dict, (".jola_",)))

    # ---- finding sites ----

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Choose the targets and check every site before any module is replaced."""
        targets, sites = planned_sites(model, peft_config)
        self._planned = sites
        shapes = parameter_shapes(peft_config, sites)
        check_saved(saved_shapes(peft_config), shapes, model, peft_config)
        if peft_config.target_modules is None:
            _warn_of_missed(model, peft_config, list(sites))
        for name, reason in unused_sites(model).items():
            if name in sites:
                warnings.warn(f"{name}: its edit has no effect, {reason}", UserWarning, stacklevel=2)
        peft_config.target_modules = targets

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # without the layer fields, which peft treats differently for lists and for regular expressions
        names = ("target_modules", "exclude_modules", "modules_to_save")
        matched = check_target_module_exists(
            SimpleNamespace(target_parameters=None, **{name: getattr(peft_config, name) for name in names}), key
        )
        return matched if not matched or peft_config.selects_layer(key) else False

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        beside = peft_config.site == "block"
        present: Any = target._modules.get(BLOCK_OUTPUT) if beside else target
        if isinstance(present, JolaLayer):
            present.update_layer(adapter_name, peft_config)
            return
        heads = self._planned[current_key]
        base = BlockOutput(target) if beside else target
        layer = JolaLayer(base, heads.number, heads.dim, current_key, heads.values, peft_config.site)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config)
        layer.train(target.training)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if beside:
            layer.stand_beside(target)
        else:
            self._replace_module(parent, target_name, layer, target)
            layer.watch(parent)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, JolaLayer):
            setattr(
                parent, child_name, new_module
            )  # peft's version moves parameters to the base's device, even to meta
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model, including projections registered under several names."""
        name: Any = kwargs.get("adapter_name", args[0] if args else None)
        check_adapter_name(name)
        config = self.peft_config[name]
        if any(other is config for key, other in self.peft_config.items() if key != name):
            self.peft_config[name] = copy.copy(config)  # freezing and dropping heads change one adapter's config
        super().inject_adapter(model, *args, **kwargs)
        wrappers = {id(layer.base_layer): layer for layer in jola_layers(model)}
        for owner in model.modules():
            if not isinstance(owner, JolaLayer):
                for leaf, child in owner.named_children():
                    if id(child) in wrappers:
                        setattr(owner, leaf, wrappers[id(child)])
                        wrappers[id(child)].watch(owner)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose edit of each head is the weighted sum of the edits of other adapters in evaluation.

        Its gates are open and frozen. It is not activated.

        Args:
            adapters: names of the adapters to combine.
            weights: one weight per adapter.
            adapter_name: name of the new adapter.
            combination_type: only "linear".

        Raises:
            ValueError: an argument is wrong (the message names it), or an adapter has modules_to_save.

        Examples:
            >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"), "polite")
            >>> model.add_adapter("short", JolaConfig(task_type="CAUSAL_LM"))
            >>> model.add_weighted_adapter(["polite", "short"], [0.5, 0.5], "both")
        """
        check_weighted(self.peft_config, adapters, weights, adapter_name, combination_type)
        inject_new(self, adapter_name, weighted_config(self.model, adapters))
        fill_weighted(self.model, adapters, weights, adapter_name)

    # ---- switching, merging, unloading ----

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in jola_layers(self.model):
            layer.keep_resident()  # loading onto an offloaded model offloads the adapter too
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Raises:
            ValueError: there is no adapter of that name, or it is merged.
        """
        for layer in jola_layers(self.model):
            if adapter_name in layer.merged_adapters:
                raise ValueError(  # the message of newer versions of peft
                    f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
                )
        super().delete_adapter(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into every layer, or into none if one layer cannot be merged.

        Raises:
            ValueError: a name is unknown, or a layer cannot be merged (see `JolaLayer.merge`).
        """
        self._check_merge_allowed()
        tuners: list[Any] = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        known = {name for layer in tuners for name in layer._get_available_adapters()}
        unknown = [name for name in adapter_names or [] if name not in known]
        if unknown:
            raise ValueError(f"adapter_names must be among {sorted(known)}, got {unknown}")
        with self._all_or_none(adapter_names, safe_merge) as done:
            for layer in tuners:
                if to_merge(layer, adapter_names):
                    with onload_layer(layer):
                        done.append((layer, list(layer.merged_adapters)))
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Restore the original weights, bit for bit."""
        for layer in [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]:
            if layer.merged:
                with nullcontext() if isinstance(layer, JolaLayer) else onload_layer(layer):
                    layer.unmerge()

    @contextmanager
    def _all_or_none(self, adapter_names: list[str] | None, safe_merge: bool) -> Iterator[list[tuple[Any, list[str]]]]:
        """Merge the JoLA layers; an error, here or in the block, undoes it and the merges that the block recorded."""
        layers = list(jola_layers(self.model))
        for layer in layers:
            layer.check_merge(adapter_names)
        before = [(layer, list(layer.merged_adapters)) for layer in layers]
        done: list[tuple[Any, list[str]]] = []
        try:
            for layer in layers:
                layer.merge(safe_merge, adapter_names)
            yield done
            _tell_of_rounding(layers)
        except BaseException:
            for tuner, names in [*reversed(done), *before]:
                if tuner.merged_adapters != names:
                    tuner.unmerge()
                    if names:
                        tuner.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        check_not_nested(self.model)
        layers = list(jola_layers(self.model))
        beside = {layer.site: layer for layer in layers if layer.edits == "block"}
        unbiased = [layer.site for layer in layers if layer.edits != "block" and not layer.has_own_bias()]
        if merge:
            with self._all_or_none(adapter_names, safe_merge):
                pass
        else:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
        for layer in layers:
            layer.unwatch()
        for name, layer in beside.items():
            layer.leave(self.model.get_submodule(name))
        for module in self.model.modules():
            if ATTENTION_FUSION in vars(module):
                vars(module)[ATTENTION_FUSION].remove()
        unload: Any = super()._unload_and_optionally_merge
        with own_base_layers(self.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")  # they are, by the block above
            model = unload(merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
        for owner in model.modules():  # a projection registered under several names
            for name, child in owner.named_children():
                if isinstance(child, JolaLayer):
                    setattr(owner, name, child.get_base_layer())
        created = [site for site in unbiased if merge and model.get_submodule(site).bias is not None]
        if created:
            of_mlp = any(layer.edits == "mlp" and layer.site in created for layer in layers)
            problem = hold_bias(model, created, "mlp" if of_mlp else "output")
            if problem:
                warnings.warn(
                    f"The merged model is right in memory, but {problem}; saved with save_pretrained and loaded again "
                    "it would lose the additive edits. Keep the adapter, or save it with another architecture.",
                    UserWarning,
                    stacklevel=3,
                )
        return model

    # ---- one adapter per row of a batch ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        known = {name for layer in jola_layers(self.model) for name in layer.jola_config} | {BASE}
        names = check_requested(names, known, self.training)
        check_length(names, args, kwargs)
        thread = threading.get_ident()
        handles = [
            self.register_forward_pre_hook(
                lambda _, args, kwargs: check_length(names, args, kwargs) if threading.get_ident() == thread else None,
                with_kwargs=True,
            )
        ]
        try:
            for module in self.modules():
                if isinstance(module, (JolaLayer, AuxiliaryTrainingWrapper)):
                    hook = partial(pass_adapter_names, names, thread)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def jola_layers(model: nn.Module) -> Iterator[JolaLayer]:
    """The JoLA layers of a model, in its order."""
    return (module for module in model.modules() if isinstance(module, JolaLayer))


def planned_sites(model: nn.Module, config: Any) -> tuple[Any, dict[str, SiteHeads]]:
    """Find the sites that an adapter with this configuration edits.

    Returns:
        `target_modules` (the default ones where the configuration has None), and the heads of every site by name.

    Raises:
        ValueError: there is no site, one cannot be edited, or `layers_to_transform` or `heads` match no site.
    """
    targets = config.target_modules
    if targets is None:
        default = default_targets(model) if config.site == "head" else default_outputs(model, config.site)
        targets = default if isinstance(default, str) else set(default)
    probe = _with_targets(config, targets)
    names = [name for name, _ in unwrapped(model) if name and JolaModel._check_target_module_exists(probe, name)]
    if not names:
        raise ValueError(
            f"target_modules={config.target_modules!r} with layers_to_transform="
            f"{config.layers_to_transform!r} matched no module. {near_misses(model)}"
        )
    unused = probe.unused(names)
    if unused:
        raise ValueError(f"layers_to_transform and heads name {unused}, where no module is to be edited")
    widths = block_widths(model) if config.site == "block" else {}
    sites = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, JolaLayer):
            if module.edits != config.site:
                raise ValueError(
                    f"{name}: another adapter edits this module with site={module.edits!r}, so site={config.site!r} is not "
                    "possible; name other modules with target_modules"
                )
            module = module.get_base_layer()
        if config.site == "head":
            sites[name] = site_heads(model, name, module, config.head_dim)
        else:
            sites[name] = output_heads(model, name, module, config.site, config.head_dim, widths.get(name))
    return targets, sites


def layer_name(config: JolaConfig, site: str) -> str:
    """The name of the adapter layer of a site."""
    return f"{site}.{BLOCK_OUTPUT}" if config.site == "block" else site


def parameter_shapes(config: JolaConfig, sites: dict[str, SiteHeads]) -> dict[str, torch.Size]:
    """The shapes of an adapter's parameters and units at `sites`, by name in the model."""
    shapes: dict[str, torch.Size] = {}
    for site, heads in sites.items():
        name = layer_name(config, site)
        for kind, edited in zip(KINDS, config.heads_of(site, heads.number, heads.values)):
            count = (heads.number if edited is None else len(edited)) // config.shared(kind, heads.number, heads.values)
            if count:
                shapes[f"{name}.jola_{kind}"] = torch.Size((count, heads.dim))
                shapes[f"{name}.jola_log_alpha_{kind}"] = torch.Size((count,))
                shapes[f"{name}.jola_unit_log_alpha"] = torch.Size(())
                if kind == "a":
                    shapes[f"{name}.jola_unit_a"] = torch.Size((count,))
    return shapes


def _with_targets(config: JolaConfig, targets: Any) -> JolaConfig:
    probe = copy.copy(config)
    probe.target_modules = targets
    return probe


def _warn_of_missed(model: nn.Module, config: JolaConfig, sites: list[str]) -> None:
    """Warn about attention modules or MLPs that the default targets leave out."""
    what, listing = "attention", "ctkernels.adapters.print_coverage shows all of it; "
    pairs = left_out(model, config, sites) if config.site == "head" else iter(())
    if config.site == "mlp":
        what, listing = "MLPs", ""
        pairs = ((block.name, block.reason) for block in find_blocks(model) if block.mlp is None)
    missed: dict[str, str] = {}
    for name, reason in pairs:
        missed.setdefault(re.sub(r"(?<=\.)\d+\b", "*", name), re.sub(r"(?<=\.)\d+\b", "*", reason))
    if missed:
        listed = "; ".join(f"{name} ({reason})" for name, reason in missed.items())
        warnings.warn(
            f"JoLA edits only a part of this model's {what}: {listed}. {listing}name what is meant with target_modules, or "
            "leave these out with exclude_modules.",
            UserWarning,
            stacklevel=3,
        )


def _tell_of_rounding(layers: list[JolaLayer]) -> None:
    """Warn about the error of requantised merged weights."""
    errors = [layer.merge_error for layer in layers if layer.merged and layer.merge_error]
    if errors:
        warnings.warn(
            f"The merged weights of {len(errors)} quantised projections were quantised anew, which changes each by up to "
            f"{100 * max(errors):.2g} % of its norm; merged into the base model without quantisation they would be exact.",
            UserWarning,
            stacklevel=4,
        )
