"""What the methods of a class call, and copies of those that call activations."""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from . import unit
from .activations import ANY, activation_of
from .lookup import (
    UNKNOWN,
    code_names,
    default_values,
    hidden_activations,
    is_activation,
    is_torch,
    known_calls,
    mentions,
)
from .rewrite import Rewriter
from .source import NoSource, compile_function, copy_function, parse_function

_RUNTIME: dict[str, Any] = {
    "_ctu_partial": functools.partial,
    "_ctu_function": unit.call_function,
    "_ctu_method": unit.call_method,
    "_ctu_global": unit.call_global,
    "_ctu_made": unit.call_partial,
}


class Call(NamedTuple):
    """An activation in source code. ``key`` is unique in its class: the function's name, numbered from the second.

    ``attribute``: the attribute of the class that holds what is called, which an instance may have another of.
    """

    key: str
    activation: str
    where: str
    reason: str = ""
    attribute: str = ""


class ClassCode:
    """What the methods of ``cls`` call.

    Attributes:
        calls: the calls that the methods in ``namespace`` redirect.
        namespace: {method name: rewritten copy}.
        missed: calls of a selected activation that cannot be redirected, with the reason.
        skipped: calls of activations outside the family or the selection, with the reason.
        repeats: {attribute: the calls of the activation module held there, from the second on}, for ``children``.
    """

    def __init__(
        self,
        cls: type,
        selection: frozenset[str],
        memo: dict[types.FunctionType, bool],
        children: frozenset[str] = frozenset(),
        is_reached: Callable[[types.FunctionType], bool] = lambda function: True,
    ) -> None:
        self.is_reached = is_reached  # by a forward pass
        self.cls, self.selection, self.memo, self.children = cls, selection, memo, children
        self.repeats: dict[str, list[Call]] = {}
        self.calls: list[Call] = []
        self.missed: list[Call] = []
        self.skipped: list[Call] = []
        self.namespace: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._helpers: dict[types.FunctionType, str | None] = {}
        self.extras: dict[str, types.CellType] = {name: types.CellType(value) for name, value in _RUNTIME.items()}
        for name, base in _methods(cls):
            found = base.__dict__[name]
            if isinstance(found, types.FunctionType):
                if is_torch(found.__module__):
                    continue  # `act = F.silu` in a class: a method of it is what calls that
                copy = self.method(found)
                if copy is not None:
                    self.namespace[name] = copy
            elif isinstance(found, property) and isinstance(found.fget, types.FunctionType):
                copy = self.method(found.fget)
                if copy is not None:
                    self.namespace[name] = property(copy, found.fset, found.fdel, found.__doc__)
            elif isinstance(found, classmethod) and isinstance(found.__func__, types.FunctionType):
                self.report(found.__func__, "a class method has no module to take beta from")

    # -- records

    def record(self, function: types.FunctionType, activation: str, line: int, attribute: str = "") -> str:
        self._counts[function.__name__] += 1
        count = self._counts[function.__name__]
        key = function.__name__ if count == 1 else f"{function.__name__}#{count}"
        self.calls.append(Call(key, activation, _where(function, line), attribute=attribute))
        return key

    def child_call(self, function: types.FunctionType, attribute: str, line: int) -> str:
        """The key of this call of an activation module: "" for the first in the class, then "#2", "#3"."""
        if attribute not in self.repeats:
            self.repeats[attribute] = []
            return ""
        key = f"#{len(self.repeats[attribute]) + 2}"
        self.repeats[attribute].append(Call(key, ANY, _where(function, line)))
        return key

    def miss(self, function: types.FunctionType, activation: str, line: int, reason: str) -> None:
        if activation in self.selection or activation == ANY:
            self.missed.append(Call(function.__name__, activation, _where(function, line), reason))

    def skip(self, function: types.FunctionType, activation: str, line: int, reason: str) -> None:
        self.skipped.append(Call(function.__name__, activation, _where(function, line), reason))

    def report(self, function: types.FunctionType, reason: str) -> None:
        """Name the calls of a function, and of its helpers, that cannot be rewritten."""
        for caller, target, line in known_calls(function, self.memo):
            self.miss(caller, activation_of(target), line, reason)

    # -- copies

    def mentions(self, function: types.FunctionType, seen: frozenset[types.FunctionType] = frozenset()) -> bool:
        """Whether ``function`` can contain a call, also by way of what it finds in its class."""
        if mentions(function, self.memo):
            return True
        names = code_names(function.__code__)
        if self.children.intersection(names):
            return True
        bases = self.cls.__mro__ if "super" in names else ()
        inherited = [base.__dict__[name] for base in bases for name in names if name in base.__dict__]
        static = [inspect.getattr_static(self.cls, name, None) for name in names]
        own = [found.__func__ for found in static if isinstance(found, staticmethod)]
        if any(is_activation(found) or hidden_activations(found) for found in (*static, *own)):
            return True
        seen |= {function}
        return any(
            self.mentions(found, seen)
            for found in (*own, *inherited)
            if isinstance(found, types.FunctionType) and found not in seen
        )

    def method(self, function: types.FunctionType) -> types.FunctionType | None:
        """A copy that takes its knobs from its first argument; None where there is nothing to redirect."""
        if not self.mentions(function):
            return None
        if isinstance(getattr(function, "__wrapped__", None), types.FunctionType):
            return self._rewrap(function, helper=False)
        return self._rewrite(function, helper=False)

    def helper(self, function: types.FunctionType) -> str | None:
        """The name by which rewritten code finds a copy of ``function`` that takes the owner as a first argument."""
        if function not in self._helpers:
            self._helpers[function] = None
            if self.mentions(function):
                name, cell = f"_ctu_helper_{len(self._helpers)}", types.CellType()
                self._helpers[function], self.extras[name] = name, cell  # now: a recursive function finds itself
                wrapped = isinstance(getattr(function, "__wrapped__", None), types.FunctionType)
                copy = self._rewrap(function, helper=True) if wrapped else self._rewrite(function, helper=True)
                if copy is None:
                    self._helpers[function] = None
                else:
                    cell.cell_contents = copy
        return self._helpers[function]

    def _rewrap(self, wrapper: types.FunctionType, helper: bool) -> types.FunctionType | None:
        """The wrapper that a decorator made, around a copy of what it wraps."""
        inner: types.FunctionType = wrapper.__wrapped__  # type: ignore[attr-defined]
        cells = list(wrapper.__closure__ or ())
        places = [i for i, cell in enumerate(cells) if _contents(cell) is inner]
        passes_all = not wrapper.__code__.co_argcount and wrapper.__code__.co_flags & inspect.CO_VARARGS
        if not places or (helper and not passes_all):  # a helper's copy takes an argument more
            self.report(inner, "its decorator hides it")
            return None
        if isinstance(getattr(inner, "__wrapped__", None), types.FunctionType):
            copy = self._rewrap(inner, helper)
        else:
            copy = self._rewrite(inner, helper)
        if copy is None:
            return None
        for place in places:
            cells[place] = types.CellType(copy)
        return copy_function(wrapper, wrapper.__code__, cells, copy)

    def _rewrite(self, function: types.FunctionType, helper: bool) -> types.FunctionType | None:
        try:
            tree, definition = parse_function(function)
        except NoSource as error:
            self.report(function, str(error))
            return None
        for value in filter(is_activation, default_values(function)):
            reason = "it is the default of an argument, and another may be given"
            self.miss(function, activation_of(value), definition.lineno, reason)
        rewriter = Rewriter(self, function, definition, helper)
        rewriter.visit_body()
        if not rewriter.changed:
            return None
        code = compile_function(tree, function, self.extras)
        old = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        cells = [self.extras[name] if name in self.extras else old[name] for name in code.co_freevars]
        return copy_function(function, code, cells)


def _methods(cls: type) -> list[tuple[str, type]]:
    """(name, class that defines it) of the methods that instances of ``cls`` have from outside torch."""
    found: dict[str, type] = {}
    for base in cls.__mro__:
        for name in base.__dict__:
            found.setdefault(name, base)
    own = [(name, base) for name, base in found.items() if not is_torch(base.__module__) and base is not object]
    return [(name, base) for name, base in own if name == "__call__" or not name.startswith("__")]


def _where(function: types.FunctionType, line: int) -> str:
    return f"{function.__code__.co_filename}:{line}"


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return UNKNOWN
