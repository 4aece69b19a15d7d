"""Shadow copies of modules to trace a forward on, and a record of what it reads from them.

Tracing runs a forward with placeholders, and its writes must not reach the model. It therefore runs on shadows: one object
per module, of a subclass of its class, which copies attributes from the original on access and records the access. A trace
is valid as long as everything it read is unchanged.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _marks

_SIMPLE = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.memory_format,
)
_SHARED = (*_SIMPLE, type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, range, slice, type(...))
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_ABSENT = object()
_STATE = "_ctkernels_shadow"


class Untraceable(Exception):
    """Raised if a module cannot be traced; the message says why."""


# ---- reads -------------------------------------------------------------------------------------------------------------


class Reads:
    """Everything that a trace read from its modules."""

    def __init__(self) -> None:
        self.classes: dict[nn.Module, tuple[type, Any]] = {}
        self.children: dict[nn.Module, tuple[tuple[str, Any], ...]] = {}
        # Entries of a module's ``__dict__`` (table None) or of one of its tables, with their value; see :func:`_record`.
        self.entries: dict[tuple[nn.Module, str | None, str], tuple[nn.Module, str | None, str, Any]] = {}

    def of(self, module: nn.Module) -> None:
        if module not in self.classes:
            self.classes[module] = type(module), type(module).forward

    def entry(self, module: nn.Module, table: str | None, name: str, value: Any) -> None:
        self.of(module)
        if (module, table, name) not in self.entries:
            self.entries[module, table, name] = module, table, name, _record(value)

    def every_child(self, module: nn.Module) -> None:
        self.of(module)
        self.children.setdefault(module, tuple(module._modules.items()))

    def path(self, root: nn.Module, target: str) -> None:
        """Records every step from ``root`` to the module at ``target``."""
        for name in target.split(".") if target else ():
            child = root._modules[name]
            assert child is not None
            self.entry(root, "_modules", name, child)
            root = child

    def hold(self) -> bool:
        """True if nothing has changed. Runs in every call, so the common comparisons are inlined."""
        for module, (cls, forward) in self.classes.items():
            if type(module) is not cls or cls.forward is not forward:
                return False
        for module, children in self.children.items():
            if tuple(module._modules.items()) != children:
                return False
        for module, table, name, value in self.entries.values():
            entries = module.__dict__ if table is None else module.__dict__[table]
            now = entries.get(name, _ABSENT)
            if now is not value and not (value is Tensor and isinstance(now, Tensor)) and not _is(now, value):
                return False
        return True


def _record(value: Any, depth: int = 0) -> Any:
    """The record of a value: itself, the contents of a container, or ``Tensor`` for any tensor."""
    if isinstance(value, Tensor):
        return Tensor  # generated code reads the current one
    if type(value) in (list, tuple, set, frozenset, deque) and depth < 4:
        return type(value), tuple(_record(v, depth + 1) for v in value)
    if type(value) in (dict, OrderedDict) and depth < 4:
        return type(value), tuple((k, _record(v, depth + 1)) for k, v in value.items())
    if isinstance(value, (*_SHARED, nn.Module)) or not hasattr(value, "__dict__") or depth > 0:
        return value
    return value, {k: v for k, v in vars(value).items() if isinstance(v, _SIMPLE)}


def _is(now: Any, then: Any) -> bool:
    if now is then:
        return True
    if isinstance(then, _SIMPLE) and not isinstance(then, type):
        return type(now) is type(then) and now == then
    if then is Tensor:
        return isinstance(now, Tensor)
    if not isinstance(then, tuple) or len(then) != 2:
        return False
    record = _record(now)
    return isinstance(record, tuple) and len(record) == 2 and _equal(record, then)


def _equal(now: Any, then: Any) -> bool:
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(then, tuple):
        return len(now) == len(then) and all(map(_equal, now, then))
    if isinstance(then, dict):
        return list(now) == list(then) and all(_equal(now[k], then[k]) for k in then)
    return isinstance(then, _SIMPLE) and now == then


# ---- the copies --------------------------------------------------------------------------------------------------------


class Shadows:
    """The shadows of ``root`` and its submodules.

    Args:
        root: the module whose forward is traced.
        tensor: makes the placeholder of a tensor, from its path and whether it is a parameter.
        call: called as ``call(original, shadow, args, kwargs)`` when a shadow is called.
        training: {module: its flag while tracing}; other modules keep theirs.
    """

    def __init__(
        self,
        root: nn.Module,
        tensor: Callable[[str, bool], Any],
        call: Callable[..., Any],
        training: dict[nn.Module, bool],
    ) -> None:
        self.call, self.tensor, self.training = call, tensor, training
        self.reads = Reads()
        self.memo: dict[int, Any] = {}
        self.names: dict[nn.Module, str] = {}
        self.originals: list[Any] = []  # keeps the objects alive whose ids are in ``memo``
        self.shadows: list[tuple[Any, nn.Module]] = []
        self.copied: list[tuple[dict[str, Any], str, Any, Any]] = []
        self.refused = ""
        self.root = self.shadow(root, "")

    def refuse(self, reason: str) -> Untraceable:
        """An error to raise. Its reason is stored, because the traced code may catch it."""
        self.refused = self.refused or reason
        return Untraceable(reason)

    def original(self, shadow: Any) -> Any:
        state = _entries(shadow).get(_STATE) if isinstance(shadow, Shadow) else None
        return shadow if state is None else state.original

    def shadow(self, module: nn.Module, name: str) -> Any:
        known = self.memo.get(id(module))
        if known is not None:
            return known
        shadow: Any = object.__new__(
            _shadow_class(nn.Module if isinstance(module, torch.jit.ScriptModule) else type(module))
        )
        self.remember(module, shadow)
        self.names[module] = name
        self.shadows.append((shadow, module))
        entries = _entries(shadow)
        entries[_STATE] = _State(module, name, self)
        entries |= {hooks: OrderedDict() for hooks in _HOOKS}
        entries["training"] = self.training.get(module, module.training)
        prefix = f"{name}." if name else ""
        for table in ("_parameters", "_buffers"):
            tensors = vars(module).get(table, {})
            entries[table] = {
                k: None if t is None else self.stand_in(t, prefix + k, table == "_parameters")
                for k, t in tensors.items()
            }
        entries["_non_persistent_buffers_set"] = set(vars(module).get("_non_persistent_buffers_set", ()))
        inside = {} if isinstance(module, torch.jit.ScriptModule) else module._modules
        entries["_modules"] = {k: None if m is None else self.shadow(m, prefix + k) for k, m in inside.items()}
        return shadow

    def remember(self, original: Any, copied: Any) -> None:
        self.memo[id(original)] = copied
        self.originals.append(original)

    def stand_in(self, t: Tensor, path: str, is_parameter: bool) -> Any:
        if id(t) not in self.memo:
            self.remember(t, self.tensor(path, is_parameter))
        return self.memo[id(t)]

    def copy(self, value: Any, path: str) -> Any:
        """Copies an attribute; references to modules become references to their shadows."""
        known = self.memo.get(id(value))
        if known is not None:
            return known
        if isinstance(value, Tensor):
            return self.stand_in(value, path, isinstance(value, nn.Parameter))
        return self._copy(value)

    def _copy(self, value: Any) -> Any:
        known = self.memo.get(id(value))
        if known is not None:
            return known
        if isinstance(value, (Tensor, nn.Module)):
            raise self.refuse(f"it reads a {type(value).__name__} that is no part of it")
        if isinstance(value, _SHARED):
            return value
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._copy(value.__self__))
        if type(value) is functools.partial:
            return functools.partial(
                self._copy(value.func),
                *map(self._copy, value.args),
                **{k: self._copy(v) for k, v in value.keywords.items()},
            )
        copied: Any
        if type(value) in (list, set, deque, tuple, frozenset):
            copied = type(value)(self._copy(v) for v in value)
        elif type(value) in (dict, OrderedDict):
            copied = type(value)((k, self._copy(v)) for k, v in value.items())
        else:
            try:
                copied = copy.deepcopy(value, self.memo)
            except Untraceable:
                raise
            except Exception as error:
                raise self.refuse(f"it reads a {type(value).__name__}, which cannot be copied") from error
        self.remember(value, copied)
        return copied

    def written(self) -> bool:
        """True if the forward has written to a copy."""
        for shadow, _ in self.shadows:
            entries = _entries(shadow)
            known = {name for owner, name, _, _ in self.copied if owner is entries}
            if any(name not in known and name not in _MADE for name in entries):
                return True
        return any(
            entries.get(name) is not copied or not self._unchanged(value, copied)
            for entries, name, value, copied in self.copied
        )

    def _unchanged(self, value: Any, copied: Any, depth: int = 0) -> bool:
        if value is copied or depth > 6 or isinstance(value, (nn.Module, Tensor)):
            return value is copied or self.memo.get(id(value)) is copied or depth > 6
        if type(value) is not type(copied):
            return False
        if isinstance(value, dict):
            return list(value) == list(copied) and all(self._unchanged(value[k], copied[k], depth + 1) for k in value)
        if isinstance(value, (list, tuple, deque)):
            return len(value) == len(copied) and all(self._unchanged(a, b, depth + 1) for a, b in zip(value, copied))
        if isinstance(value, (set, frozenset)):
            return len(value) == len(copied)
        if isinstance(value, _SIMPLE):
            return bool(value == copied)
        return not hasattr(value, "__dict__") or self._unchanged(vars(value), vars(copied), depth + 1)

    def close(self) -> None:
        """Drops all references, so that nothing outlives the tracing."""
        for shadow, _ in self.shadows:
            _entries(shadow).clear()
        self.shadows, self.copied, self.memo = [], [], {}


class _State(NamedTuple):
    original: nn.Module
    name: str
    shadows: Shadows


_MADE = frozenset((_STATE, "training", "_non_persistent_buffers_set", *_HOOKS, *_TABLES))


def _entries(shadow: Any) -> dict[str, Any]:
    return object.__getattribute__(shadow, "__dict__")


class Shadow:
    """Mixin of shadow classes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call super: registries of subclasses must not see a temporary class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = _entries(self)[_STATE]
        return state.shadows.call(state.original, self, args, kwargs)

    def __getattribute__(self, name: str) -> Any:
        entries = object.__getattribute__(self, "__dict__")
        state = entries.get(_STATE)
        if state is None:
            return super().__getattribute__(name)
        original, reads = state.original, state.shadows.reads
        if name in _TABLES:
            if name == "_modules":
                reads.every_child(original)
            else:
                for key, value in vars(original)[name].items():
                    reads.entry(original, name, key, value)
            return entries[name]
        if name == "__dict__":
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.nn.modules"):
                raise state.shadows.refuse("it looks into the __dict__ of a module")
            return entries
        if name == "forward":
            raise state.shadows.refuse("it calls a forward by hand")
        if name == "training":
            if original not in state.shadows.training:
                reads.entry(original, None, name, entries[name])
            return entries[name]
        on_class = _on_class(type(self), name)
        if hasattr(type(on_class), "__set__") and on_class is not _ABSENT:
            return super().__getattribute__(name)
        if name in entries:
            return entries[name]
        attributes = vars(original)
        if name in attributes:
            if name in _marks.SHARED:
                return attributes[name]
            reads.entry(original, None, name, attributes[name])
            path = f"{state.name}.{name}" if state.name else name
            entries[name] = copied = state.shadows.copy(attributes[name], path)
            state.shadows.copied.append((entries, name, attributes[name], copied))
            return copied
        if on_class is _ABSENT:
            for table in _TABLES:
                if name in entries[table]:
                    reads.entry(original, table, name, attributes[table][name])
                    return entries[table][name]
        if not name.startswith("__"):
            reads.entry(original, None, name, _ABSENT)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _entries(self)[_STATE].shadows.refuse(_KEEPS)

    def __delattr__(self, name: str) -> None:
        raise _entries(self)[_STATE].shadows.refuse(_KEEPS)

    def __deepcopy__(self, memo: Any) -> Any:
        raise _entries(self)[_STATE].shadows.refuse("it copies a module")


_KEEPS = "it keeps values from one call to the next"


def _on_class(cls: type, name: str) -> Any:
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return _ABSENT


_CLASSES: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def _shadow_class(base: type) -> type:
    cls = _CLASSES.get(base)
    if cls is None:
        try:
            cls = types.new_class(base.__name__, (Shadow, base))
        except Exception as error:
            raise Untraceable(f"its class {base.__name__} cannot be derived from") from error
        cls.__module__, cls.__qualname__ = base.__module__, base.__qualname__
        _CLASSES[base] = cls
    return cls
