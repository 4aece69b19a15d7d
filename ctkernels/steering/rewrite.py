"""Activation calls in a class's methods: found in their source, and redirected in copies of them.

Nothing is run or traced. Every reference to an activation function (``F.relu``, ``torch.relu``, an alias, ``x.relu()``)
becomes ``partial(call_function, self, key, name, F.relu)``, and a reference to a helper function that contains one
becomes a reference to the helper's own copy. A copy shares globals, defaults, closure cells and line numbers with the
original, which is left alone. It is plain Python: compilers trace it, and no hook or mode is needed at run time.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from . import unit
from .activations import FORMS, FUNCTIONS, METHODS, MODULES, OUTSIDE, Use, read_module
from .lookup import (
    CLAMPS,
    UNKNOWN,
    bound_names,
    code_names,
    direct_activations,
    is_listed,
    is_torch,
    lookup,
    member,
    mentions,
)
from .source import NoSource, compile_function, copy_function, parse_function

_RUNTIME: dict[str, Any] = {
    "_ctu_partial": functools.partial,
    "_ctu_function": unit.call_function,
    "_ctu_method": unit.call_method,
    "_ctu_global": unit.call_global,
}


class Call(NamedTuple):
    """An activation in source code. ``key`` is unique in its class: the function's name, numbered from the second."""

    key: str
    activation: str
    where: str
    reason: str = ""


class ClassCode:
    """What the methods of ``cls`` call.

    Attributes:
        calls: the calls that the methods in ``namespace`` redirect.
        namespace: {method name: rewritten copy}.
        missed: calls of a selected activation that cannot be redirected, with the reason.
        skipped: calls of activations outside the family or the selection, with the reason.
    """

    def __init__(self, cls: type, selection: frozenset[str], memo: dict[types.FunctionType, bool]) -> None:
        self.cls, self.selection, self.memo = cls, selection, memo
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

    def record(self, function: types.FunctionType, activation: str, line: int) -> str:
        self._counts[function.__name__] += 1
        count = self._counts[function.__name__]
        key = function.__name__ if count == 1 else f"{function.__name__}#{count}"
        self.calls.append(Call(key, activation, _where(function, line)))
        return key

    def miss(self, function: types.FunctionType, activation: str, line: int, reason: str) -> None:
        if activation in self.selection:
            self.missed.append(Call(function.__name__, activation, _where(function, line), reason))

    def skip(self, function: types.FunctionType, activation: str, line: int, reason: str) -> None:
        self.skipped.append(Call(function.__name__, activation, _where(function, line), reason))

    def report(self, function: types.FunctionType, reason: str) -> None:
        """Name the calls of a function that cannot be rewritten."""
        for _, target in direct_activations(function) if mentions(function, self.memo) else ():
            use = read_module(target) if isinstance(target, nn.Module) else None
            activation = use.activation if isinstance(use, Use) else FORMS[FUNCTIONS[target].rstrip("_")].activation
            self.miss(function, activation, function.__code__.co_firstlineno, reason)

    # -- copies

    def mentions(self, function: types.FunctionType, seen: frozenset[types.FunctionType] = frozenset()) -> bool:
        """Whether ``function`` can contain a call, also by way of what it finds in its class."""
        if mentions(function, self.memo):
            return True
        names = code_names(function.__code__)
        bases = self.cls.__mro__ if "super" in names else ()
        inherited = [base.__dict__[name] for base in bases for name in names if name in base.__dict__]
        static = [inspect.getattr_static(self.cls, name, None) for name in names]
        own = [found.__func__ for found in static if isinstance(found, staticmethod)]
        if any(is_listed(found, FUNCTIONS) for found in (*static, *own)):
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
            return self._rewrap(function)
        return self._rewrite(function, helper=False)

    def helper(self, function: types.FunctionType) -> str | None:
        """The name by which rewritten code finds a copy of ``function`` that takes the owner as a first argument."""
        if function not in self._helpers:
            self._helpers[function] = None
            if isinstance(getattr(function, "__wrapped__", None), types.FunctionType):
                self.report(function.__wrapped__, "it is in a decorated helper function")  # type: ignore[attr-defined]
            elif self.mentions(function):
                name, cell = f"_ctu_helper_{len(self._helpers)}", types.CellType()
                self._helpers[function], self.extras[name] = name, cell  # now: a recursive function finds itself
                copy = self._rewrite(function, helper=True)
                if copy is None:
                    self._helpers[function] = None
                else:
                    cell.cell_contents = copy
        return self._helpers[function]

    def _rewrap(self, wrapper: types.FunctionType) -> types.FunctionType | None:
        """The wrapper that a decorator made, around a copy of what it wraps."""
        inner: types.FunctionType = wrapper.__wrapped__  # type: ignore[attr-defined]
        cells = list(wrapper.__closure__ or ())
        places = [i for i, cell in enumerate(cells) if _contents(cell) is inner]
        if not places:
            self.report(inner, "its decorator hides it")
            return None
        copy = self.method(inner)
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
        rewriter = _Rewriter(self, function, definition, helper)
        rewriter.visit_body()
        if not rewriter.changed:
            return None
        code = compile_function(tree, function, self.extras)
        old = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        cells = [self.extras[name] if name in self.extras else old[name] for name in code.co_freevars]
        return copy_function(function, code, cells)


class _Rewriter(ast.NodeTransformer):
    def __init__(
        self, scan: ClassCode, function: types.FunctionType, definition: ast.FunctionDef, helper: bool
    ) -> None:
        self.scan, self.function, self.definition = scan, function, definition
        self.bound, self.imported = bound_names(definition)
        self.changed = False
        arguments = definition.args
        first = [*arguments.posonlyargs, *arguments.args][:1]
        self.own = first[0].arg if first else None  # what the function calls itself: `self` in a method
        if helper:
            self.owner: str | None = "_ctu_owner"
            arguments.posonlyargs.insert(0, ast.arg(self.owner))
        else:
            self.owner = self.own
            if self._is_rebound(self.own):
                self.owner = None

    def _is_rebound(self, name: str | None) -> bool:
        nodes = list(ast.walk(self.definition))
        arguments = sum(isinstance(node, ast.arg) and node.arg == name for node in nodes)
        stores = sum(
            isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load) for node in nodes
        )
        return arguments > 1 or stores > 0

    def visit_body(self) -> None:
        self.definition.body = [self.visit(statement) for statement in self.definition.body]

    # -- what an expression stands for

    def resolve(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id in self.imported:
                return self.imported[node.id]
            return UNKNOWN if node.id in self.bound else lookup(self.function, node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == self.own:
                static = inspect.getattr_static(self.scan.cls, node.attr, UNKNOWN)
                if isinstance(static, staticmethod):
                    return static.__func__
                return static if isinstance(static, types.BuiltinFunctionType) else UNKNOWN
            if self._is_super(node.value):
                return self._inherited(node.attr)
            target = self.resolve(node.value)
            return UNKNOWN if target is UNKNOWN else member(target, node.attr)
        return UNKNOWN

    def _is_super(self, node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args
        )

    def _inherited(self, name: str) -> Any:
        mro = self.scan.cls.__mro__
        here = lookup(self.function, "__class__")
        for base in mro[mro.index(here) + 1 :] if here in mro else ():
            if name in base.__dict__:
                return base.__dict__[name]
        return UNKNOWN

    # -- nodes

    def visit_Call(self, node: ast.Call) -> ast.AST:
        target = self.resolve(node.func)
        function = node.func
        if is_listed(target, FUNCTIONS) and not self._in_family(node, FUNCTIONS[target]):
            form = FUNCTIONS[target].rstrip("_")
            reason = "its arguments put it outside the family"
            self.scan.skip(self.function, FORMS[form].activation, node.lineno, reason)
            node.args = [self.visit(argument) for argument in node.args]
            return node
        if isinstance(function, ast.Call):
            made = self.resolve(function.func)
            row = MODULES.get(f"{made.__module__}.{made.__qualname__}") if isinstance(made, type) else None
            if isinstance(row, Use):
                self.scan.miss(
                    self.function, row.activation, node.lineno, f"it makes a new {made.__name__} at every call"
                )
        if isinstance(function, ast.Attribute) and target is UNKNOWN and self._is_tensor_method(node, function):
            return self._method(node, function)
        if isinstance(function, ast.Attribute) and function.attr in CLAMPS:
            self._clamp(node, function.attr, is_method=target is UNKNOWN)
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._reference(node) or self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._reference(node) or node

    def _reference(self, node: ast.Attribute | ast.Name) -> ast.AST | None:
        if not isinstance(node.ctx, ast.Load):
            return None
        target = self.resolve(node)
        if target is UNKNOWN:
            return None
        if is_listed(target, OUTSIDE):
            self.scan.skip(self.function, OUTSIDE[target], node.lineno, "it is not in the family")
        elif is_listed(target, FUNCTIONS):
            form = FUNCTIONS[target]
            return self._site(node, FORMS[form.rstrip("_")].activation, "_ctu_function", [ast.Constant(form), node])
        elif isinstance(target, nn.Module):
            use = read_module(target)
            if isinstance(use, Use):
                constant = f"_ctu_use_{use.activation}"
                self.scan.extras[constant] = types.CellType(use)
                return self._site(node, use.activation, "_ctu_global", [_load(constant), node])
        elif isinstance(target, types.FunctionType):
            return self._helper(node, target)
        return None

    def _site(self, node: ast.expr, activation: str, call: str, arguments: list[ast.expr]) -> ast.AST | None:
        scan = self.scan
        if activation not in scan.selection:
            scan.skip(self.function, activation, node.lineno, f"{activation!r} is not among the selected activations")
            return None
        if self.owner is None:
            scan.miss(self.function, activation, node.lineno, "the function has no name for its module")
            return None
        key = scan.record(self.function, activation, node.lineno)
        return self._partial(node, [_load(call), _load(self.owner), ast.Constant(key), *arguments])

    def _method(self, node: ast.Call, function: ast.Attribute) -> ast.AST:
        form = function.attr
        made = self._site(node, FORMS[form.rstrip("_")].activation, "_ctu_method", [ast.Constant(form)])
        if made is None:
            return self.generic_visit(node)
        node.func = made  # type: ignore[assignment]
        node.args = [self.visit(argument) for argument in [function.value, *node.args]]
        return node

    def _helper(self, node: ast.expr, target: types.FunctionType) -> ast.AST | None:
        through_super = isinstance(node, ast.Attribute) and self._is_super(node.value)
        if is_torch(target.__module__) and not through_super:
            return None
        name = self.scan.helper(target)
        if name is None:
            return None
        if self.owner is None:
            self.scan.report(target, "the function that calls it has no name for its module")
            return None
        owner = [_load(self.owner)] * (2 if through_super else 1)
        return self._partial(node, [_load(name), *owner])

    def _partial(self, node: ast.expr, arguments: list[ast.expr]) -> ast.Call:
        self.changed = True
        return ast.fix_missing_locations(ast.copy_location(ast.Call(_load("_ctu_partial"), arguments, []), node))

    # -- details

    def _is_tensor_method(self, node: ast.Call, function: ast.Attribute) -> bool:
        """By its name and arguments: ``self.relu(x)`` is none, ``x.relu()`` is one."""
        of_self = isinstance(function.value, ast.Name) and function.value.id == self.own
        arguments = 1 if function.attr == "prelu" else 0
        return function.attr in METHODS and not of_self and not node.keywords and len(node.args) == arguments

    def _in_family(self, node: ast.Call, form: str) -> bool:
        """False only if literal arguments say so; others are looked at when the call is made."""
        try:
            positional = [ast.literal_eval(argument) for argument in node.args[1:]]
            keywords = {str(k.arg): k.value for k in node.keywords if k.arg not in ("input", "inplace")}
            named = {name: ast.literal_eval(value) for name, value in keywords.items()}
            return FORMS[form.rstrip("_")].read(None, *positional, **named) is not None
        except (ValueError, TypeError):
            return True

    def _clamp(self, node: ast.Call, name: str, is_method: bool) -> None:
        values = {k.arg: k.value for k in node.keywords}
        for argument, position in zip(("min", "max"), node.args[0 if is_method else 1 :]):
            values[argument] = position
        low = values.get("min")
        # Elsewhere it is rarely an activation: paddings, lengths, probabilities.
        in_forward = "forward" in self.function.__name__
        if in_forward and isinstance(low, ast.Constant) and low.value == 0 and "max" not in values:
            self.scan.skip(
                self.function, "relu", node.lineno, f"{name} at 0 is a ReLU written otherwise, and is left alone"
            )


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


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())
