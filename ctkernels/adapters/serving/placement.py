"""Placement of a merged model's additive edits, such that plain transformers and the target runtimes read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from ..jola.bias import Switch, bias_switch, families
from ..jola.layer import JolaLayer
from ..jola.runtimes import REHOMES, RUNTIMES, TARGETS, listed, reads
from ..jola.sites import value_projection
from .rehome import Rehomed, rehomed


class Placement(NamedTuple):
    """A placement of additive edits.

    `where`: in words. `values`: the value projection of each site, whose bias holds the offset; None: the bias of the output
    projection does. `switch` turns the bias on in the config, `home` is the architecture to save as.
    """

    where: str
    values: dict[str, str] | None = None
    switch: Switch | None = None
    home: Rehomed | None = None


class EditedSite(NamedTuple):
    """A site whose additive edit needs a bias: its name and layer, and whether no other adapter wraps the layer."""

    site: str
    layer: JolaLayer
    outermost: bool


def targets_of(model: nn.Module, target: str | None) -> tuple[str, ...]:
    """The target runtimes of a merged model: the one named, else all that are known to serve its family."""
    if target is not None:
        return (target,)
    names = dict.fromkeys(name for family in families(model) for name in listed(family))
    return tuple(names) or ("transformers",)


def choose_placement(
    model: nn.Module, edited: list[EditedSite], target: str | None, can_run: Callable[[str], bool]
) -> Placement:
    """Chooses the placement of the additive edits of a model.

    Args:
        model: the model without peft's wrappers, unmerged.
        edited: the sites without a bias and with a nonzero additive edit.
        target: the runtime that will serve the model; None: all that are known to serve its family.
        can_run: whether a runtime is installed and can be tried if nothing is known about it.

    Raises:
        ValueError: there is no placement that all of them read; the message says which of them read one.
    """
    if not edited:
        return Placement("the weights alone")
    targets = targets_of(model, target)
    result = _first(model, edited, targets, can_run)
    if isinstance(result, Placement):
        return result
    others = [name for name in TARGETS if name not in targets or len(targets) > 1]
    served = [name for name in others if isinstance(_first(model, edited, (name,), can_run), Placement)]
    names = ", ".join(RUNTIMES[name].name for name in targets)
    reasons = "; ".join(f"as {kind}: {reason}" for kind, reason in result.items())
    of_heads = [edit.layer for edit in edited if edit.layer.edits == "head"]
    by_head = any(layer.jola_config[name].additive == "head" for layer in of_heads for name in layer.check_merge())
    trained = ["training with additive='kv_group'"] * by_head + ["training with edit='multiplicative'"]
    ways = [*(f"target={name!r}" for name in served), *trained, "saving the adapter"]
    raise ValueError(
        f"Cannot save a merged model: the additive edits have no place that {names} would read. {reasons}. Ways out: "
        f"{', '.join(ways)}"
    )


def _first(
    model: nn.Module, edited: list[EditedSite], targets: tuple[str, ...], can_run: Callable[[str], bool]
) -> Placement | dict[str, str]:
    """The first placement that all targets read, else the reason against each."""
    reasons: dict[str, str] = {}
    for kind, find in (
        ("biases of the output projections", _in_output),
        ("biases of the value projections", _in_value),
        ("a model of another architecture", _in_other_family),
    ):
        result = find(model, edited, targets, can_run)
        if isinstance(result, Placement):
            return result
        reasons[kind] = result
    return reasons


def _unread(
    names: Iterable[str], targets: Iterable[str], projection: str, can_run: Callable[[str], bool]
) -> str | None:
    """Why a target does not read the biases of a `projection` (as in `reads`); None if all do."""
    for target in targets:
        known = [answer for answer in (reads(name, target, projection) for name in names) if answer is not None]
        if known and not all(known):
            return f"{RUNTIMES[target].name} {RUNTIMES[target].unread}"
        if not known and not can_run(target):
            what = "biases of this family's MLPs" if projection == "mlp" else "this family"
            return f"nothing is known of {RUNTIMES[target].name} with {what}, and it is not installed here to be tried"
    return None


def _projection(edited: list[EditedSite]) -> str:
    """The kind of projection whose bias stores the additive edits, as in `reads`."""
    return "mlp" if any(edit.layer.edits == "mlp" for edit in edited) else "output"


def _in_output(
    model: nn.Module, edited: list[EditedSite], targets: tuple[str, ...], can_run: Callable[[str], bool]
) -> Placement | str:
    switch = bias_switch(model, [f"{edit.site}.bias" for edit in edited])
    if switch is None:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        return f"the architecture {family!r} has no bias in {edited[0].site}, and no config switch for one"
    problem = _unread(families(model), targets, _projection(edited), can_run)
    return problem or Placement("biases of the output projections", switch=switch)


def _in_value(
    model: nn.Module, edited: list[EditedSite], targets: tuple[str, ...], can_run: Callable[[str], bool]
) -> Placement | str:
    values: dict[str, str] = {}
    for edit in edited:
        if edit.layer.edits != "head":
            return f"{edit.site} ends an MLP, whose output no values make"
        name = value_projection(model, edit.site)
        if name is None:
            return f"{edit.site} has no value projection of its own beside it"
        if name in values.values():
            return f"{name} makes the values of several output projections"
        attention: Any = model.get_submodule(edit.site.rpartition(".")[0])
        if getattr(attention, "sinks", None) is not None:
            return f"the attention around {edit.site} has sinks, so that its weights do not sum to 1"
        if not edit.outermost:
            return f"another adapter wraps the JoLA adapter of {edit.site}, and would see the offset"
        try:
            edit.layer.offsets(edit.layer.check_merge())
        except ValueError as error:
            return str(error)
        values[edit.site] = name
    missing = [name for name in values.values() if getattr(model.get_submodule(name), "bias", None) is None]
    switch = bias_switch(model, [f"{name}.bias" for name in missing]) if missing else None
    if missing and switch is None:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        return f"the architecture {family!r} has no bias in {missing[0]}, and no config switch for one"
    problem = _unread(families(model), targets, "value", can_run) if missing else None
    return problem or Placement("biases of the value projections", values, switch)


def _in_other_family(
    model: nn.Module, edited: list[EditedSite], targets: tuple[str, ...], can_run: Callable[[str], bool]
) -> Placement | str:
    family = getattr(getattr(model, "config", None), "model_type", "")
    other = REHOMES.get(family)
    if other is None:
        return f"none is known that computes what {family!r} does and has room for it"
    problem = _unread([other], targets, _projection(edited), can_run)
    if problem is not None:
        return problem
    home = rehomed(model, other, {"mlp_bias" if edit.layer.edits == "mlp" else "attention_bias" for edit in edited})
    return (
        home if isinstance(home, str) else Placement(f"biases of the output projections of a {other} model", home=home)
    )
