"""Finding every activation of a model. Nothing is run, nothing is changed."""

from __future__ import annotations

import functools
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx
from torch import nn

from . import unit
from .activations import FORMS, FUNCTIONS, METHODS, NearMiss, Use, activation_of, read_module, read_partial
from .class_code import Call, ClassCode
from .lookup import is_activation, is_listed, is_torch, known_calls, mentions
from .reach import reached
from .surgery import DECIDING, MODULE, Copy, Edit, Steered, Swap, steered_class

_PLAIN_MODULE = frozenset(nn.Module().__dict__)
_LOOKS_LIKE = re.compile("relu|gelu|silu|swish|mish", re.IGNORECASE)
_Code = dict[tuple[type, frozenset[str], frozenset[str]], ClassCode]  # by class, selection, and children told apart
_KEPT: ContextVar[_Code | None] = ContextVar("_KEPT", default=None)


@dataclass(frozen=True)
class Site:
    """A place where the model applies an activation.

    Attributes:
        name: unique; "layer1.0.relu" for a module, "aux1.forward:relu" for a call in ``aux1``'s ``forward`` (the second
            one there is "aux1.forward#2:relu"), "encoder.activation:relu" for a function held as an attribute.
        kind: "module" or "functional"; "call" for a further call of a shared module whose uses are told apart.
        activation: a name that ``steer``'s ``activations`` takes.
        module_type: class of the module, or of the module whose code makes the call.
        aliases: the other names of a module that is registered several times.
        where: "file:line" of a call in source code, else "".
        module: first name of the shared module that this is one use of, where the uses are told apart, else "".
    """

    name: str
    kind: str
    activation: str
    module_type: str
    aliases: tuple[str, ...] = ()
    where: str = ""
    module: str = ""


@dataclass(frozen=True)
class Miss:
    """An activation that is not steered: where, which, and why."""

    name: str
    activation: str
    reason: str
    where: str = ""


@dataclass
class Plan:
    """What is to be done to a model, and what was found on the way."""

    sites: list[Site] = field(default_factory=list)
    knobs: list[Any] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)
    skipped: list[Miss] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


def survey(
    model: nn.Module,
    selection: frozenset[str],
    *,
    split: bool = False,
    make: Callable[[Site, torch.device | None], unit.SiteKnobs | unit.Unit] | None = None,
) -> Plan:
    """Find the activations of ``model``.

    Args:
        split: tell the uses of a shared activation module apart: a site for each place where it is registered, and for
            each call of it in its parent's code. Otherwise an activation module is one site.
        make: what gives a site its knobs. Default: :class:`SiteKnobs`.
    """
    return _Survey(model, selection, split, make or _own_knobs).plan


@contextmanager
def reading_once() -> Iterator[None]:
    """Inside, surveys read each class once: of a model and its copies, whose code cannot change meanwhile.

    Reading is the time that a survey takes, about a second for a model of transformers.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def _own_knobs(site: Site, device: torch.device | None) -> unit.SiteKnobs:
    return unit.SiteKnobs(device)


class _Survey:
    def __init__(self, model: nn.Module, selection: frozenset[str], split: bool, make: Callable[..., Any]) -> None:
        self.selection, self.split, self.make, self.plan = selection, split, make, Plan()
        self.root = model
        self.copies: dict[nn.Module, Copy] = {}  # in use only if something is done to them
        self.apart: dict[tuple[nn.Module, str], Copy] = {}  # in one place only: {(parent, name there): the copy}
        self.memo: dict[types.FunctionType, bool] = {}
        kept = _KEPT.get()
        self.code: _Code = {} if kept is None else kept
        self.names: dict[nn.Module, list[str]] = {}
        self.device = next((p.device for p in model.parameters()), None)
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.places: dict[nn.Module, list[tuple[str, nn.Module, str]]] = {}
        for parent, (name, *_) in self.names.items():
            for child, held in parent._modules.items():
                if held is not None:
                    self.places.setdefault(held, []).append((_join(name, child), parent, child))
        opaque: set[nn.Module] = set()
        for module, (name, *aliases) in list(self.names.items()):
            for parameter in module.parameters(recurse=False):
                self.device = parameter.device  # of the layers before it, for a model spread over devices
            if module in opaque:
                continue
            if isinstance(module, torch.jit.ScriptModule):
                opaque.update(module.modules())
                self.scripted(name, module)
            elif isinstance(module, torch.fx.GraphModule):
                self.graph(name, module)
            else:
                self.module(name, tuple(aliases), module)
        for module in self.names:
            if isinstance(module, DECIDING):
                self.deciding(module)
        classes = {swap.module: swap.cls for swap in self.plan.swaps}
        for module in self.names:
            self.bound_methods(module, classes)
        self.put_copies()

    # -- copies

    def own(self, module: nn.Module) -> nn.Module:
        """What is changed where ``module`` is: a copy, unless it is the model itself or its weights make it one object.

        Other models may hold the same activation, and are to stay as they are. Modules with weights are shared on
        purpose where they are shared.
        """
        if module is self.root or not (isinstance(read_module(module), Use) or _is_stateless(module)):
            return module
        if module not in self.copies:
            self.copies[module] = Copy.of(module)
        return self.copies[module].copy

    def put_copies(self) -> None:
        """Put the copies that something is done to where the modules are, and those of the modules that hold them."""
        edited = {(edit.owner, edit.name) for edit in self.plan.edits}
        changed = {swap.module for swap in self.plan.swaps} | {edit.owner for edit in self.plan.edits}
        used = {module: found.copy for module, found in self.copies.items() if found.copy in changed}
        todo = [*used, *(module for parent, name in self.apart if (module := parent._modules[name]) is not None)]
        references: dict[tuple[nn.Module, str], tuple[Any, Any]] = {}
        while todo:
            holders = {parent for module in todo for _, parent, _ in self.places.get(module, ())}
            for module in self.names:
                for attribute, value in vars(module).items():
                    if attribute not in _PLAIN_MODULE and (self.own(module), attribute) not in edited:
                        new = _with_copies(value, used)
                        if new is not value:
                            references[module, attribute] = value, new
                            holders.add(module)
            todo = [module for module in holders if self.own(module) is not module and module not in used]
            used |= {module: self.own(module) for module in todo}
        for (module, attribute), (value, new) in references.items():
            self.plan.edits.append(Edit(self.own(module), "__dict__", attribute, value, new))
        for parent in self.names:
            for child, module in parent._modules.items():
                apart = self.apart.get((parent, child))
                new = apart.copy if apart is not None else used.get(module)  # type: ignore[arg-type]
                if new is not None:
                    self.plan.edits.append(Edit(self.own(parent), "_modules", child, module, new))
        self.plan.copies += [self.copies[module] for module in used] + list(self.apart.values())

    # -- one module

    def module(self, name: str, aliases: tuple[str, ...], module: nn.Module) -> None:
        read = read_module(module)
        if isinstance(read, Use):
            self.activation_module(name, aliases, module, read)
            return
        before = len(self.plan.sites), len(self.plan.missed), len(self.plan.skipped)
        keys: dict[str, unit.SiteKnobs | unit.Unit] = {}
        code = self.class_code(module)
        if code is not None:
            self.calls(name, aliases, module, code, keys)
        for attribute, value in list(vars(module).items()):
            if attribute not in _PLAIN_MODULE:
                self.attribute(name, module, attribute, value, keys)
        if keys or (code is not None and any(code.repeats.values())):
            self.swap(module, keys, code)
        found = before != (len(self.plan.sites), len(self.plan.missed), len(self.plan.skipped))
        self.near_miss(name, module, read, found)

    def swap(self, module: nn.Module, keys: dict[str, unit.SiteKnobs | unit.Unit], code: ClassCode | None) -> None:
        cls = steered_class(type(module), self.selection, code.children if code else frozenset(), code)
        self.plan.swaps.append(Swap(self.own(module), cls, keys, None))

    def activation_module(self, name: str, aliases: tuple[str, ...], module: nn.Module, use: Use) -> None:
        if use.activation not in self.selection:
            self.skip(name, use.activation, f"{use.activation!r} is not among the selected activations")
            return
        if "forward" in vars(module):
            self.miss(name, use.activation, "its forward is overridden on the instance")
            return
        own = self.own(module)
        if not self.split:
            self.swap_activation(Site(name, "module", use.activation, type(module).__name__, aliases), own, use)
            return
        places = self.places.get(module)
        if not places:  # the model itself, or held where no name leads to
            self.swap_activation(Site(name, "module", use.activation, type(module).__name__, module=name), own, use)
            return
        for number, (place, owner, child) in enumerate(places):
            if number:
                self.apart[owner, child] = Copy.of(module)
                own = self.apart[owner, child].copy
            code = self.class_code(owner)
            repeats = code.repeats.get(child, []) if code is not None and not _overridden(code, owner) else []
            site = Site(place, "module", use.activation, type(module).__name__, module=places[0][0])
            self.swap_activation(site, own, use, repeats)

    def swap_activation(self, site: Site, module: nn.Module, use: Use, repeats: Sequence[Call] = ()) -> None:
        knobs = {MODULE: self.site(site)}
        for call in repeats:
            again = replace(site, name=f"{site.name}{call.key}", kind="call", where=call.where)
            knobs[call.key] = self.site(again)
        self.plan.swaps.append(Swap(module, steered_class(type(module), None), knobs, use))

    def calls(
        self,
        name: str,
        aliases: tuple[str, ...],
        module: nn.Module,
        code: ClassCode,
        keys: dict[str, unit.SiteKnobs | unit.Unit],
    ) -> None:
        own = _overridden(code, module)
        for call in code.calls:
            label = _join(name, f"{call.key}:{call.activation}")
            if own:
                self.miss(label, call.activation, f"{own[0]} is overridden on the instance", call.where)
                continue
            if call.attribute in vars(module):  # looked at where it is
                continue
            others = tuple(_join(alias, f"{call.key}:{call.activation}") for alias in aliases)
            kind = type(module).__name__
            keys[call.key] = self.site(Site(label, "functional", call.activation, kind, others, call.where))
        for records, found in ((self.plan.missed, code.missed), (self.plan.skipped, code.skipped)):
            records += [Miss(_label(name, call), call.activation, call.reason, call.where) for call in found]

    def attribute(self, name: str, module: nn.Module, attribute: str, value: Any, keys: dict[str, Any]) -> None:
        label = _join(name, attribute)
        call = value.func if isinstance(value, functools.partial) else value
        if is_listed(call, FUNCTIONS):
            form, activation = FUNCTIONS[call], activation_of(call)
            if activation not in self.selection:
                self.skip(label, activation, f"{activation!r} is not among the selected activations")
                return
            key = f".{attribute}"
            owner = self.own(module)
            steered = functools.partial(unit.call_function, owner, key, form, call)
            if isinstance(value, functools.partial):
                if read_partial(value) is None:
                    self.skip(label, activation, "its arguments put it outside the family")
                    return
                steered = functools.partial(steered, *value.args, **value.keywords)
            kind = type(module).__name__
            keys[key] = self.site(Site(f"{label}:{activation}", "functional", activation, kind))
            self.plan.edits.append(Edit(owner, "__dict__", attribute, value, steered))
        elif isinstance(call, types.FunctionType) and not is_torch(call.__module__) and mentions(call, self.memo):
            for caller, target, line in known_calls(call, self.memo):
                where = f"{caller.__code__.co_filename}:{line}"
                self.miss(label, activation_of(target), f"the attribute holds the function {call.__qualname__}", where)
        else:
            for place, held in _held(value):
                self.hidden(f"{label}{place}", held)

    def hidden(self, label: str, held: Any) -> None:
        """Something in a list, tuple or dict, or a module that is not registered."""
        if isinstance(held, nn.Module) and held not in self.names:
            self.names[held] = [label]
            read = read_module(held)
            if isinstance(read, Use):
                self.activation_module(label, (), held, read)
                return
            inside = {read.activation for m in held.modules() if isinstance(read := read_module(m), Use)}
            for activation in sorted(inside):
                self.miss(label, activation, "it is in a module that is not registered as a submodule")
        elif not isinstance(held, nn.Module) and is_activation(held):
            self.miss(label, activation_of(held), "the function is held in a container")

    def near_miss(self, name: str, module: nn.Module, read: NearMiss | None, found: bool) -> None:
        kind = type(module).__name__
        if read is not None and not (read.family and found):
            activation = read.activation or kind.lower()
            if read.activation:
                self.miss(name, activation, read.reason)
            elif read.family:
                self.plan.missed.append(Miss(name, activation, read.reason))
            else:
                self.skip(name, activation, read.reason)
        elif not found and _LOOKS_LIKE.search(kind) and not module._modules:
            reason = f"{kind} is named like an activation, but its code has no call that is known"
            records = self.plan.missed if "relu" in kind.lower() else self.plan.skipped
            records.append(Miss(name, kind.lower(), reason))

    def bound_methods(self, module: nn.Module, classes: dict[nn.Module, type]) -> None:
        """``self.act = self._relu`` holds the method as it was: it is to hold the copy."""
        for attribute, value in vars(module).items():
            if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
                name, holder = value.__func__.__name__, self.own(value.__self__)
                method = getattr(classes.get(holder), name, None)
                if isinstance(method, types.FunctionType) and method is not value.__func__:
                    new = types.MethodType(method, holder)
                    self.plan.edits.append(Edit(self.own(module), "__dict__", attribute, value, new))

    def deciding(self, module: nn.Module) -> None:
        """A module of torch that takes another way, past the activations, where it knows them."""
        swapped = {swap.module for swap in self.plan.swaps}
        below = any(self.copies[m].copy in swapped if m in self.copies else m in swapped for m in module.modules())
        if below and module not in swapped:
            self.swap(module, {}, self.class_code(module))

    # -- code that cannot be rewritten

    def scripted(self, name: str, module: torch.jit.ScriptModule) -> None:
        graph = str(getattr(module, "inlined_graph", ""))
        for operator in sorted(set(re.findall(r"aten::(\w+)", graph))):
            if operator.rstrip("_") in FORMS:
                self.miss(_join(name, operator), FORMS[operator.rstrip("_")].activation, "it is in a scripted module")

    def graph(self, name: str, module: torch.fx.GraphModule) -> None:
        for node in module.graph.nodes:
            form = node.target if node.op == "call_method" and node.target in METHODS else None
            if node.op == "call_function" and is_listed(node.target, FUNCTIONS):
                form = FUNCTIONS[node.target]
            if form is not None:
                activation = FORMS[form.rstrip("_")].activation
                self.miss(_join(name, node.name), activation, "a traced graph calls it: steer first, trace then")

    # -- records

    def class_code(self, module: Any) -> ClassCode | None:
        cls = type(module)
        if is_torch(cls.__module__):
            return None
        children: frozenset[str] = frozenset()
        if self.split:
            children = frozenset(name for name, child in module._modules.items() if self._is_splittable(child))
        key = cls, self.selection, children
        if key not in self.code:
            self.code[key] = ClassCode(cls, self.selection, self.memo, children, self.is_reached)
        return self.code[key]

    @functools.cached_property
    def _reached(self) -> set[types.FunctionType]:
        return reached({type(module) for module in self.names})

    def is_reached(self, function: types.FunctionType) -> bool:
        return function in self._reached

    def _is_splittable(self, module: nn.Module | None) -> bool:
        read = None if module is None else read_module(module)
        return isinstance(read, Use) and read.activation in self.selection and "forward" not in vars(module)

    def site(self, site: Site) -> unit.SiteKnobs | unit.Unit:
        knobs = self.make(site, self.device)
        self.plan.sites.append(site)
        self.plan.knobs.append(knobs)
        return knobs

    def miss(self, name: str, activation: str, reason: str, where: str = "") -> None:
        if activation in self.selection:
            self.plan.missed.append(Miss(name, activation, reason, where))

    def skip(self, name: str, activation: str, reason: str) -> None:
        self.plan.skipped.append(Miss(name, activation, reason))


def is_steered(model: nn.Module) -> bool:
    return any(isinstance(module, Steered) for module in model.modules())


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _label(name: str, call: Call) -> str:
    return _join(name, f"{call.key}:{call.activation}")


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        yield "", value
    elif isinstance(value, (list, tuple)):
        yield from ((f".{i}", held) for i, held in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f".{key}", held) for key, held in value.items())


def _is_stateless(module: nn.Module) -> bool:
    """Whether no part of ``module`` has a parameter or a buffer."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    tensors = (tensor for part in module.modules() for tensor in (*part._parameters.values(), *part._buffers.values()))
    return all(tensor is None for tensor in tensors)


def _with_copies(value: Any, copies: dict[nn.Module, nn.Module], depth: int = 3) -> Any:
    """``value`` with the copies in place of the modules, also in containers and methods; itself where it has none."""
    if isinstance(value, nn.Module):
        return copies.get(value, value)
    if isinstance(value, types.MethodType):
        holder = _with_copies(value.__self__, copies, 0)
        return value if holder is value.__self__ else types.MethodType(value.__func__, holder)
    if depth and type(value) in (list, tuple):
        held = [_with_copies(item, copies, depth - 1) for item in value]
        return value if all(new is old for new, old in zip(held, value)) else type(value)(held)
    if depth and type(value) in (dict, OrderedDict):
        held = [_with_copies(item, copies, depth - 1) for item in value.values()]
        return value if all(new is old for new, old in zip(held, value.values())) else type(value)(zip(value, held))
    if depth and isinstance(value, functools.partial):
        found = _with_copies((value.func, value.args, value.keywords), copies, depth)
        return value if found is value else functools.partial(found[0], *found[1], **found[2])
    return value


def _overridden(code: ClassCode, module: Any) -> list[str]:
    """The rewritten methods that ``module`` has its own version of."""
    return [key for key in code.namespace if key in vars(module)]
