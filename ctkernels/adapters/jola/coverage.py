"""A report of the attention modules that JoLA edits, those that it does not, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .._peft import plain_model
from .config import JolaConfig
from .layer import JolaLayer
from .sites import find_attention, unused_sites


@dataclass(frozen=True)
class AttentionCoverage:
    """One attention module of a model.

    Attributes:
        name: its name in the model.
        kind: its class's name.
        site: its output projection; None if none was recognised.
        adapters: the JoLA adapters that edit it.
        reason: why no adapter edits it; "" if one does.
    """

    name: str
    kind: str
    site: str | None
    adapters: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The attention modules of a model, in its order; printed with one line per stack of layers."""

    attention: tuple[AttentionCoverage, ...]

    @property
    def edited(self) -> list[AttentionCoverage]:
        """The modules that an adapter edits."""
        return [module for module in self.attention if module.adapters]

    @property
    def skipped(self) -> list[AttentionCoverage]:
        """The modules that no adapter edits; each has a `reason`."""
        return [module for module in self.attention if not module.adapters]

    def __str__(self) -> str:
        stacks: dict[tuple[str, str], list[AttentionCoverage]] = {}
        for module in self.attention:
            stacks.setdefault((re.sub(r"(?<=\.)\d+\b", "*", module.name), module.kind), []).append(module)
        rows = [("attention", "class", "edited", "left out because")]
        for (name, kind), modules in stacks.items():
            reasons = dict.fromkeys(re.sub(r"(?<=\.)\d+\b", "*", module.reason) for module in modules if module.reason)
            edited = sum(bool(module.adapters) for module in modules)
            rows.append((name, kind, f"{edited} of {len(modules)}", "; ".join(reasons)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def coverage(model: nn.Module) -> Coverage:
    """Report which attention modules of a model its JoLA adapters with `site="head"` edit.

    Args:
        model: any model, with or without JoLA adapters.

    Returns:
        the attention modules, each with the adapters that edit it, or the reason why none does.

    Examples:
        >>> model = get_peft_model(base, JolaConfig(exclude_modules=["model.layers.0.self_attn.o_proj"]))
        >>> coverage(model).skipped[0].reason
        'left out by exclude_modules'
    """
    inner = plain_model(model)
    every = {name: module for name, module in inner.named_modules() if isinstance(module, JolaLayer)}
    layers = {name: layer for name, layer in every.items() if layer.edits == "head"}
    configs = {name: config for layer in layers.values() for name, config in layer.jola_config.items()}
    unused = unused_sites(inner)
    attentions: list[AttentionCoverage] = []
    recognised: set[str] = set()
    for attention in find_attention(inner):
        inside = [name for name in layers if name == attention.site or name.startswith(f"{attention.name}.")]
        recognised.update(inside)
        names = tuple(dict.fromkeys(name for site in inside for name in layers[site].jola_config))
        site = inside[0] if inside else attention.site
        reason = "" if names else _reason(configs, attention.name, site, attention.reason, unused, bool(every))
        attentions.append(AttentionCoverage(attention.name, attention.kind, site, names, reason))
    for name, layer in layers.items():
        if name not in recognised:  # in target_modules, but not recognised as part of an attention
            around = name.rpartition(".")[0]
            kind = type(inner.get_submodule(around)).__name__
            attentions.append(AttentionCoverage(around, kind, name, tuple(layer.jola_config), ""))
    return Coverage(tuple(attentions))


def print_coverage(model: nn.Module) -> None:
    """Print `coverage`: the attention modules that are edited, those that are not, and why.

    Args:
        model: any model, with or without JoLA adapters.

    Examples:
        >>> print_coverage(get_peft_model(base, JolaConfig(layers_to_transform=[1])))
        attention                      class             edited    left out because
        model.layers.*.self_attn       LlamaAttention    1 of 2    ...
    """
    print(coverage(model))


def _reason(
    configs: dict[str, JolaConfig], name: str, site: str | None, problem: str, unused: dict[str, str], adapted: bool
) -> str:
    if site is None:
        return problem
    if site in unused:
        return unused[site]
    if not configs:
        return "its JoLA adapters edit no heads" if adapted else "the model has no JoLA adapter"
    return "; ".join(
        dict.fromkeys(_choice(config, name, site) or "not in target_modules" for config in configs.values())
    )


def _choice(config: JolaConfig, name: str, site: str | None) -> str:
    """The setting other than `target_modules` that leaves an attention module out; "" if none does."""
    names = [name] if site is None else [name, site]
    if any(excluded(config, module) for module in names):
        return "left out by exclude_modules"
    if not any(config.selects_layer(f"{module}.") for module in names):
        return "left out by layers_to_transform or heads"
    return ""


def excluded(config: JolaConfig, name: str) -> bool:
    """Whether `exclude_modules` matches the module."""
    everything = SimpleNamespace(
        target_modules=".*", exclude_modules=config.exclude_modules, modules_to_save=None, target_parameters=None
    )
    return not check_target_module_exists(everything, name)


def left_out(model: nn.Module, config: JolaConfig, sites: list[str]) -> Iterator[tuple[str, str]]:
    """Name and reason of each attention module that is not among `sites` and that no setting of `config` leaves out."""
    unused = unused_sites(model)
    for attention in find_attention(model):
        covered = attention.site in sites or any(site.startswith(f"{attention.name}.") for site in sites)
        if not covered and attention.site not in unused and not _choice(config, attention.name, attention.site):
            yield attention.name, attention.reason or "its family's entry in the table does not name it"
