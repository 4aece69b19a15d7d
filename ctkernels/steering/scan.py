"""Finds every activation of a model, without running or changing anything."""

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

from .activations import (
    FUNCTIONS,
    METHODS,
    SIGNATURES,
    ActivationSpec,
    NearMiss,
    activation_of,
    read_module,
    read_partial,
)
from .names import is_activation, is_listed, is_torch, known_calls, mentions, reached
from .patch import FAST_PATHS, MODULE, AttributeEdit, ClassSwap, LocalCopy, Steered, steered_class
from .rewrite import ActivationCall, ClassCode
from .runtime import SiteKnobs, SiteUnit, call_function

_PLAIN_MODULE = frozenset(nn.Module().__dict__)
_LOOKS_LIKE = re.compile("relu|gelu|silu|swish|mish", re.IGNORECASE)
_Code = dict[
    tuple[type, frozenset[str], frozenset[str]], ClassCode
]  # by class, selection, and children with calls as sites
_CACHE: ContextVar[_Code | None] = ContextVar("_CACHE", default=None)


@dataclass(frozen=True)
class Site:
    """A place where the model applies an activation.

    Attributes:
        name: unique; "layer1.0.relu" for a module, "aux1.forward:relu" for a call in ``aux1``'s ``forward`` (the second
            one there is "aux1.forward#2:relu"), "encoder.activation:relu" for a function in an attribute.
        kind: "module" or "functional"; "call" for a repeated call of a module, if each call is a site.
        activation: a name that ``steer``'s ``activations`` accepts.
        module_type: class of the module, or of the module whose code makes the call.
        aliases: other names of a module that is registered several times.
        where: "file:line" of a call in source code, else "".
        module: first name of a shared module, if each of its uses is a site, else "".
    """

    name: str
    kind: str
    activation: str
    module_type: str
    aliases: tuple[str, ...] = ()
    where: str = ""
    module: str = ""


@dataclass(frozen=True)
class Unsteered:
    """An activation that is not steered.

    Attributes:
        name: as of a :class:`Site`.
        activation: its kind.
        reason: why it is not steered.
        where: "file:line" of a call in source code, else "".
    """

    name: str
    activation: str
    reason: str
    where: str = ""


@dataclass
class ScanResult:
    """The activations of a model, and the patches that steer it."""

    sites: list[Site] = field(default_factory=list)
    units: list[Any] = field(default_factory=list)
    missed: list[Unsteered] = field(default_factory=list)
    skipped: list[Unsteered] = field(default_factory=list)
    swaps: list[ClassSwap] = field(default_factory=list)
    edits: list[AttributeEdit] = field(default_factory=list)
    copies: list[LocalCopy] = field(default_factory=list)


def scan(
    model: nn.Module,
    selection: frozenset[str],
    *,
    split: bool = False,
    make_unit: Callable[[Site, torch.device | None], SiteUnit] | None = None,
) -> ScanResult:
    """Finds the activations of ``model``.

    Args:
        split: make a site of each use of a shared activation module: each place where it is registered, and each call of it
            in its parent's code. Otherwise an activation module is one site.
        make_unit: constructs the unit of a site. Default: :class:`SiteKnobs`.
    """
    return _Scanner(model, selection, split, make_unit or _site_knobs).result


@contextmanager
def cached_class_code() -> Iterator[None]:
    """Context in which scans share the code read from each class: for a model and its copies.

    Reading code takes most of a scan's time, about a second for a transformers model.
    """
    token = _CACHE.set({})
    try:
        yield
    finally:
        _CACHE.reset(token)


def _site_knobs(site: Site, device: torch.device | None) -> SiteKnobs:
    return SiteKnobs(device)


class _Scanner:
    def __init__(self, model: nn.Module, selection: frozenset[str], split: bool, make_unit: Callable[..., Any]) -> None:
        self.selection, self.split, self.make_unit, self.result = selection, split, make_unit, ScanResult()
        self.root = model
        self.copies: dict[nn.Module, LocalCopy] = {}  # used only if they are patched
        self.copies_at: dict[tuple[nn.Module, str], LocalCopy] = {}  # for one use only, by (parent, name)
        self.memo: dict[types.FunctionType, bool] = {}
        cache = _CACHE.get()
        self.code: _Code = {} if cache is None else cache
        self.names: dict[nn.Module, list[str]] = {}
        self.device = next((p.device for p in model.parameters()), None)
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.uses: dict[nn.Module, list[tuple[str, nn.Module, str]]] = {}  # (path, parent, name in the parent)
        for parent, (name, *_) in self.names.items():
            for child, module in parent._modules.items():
                if module is not None:
                    self.uses.setdefault(module, []).append((_join(name, child), parent, child))
        opaque: set[nn.Module] = set()
        for module, (name, *aliases) in list(self.names.items()):
            for parameter in module.parameters(recurse=False):
                self.device = parameter.device  # of the preceding layers, for a model spread over devices
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
            if isinstance(module, FAST_PATHS):
                self.fast_path(module)
        classes = {swap.module: swap.cls for swap in self.result.swaps}
        for module in self.names:
            self.bound_methods(module, classes)
        self.install_copies()

    # -- copies

    def target(self, module: nn.Module) -> nn.Module:
        """The module to patch for ``module``: a copy, unless it is the model itself or has weights.

        Other models may share the activation, and must not change. Modules with weights are shared on purpose.
        """
        if module is self.root or not (isinstance(read_module(module), ActivationSpec) or _is_stateless(module)):
            return module
        if module not in self.copies:
            self.copies[module] = LocalCopy.of(module)
        return self.copies[module].copy

    def install_copies(self) -> None:
        """Replaces modules by their patched copies, and then the modules that refer to them."""
        edited = {(edit.owner, edit.name) for edit in self.result.edits}
        changed = {swap.module for swap in self.result.swaps} | {edit.owner for edit in self.result.edits}
        used = {module: pair.copy for module, pair in self.copies.items() if pair.copy in changed}
        todo = [*used, *(module for parent, name in self.copies_at if (module := parent._modules[name]) is not None)]
        references: dict[tuple[nn.Module, str], tuple[Any, Any]] = {}
        while todo:
            holders = {parent for module in todo for _, parent, _ in self.uses.get(module, ())}
            for module in self.names:
                for attribute, value in vars(module).items():
                    if attribute not in _PLAIN_MODULE and (self.target(module), attribute) not in edited:
                        new = _with_copies(value, used)
                        if new is not value:
                            references[module, attribute] = value, new
                            holders.add(module)
            todo = [module for module in holders if self.target(module) is not module and module not in used]
            used |= {module: self.target(module) for module in todo}
        for (module, attribute), (value, new) in references.items():
            self.result.edits.append(AttributeEdit(self.target(module), "__dict__", attribute, value, new))
        for parent in self.names:
            for child, module in parent._modules.items():
                local = self.copies_at.get((parent, child))
                new = local.copy if local is not None else used.get(module)  # type: ignore[arg-type]
                if new is not None:
                    self.result.edits.append(AttributeEdit(self.target(parent), "_modules", child, module, new))
        self.result.copies += [self.copies[module] for module in used] + list(self.copies_at.values())

    # -- one module

    def module(self, name: str, aliases: tuple[str, ...], module: nn.Module) -> None:
        read = read_module(module)
        if isinstance(read, ActivationSpec):
            self.activation_module(name, aliases, module, read)
            return
        before = len(self.result.sites), len(self.result.missed), len(self.result.skipped)
        units: dict[str, SiteUnit] = {}
        code = self.class_code(module)
        if code is not None:
            self.calls(name, aliases, module, code, units)
        for attribute, value in list(vars(module).items()):
            if attribute not in _PLAIN_MODULE:
                self.attribute(name, module, attribute, value, units)
        if units or (code is not None and any(code.repeats.values())):
            self.swap(module, units, code)
        has_records = before != (len(self.result.sites), len(self.result.missed), len(self.result.skipped))
        self.near_miss(name, module, read, has_records)

    def swap(self, module: nn.Module, units: dict[str, SiteUnit], code: ClassCode | None) -> None:
        cls = steered_class(type(module), self.selection, code.children if code else frozenset(), code)
        self.result.swaps.append(ClassSwap(self.target(module), cls, units, None))

    def activation_module(self, name: str, aliases: tuple[str, ...], module: nn.Module, spec: ActivationSpec) -> None:
        if spec.activation not in self.selection:
            self.record_skipped(name, spec.activation, f"{spec.activation!r} is not among the selected activations")
            return
        if "forward" in vars(module):
            self.record_missed(name, spec.activation, "its forward is overridden on the instance")
            return
        target = self.target(module)
        if not self.split:
            self.swap_activation(Site(name, "module", spec.activation, type(module).__name__, aliases), target, spec)
            return
        uses = self.uses.get(module)
        if not uses:  # the model itself, or not registered as a child
            self.swap_activation(
                Site(name, "module", spec.activation, type(module).__name__, module=name), target, spec
            )
            return
        for number, (path, owner, child) in enumerate(uses):
            if number:
                self.copies_at[owner, child] = LocalCopy.of(module)
                target = self.copies_at[owner, child].copy
            code = self.class_code(owner)
            repeats = code.repeats.get(child, []) if code is not None and not _overridden(code, owner) else []
            site = Site(path, "module", spec.activation, type(module).__name__, module=uses[0][0])
            self.swap_activation(site, target, spec, repeats)

    def swap_activation(
        self, site: Site, module: nn.Module, spec: ActivationSpec, repeats: Sequence[ActivationCall] = ()
    ) -> None:
        units = {MODULE: self.add_site(site)}
        for call in repeats:
            repeat = replace(site, name=f"{site.name}{call.key}", kind="call", where=call.where)
            units[call.key] = self.add_site(repeat)
        self.result.swaps.append(ClassSwap(module, steered_class(type(module), None), units, spec))

    def calls(
        self,
        name: str,
        aliases: tuple[str, ...],
        module: nn.Module,
        code: ClassCode,
        units: dict[str, SiteUnit],
    ) -> None:
        overridden = _overridden(code, module)
        for call in code.calls:
            label = _join(name, f"{call.key}:{call.activation}")
            if overridden:
                self.record_missed(label, call.activation, f"{overridden[0]} is overridden on the instance", call.where)
                continue
            if call.attribute in vars(module):  # recorded by `attribute`
                continue
            others = tuple(_join(alias, f"{call.key}:{call.activation}") for alias in aliases)
            kind = type(module).__name__
            units[call.key] = self.add_site(Site(label, "functional", call.activation, kind, others, call.where))
        for records, calls in ((self.result.missed, code.missed), (self.result.skipped, code.skipped)):
            records += [Unsteered(_label(name, call), call.activation, call.reason, call.where) for call in calls]

    def attribute(self, name: str, module: nn.Module, attribute: str, value: Any, units: dict[str, Any]) -> None:
        label = _join(name, attribute)
        call = value.func if isinstance(value, functools.partial) else value
        if is_listed(call, FUNCTIONS):
            function_name, activation = FUNCTIONS[call], activation_of(value)
            if activation not in self.selection:
                self.record_skipped(label, activation, f"{activation!r} is not among the selected activations")
                return
            key = f".{attribute}"
            owner = self.target(module)
            steered = functools.partial(call_function, owner, key, function_name, call)
            if isinstance(value, functools.partial):
                if read_partial(value) is None:
                    self.record_skipped(label, activation, "its arguments put it outside the family")
                    return
                steered = functools.partial(steered, *value.args, **value.keywords)
            kind = type(module).__name__
            units[key] = self.add_site(Site(f"{label}:{activation}", "functional", activation, kind))
            self.result.edits.append(AttributeEdit(owner, "__dict__", attribute, value, steered))
        elif isinstance(call, types.FunctionType) and not is_torch(call.__module__) and mentions(call, self.memo):
            for caller, target, line in known_calls(call, self.memo):
                where = f"{caller.__code__.co_filename}:{line}"
                self.record_missed(
                    label, activation_of(target), f"the attribute holds the function {call.__qualname__}", where
                )
        else:
            for suffix, item in _items(value):
                self.unregistered(f"{label}{suffix}", item)

    def unregistered(self, label: str, item: Any) -> None:
        """Records activations in an item of a list, tuple or dict, or in a module that is not registered."""
        if isinstance(item, nn.Module) and item not in self.names:
            self.names[item] = [label]
            read = read_module(item)
            if isinstance(read, ActivationSpec):
                self.activation_module(label, (), item, read)
                return
            inside = {read.activation for m in item.modules() if isinstance(read := read_module(m), ActivationSpec)}
            for activation in sorted(inside):
                self.record_missed(label, activation, "it is in a module that is not registered as a submodule")
        elif not isinstance(item, nn.Module) and is_activation(item):
            self.record_missed(label, activation_of(item), "the function is held in a container")

    def near_miss(self, name: str, module: nn.Module, read: NearMiss | None, has_records: bool) -> None:
        kind = type(module).__name__
        if read is not None and not (read.family and has_records):
            activation = read.activation or kind.lower()
            if read.activation:
                self.record_missed(name, activation, read.reason)
            elif read.family:
                self.result.missed.append(Unsteered(name, activation, read.reason))
            else:
                self.record_skipped(name, activation, read.reason)
        elif not has_records and _LOOKS_LIKE.search(kind) and not module._modules:
            reason = f"{kind} is named like an activation, but its code has no call that is known"
            records = self.result.missed if "relu" in kind.lower() else self.result.skipped
            records.append(Unsteered(name, kind.lower(), reason))

    def bound_methods(self, module: nn.Module, classes: dict[nn.Module, type]) -> None:
        """Replaces bound methods in attributes (``self.act = self._relu``) by the rewritten ones."""
        for attribute, value in vars(module).items():
            if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
                name, holder = value.__func__.__name__, self.target(value.__self__)
                method = getattr(classes.get(holder), name, None)
                if isinstance(method, types.FunctionType) and method is not value.__func__:
                    new = types.MethodType(method, holder)
                    self.result.edits.append(AttributeEdit(self.target(module), "__dict__", attribute, value, new))

    def fast_path(self, module: nn.Module) -> None:
        """Swaps the class of a module of torch that may bypass activations below it."""
        swapped = {swap.module for swap in self.result.swaps}
        below = any(self.copies[m].copy in swapped if m in self.copies else m in swapped for m in module.modules())
        if below and module not in swapped:
            self.swap(module, {}, self.class_code(module))

    # -- code that cannot be rewritten

    def scripted(self, name: str, module: torch.jit.ScriptModule) -> None:
        graph = str(getattr(module, "inlined_graph", ""))
        for operator in sorted(set(re.findall(r"aten::(\w+)", graph))):
            if operator.rstrip("_") in SIGNATURES:
                self.record_missed(
                    _join(name, operator), SIGNATURES[operator.rstrip("_")].activation, "it is in a scripted module"
                )

    def graph(self, name: str, module: torch.fx.GraphModule) -> None:
        for node in module.graph.nodes:
            function_name = node.target if node.op == "call_method" and node.target in METHODS else None
            if node.op == "call_function" and is_listed(node.target, FUNCTIONS):
                function_name = FUNCTIONS[node.target]
            if function_name is not None:
                activation = SIGNATURES[function_name.rstrip("_")].activation
                self.record_missed(
                    _join(name, node.name), activation, "a traced graph calls it: steer first, trace then"
                )

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
        return isinstance(read, ActivationSpec) and read.activation in self.selection and "forward" not in vars(module)

    def add_site(self, site: Site) -> SiteUnit:
        unit = self.make_unit(site, self.device)
        self.result.sites.append(site)
        self.result.units.append(unit)
        return unit

    def record_missed(self, name: str, activation: str, reason: str, where: str = "") -> None:
        if activation in self.selection:
            self.result.missed.append(Unsteered(name, activation, reason, where))

    def record_skipped(self, name: str, activation: str, reason: str) -> None:
        self.result.skipped.append(Unsteered(name, activation, reason))


def is_steered(model: nn.Module) -> bool:
    return any(isinstance(module, Steered) for module in model.modules())


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _label(name: str, call: ActivationCall) -> str:
    return _join(name, f"{call.key}:{call.activation}")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        yield "", value
    elif isinstance(value, (list, tuple)):
        yield from ((f".{i}", item) for i, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f".{key}", item) for key, item in value.items())


def _is_stateless(module: nn.Module) -> bool:
    """True if no part of ``module`` has a parameter or a buffer."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    tensors = (tensor for part in module.modules() for tensor in (*part._parameters.values(), *part._buffers.values()))
    return all(tensor is None for tensor in tensors)


def _with_copies(value: Any, copies: dict[nn.Module, nn.Module], depth: int = 3) -> Any:
    """``value`` with modules replaced by their copies, also in containers and methods; ``value`` itself if it has none."""
    if isinstance(value, nn.Module):
        return copies.get(value, value)
    if isinstance(value, types.MethodType):
        holder = _with_copies(value.__self__, copies, 0)
        return value if holder is value.__self__ else types.MethodType(value.__func__, holder)
    if depth and type(value) in (list, tuple):
        items = [_with_copies(item, copies, depth - 1) for item in value]
        return value if all(new is old for new, old in zip(items, value)) else type(value)(items)
    if depth and type(value) in (dict, OrderedDict):
        items = [_with_copies(item, copies, depth - 1) for item in value.values()]
        return value if all(new is old for new, old in zip(items, value.values())) else type(value)(zip(value, items))
    if depth and isinstance(value, functools.partial):
        parts = _with_copies((value.func, value.args, value.keywords), copies, depth)
        return value if parts is value else functools.partial(parts[0], *parts[1], **parts[2])
    return value


def _overridden(code: ClassCode, module: Any) -> list[str]:
    """The rewritten methods that ``module`` overrides on the instance."""
    return [key for key in code.namespace if key in vars(module)]
