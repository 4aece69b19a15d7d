"""Rewrites the methods of a class: copies of them in which activation calls are redirected to units.

Nothing is run or traced. Every reference to an activation function (``F.relu``, ``torch.relu``, an alias, ``x.relu()``)
becomes ``partial(call_function, self, key, name, F.relu)``, and a reference to a helper function that contains one
becomes a reference to a copy of the helper. Copies share globals, defaults, closure cells and line numbers with the
originals, which stay unchanged. They are plain Python: compilers can trace them, and no hook or mode is needed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from . import runtime
from .activations import (
    ANY,
    FUNCTIONS,
    METHODS,
    MODULES,
    OUTSIDE,
    SIGNATURES,
    ActivationSpec,
    Arguments,
    activation_of,
    read_module,
    read_partial,
)
from .names import (
    CLAMPS,
    UNKNOWN,
    bound_names,
    code_names,
    default_values,
    hidden_activations,
    is_activation,
    is_listed,
    is_namespace,
    is_torch,
    known_calls,
    lookup,
    member,
    mentions,
)
from .source import NoSource, compile_function, copy_function, parse_function

_RUNTIME: dict[str, Any] = {
    "_ctu_partial": functools.partial,
    "_ctu_function": runtime.call_function,
    "_ctu_method": runtime.call_method,
    "_ctu_global": runtime.call_global,
    "_ctu_call_partial": runtime.call_partial,
}


class ActivationCall(NamedTuple):
    """An activation call in source code. ``key``: unique in its class, the function's name, numbered from the second.

    ``attribute``: the class attribute that holds the activation, which an instance may override.
    """

    key: str
    activation: str
    where: str
    reason: str = ""
    attribute: str = ""


class ClassCode:
    """The activation calls in the methods of ``cls``, and copies of the methods that redirect them.

    Attributes:
        calls: redirected calls.
        namespace: {method name: rewritten copy}.
        missed: calls of selected activations that cannot be redirected, with the reason.
        skipped: calls of activations outside the family or the selection, with the reason.
        repeats: {attribute in ``children``: calls of its activation module, from the second on}.
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
        self.repeats: dict[str, list[ActivationCall]] = {}
        self.calls: list[ActivationCall] = []
        self.missed: list[ActivationCall] = []
        self.skipped: list[ActivationCall] = []
        self.namespace: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._helpers: dict[types.FunctionType, str | None] = {}
        self.extras: dict[str, types.CellType] = {name: types.CellType(value) for name, value in _RUNTIME.items()}
        for name, base in _methods(cls):
            member = base.__dict__[name]
            if isinstance(member, types.FunctionType):
                if is_torch(member.__module__):
                    continue  # `act = F.silu` in a class: the methods that call it are rewritten
                copy = self.method(member)
                if copy is not None:
                    self.namespace[name] = copy
            elif isinstance(member, property) and isinstance(member.fget, types.FunctionType):
                copy = self.method(member.fget)
                if copy is not None:
                    self.namespace[name] = property(copy, member.fset, member.fdel, member.__doc__)
            elif isinstance(member, classmethod) and isinstance(member.__func__, types.FunctionType):
                self.report(member.__func__, "a class method has no module to take beta from")

    # -- records

    def record(self, function: types.FunctionType, activation: str, line: int, attribute: str = "") -> str:
        self._counts[function.__name__] += 1
        count = self._counts[function.__name__]
        key = function.__name__ if count == 1 else f"{function.__name__}#{count}"
        self.calls.append(ActivationCall(key, activation, _where(function, line), attribute=attribute))
        return key

    def child_call(self, function: types.FunctionType, attribute: str, line: int) -> str:
        """The key of this call of an activation module: "" for the first in the class, then "#2", "#3"."""
        if attribute not in self.repeats:
            self.repeats[attribute] = []
            return ""
        key = f"#{len(self.repeats[attribute]) + 2}"
        self.repeats[attribute].append(ActivationCall(key, ANY, _where(function, line)))
        return key

    def miss(self, function: types.FunctionType, activation: str, line: int, reason: str) -> None:
        if activation in self.selection or activation == ANY:
            self.missed.append(ActivationCall(function.__name__, activation, _where(function, line), reason))

    def skip(self, function: types.FunctionType, activation: str, line: int, reason: str) -> None:
        self.skipped.append(ActivationCall(function.__name__, activation, _where(function, line), reason))

    def report(self, function: types.FunctionType, reason: str) -> None:
        """Records the calls of a function that cannot be rewritten, and of its helpers, as missed."""
        for caller, target, line in known_calls(function, self.memo):
            self.miss(caller, activation_of(target), line, reason)

    # -- copies

    def mentions(self, function: types.FunctionType, seen: frozenset[types.FunctionType] = frozenset()) -> bool:
        """True if ``function`` may contain an activation call, possibly through an attribute of its class."""
        if mentions(function, self.memo):
            return True
        names = code_names(function.__code__)
        if self.children.intersection(names):
            return True
        bases = self.cls.__mro__ if "super" in names else ()
        inherited = [base.__dict__[name] for base in bases for name in names if name in base.__dict__]
        static = [inspect.getattr_static(self.cls, name, None) for name in names]
        static_functions = [value.__func__ for value in static if isinstance(value, staticmethod)]
        if any(is_activation(value) or hidden_activations(value) for value in (*static, *static_functions)):
            return True
        seen |= {function}
        return any(
            self.mentions(value, seen)
            for value in (*static_functions, *inherited)
            if isinstance(value, types.FunctionType) and value not in seen
        )

    def method(self, function: types.FunctionType) -> types.FunctionType | None:
        """A copy that finds its units on its first argument; None if there is nothing to redirect."""
        if not self.mentions(function):
            return None
        if isinstance(getattr(function, "__wrapped__", None), types.FunctionType):
            return self._rewrap(function, helper=False)
        return self._rewrite(function, helper=False)

    def helper(self, function: types.FunctionType) -> str | None:
        """The name, in rewritten code, of a copy of ``function`` that takes the owner as its first argument."""
        if function not in self._helpers:
            self._helpers[function] = None
            if self.mentions(function):
                name, cell = f"_ctu_helper_{len(self._helpers)}", types.CellType()
                self._helpers[function], self.extras[name] = name, cell  # before rewriting it: it may be recursive
                wrapped = isinstance(getattr(function, "__wrapped__", None), types.FunctionType)
                copy = self._rewrap(function, helper=True) if wrapped else self._rewrite(function, helper=True)
                if copy is None:
                    self._helpers[function] = None
                else:
                    cell.cell_contents = copy
        return self._helpers[function]

    def _rewrap(self, wrapper: types.FunctionType, helper: bool) -> types.FunctionType | None:
        """A copy of a decorator's wrapper around a rewritten copy of the wrapped function."""
        inner: types.FunctionType = wrapper.__wrapped__  # type: ignore[attr-defined]
        cells = list(wrapper.__closure__ or ())
        positions = [i for i, cell in enumerate(cells) if _contents(cell) is inner]
        passes_all = not wrapper.__code__.co_argcount and wrapper.__code__.co_flags & inspect.CO_VARARGS
        if not positions or (helper and not passes_all):  # a helper's copy takes one more argument
            self.report(inner, "its decorator hides it")
            return None
        if isinstance(getattr(inner, "__wrapped__", None), types.FunctionType):
            copy = self._rewrap(inner, helper)
        else:
            copy = self._rewrite(inner, helper)
        if copy is None:
            return None
        for position in positions:
            cells[position] = types.CellType(copy)
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
        rewriter = _Rewriter(self, function, definition, helper)
        rewriter.visit_body()
        if not rewriter.changed:
            return None
        code = compile_function(tree, function, self.extras)
        old = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        cells = [self.extras[name] if name in self.extras else old[name] for name in code.co_freevars]
        return copy_function(function, code, cells)


def _methods(cls: type) -> list[tuple[str, type]]:
    """(name, class that defines it) of the attributes of ``cls`` that are defined outside torch."""
    defined_by: dict[str, type] = {}
    for base in cls.__mro__:
        for name in base.__dict__:
            defined_by.setdefault(name, base)
    outside_torch = [
        (name, base) for name, base in defined_by.items() if not is_torch(base.__module__) and base is not object
    ]
    return [(name, base) for name, base in outside_torch if name == "__call__" or not name.startswith("__")]


def _where(function: types.FunctionType, line: int) -> str:
    return f"{function.__code__.co_filename}:{line}"


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return UNKNOWN


class _Rewriter(ast.NodeTransformer):
    """Redirects the activation calls of one function's definition, and records them in ``code``."""

    def __init__(
        self, code: ClassCode, function: types.FunctionType, definition: ast.FunctionDef, helper: bool
    ) -> None:
        self.code, self.function, self.definition = code, function, definition
        self.bound, self.imported = bound_names(definition)
        self.changed = False
        self.decided: dict[ast.expr, str] = {}  # activations that depend on a call's arguments, by function node
        self.statement: ast.stmt = definition
        arguments = definition.args
        first = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][:1]
        is_method = any(function in base.__dict__.values() for base in code.cls.__mro__) if helper else True
        self.self_name = first[0] if first and is_method else None
        self.owner: str | None = self.self_name  # name of the variable with the module that has the units
        if helper:
            self.owner = "_ctu_owner"
            arguments.posonlyargs.insert(0, ast.arg(self.owner))
        elif self._is_rebound(self.self_name):
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

    # -- values of expressions

    def resolve(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id in self.imported:
                return self.imported[node.id]
            return UNKNOWN if node.id in self.bound else lookup(self.function, node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == self.self_name:
                static = inspect.getattr_static(self.code.cls, node.attr, UNKNOWN)
                if node.attr == "__class__":
                    return self.code.cls
                if isinstance(static, staticmethod):
                    return static.__func__
                return UNKNOWN if hasattr(type(static), "__get__") else static  # descriptors would bind `self`
            if self._is_super(node.value):
                return self._inherited(node.value, node.attr)
            target = self.resolve(node.value)
            return UNKNOWN if target is UNKNOWN else member(target, node.attr)
        if isinstance(node, ast.Call) and not node.keywords and isinstance(node.func, ast.Name):
            function, arguments = self.resolve(node.func), node.args
            if function is type and len(arguments) == 1 and self._is_self(arguments[0]):
                return self.code.cls
            if function is getattr and len(arguments) > 1:
                name = arguments[1]
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    return self.resolve(ast.Attribute(arguments[0], name.value, ast.Load()))
        return UNKNOWN

    def _is_super(self, node: ast.expr) -> TypeGuard[ast.Call]:
        """``super()`` or ``super(Class, self)``."""
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "super":
            return False
        return not node.args or (
            len(node.args) == 2 and isinstance(node.args[1], ast.Name) and node.args[1].id == self.self_name
        )

    def _inherited(self, call: ast.Call, name: str) -> Any:
        mro = self.code.cls.__mro__
        here = self.resolve(call.args[0]) if call.args else lookup(self.function, "__class__")
        for base in mro[mro.index(here) + 1 :] if here in mro else ():
            if name in base.__dict__:
                return base.__dict__[name]
        return UNKNOWN

    # -- nodes

    def visit_Call(self, node: ast.Call) -> ast.AST:
        target = self.resolve(node.func)
        function = node.func
        if is_listed(target, FUNCTIONS) and any(keyword.arg == "out" for keyword in node.keywords):
            self.code.miss(self.function, activation_of(target), node.lineno, "it writes to a tensor that it is given")
            node.args = [self.visit(argument) for argument in node.args]
            return node
        if is_listed(target, FUNCTIONS):
            arguments = self._read_literals(node, FUNCTIONS[target])
            if arguments is None:
                reason = "its arguments put it outside the family"
                self.code.skip(self.function, activation_of(target), node.lineno, reason)
                node.args = [self.visit(argument) for argument in node.args]
                return node
            self.decided[function] = arguments.activation
        elif target is functools.partial and node.args and is_listed(inner := self.resolve(node.args[0]), FUNCTIONS):
            arguments = self._read_literals(ast.Call(node.args[0], node.args[1:], node.keywords), FUNCTIONS[inner])
            self.decided[node.args[0]] = arguments.activation if arguments is not None else ""
        if isinstance(function, ast.Call):
            cls = self.resolve(function.func)
            row = MODULES.get(f"{cls.__module__}.{cls.__qualname__}") if isinstance(cls, type) else None
            if isinstance(row, ActivationSpec):
                self.code.miss(
                    self.function, row.activation, node.lineno, f"it makes a new {cls.__name__} at every call"
                )
        if (
            isinstance(function, ast.Attribute)
            and function.attr in self.code.children
            and self._is_self(function.value)
        ):
            key = self.code.child_call(self.function, function.attr, node.lineno)
            if key:
                self.changed = True
                node.keywords.append(ast.keyword("site", ast.copy_location(ast.Constant(key), node)))
        if target is getattr and len(node.args) > 1:
            reference = self._reference(node)
            if reference is not None:
                return reference
            if self.resolve(node) is UNKNOWN:
                self._by_name(node, node.args[0], node.args[1])
        if isinstance(function, ast.Attribute) and target is UNKNOWN and self._is_tensor_method(node, function):
            return self._method(node, function)
        if isinstance(function, ast.Attribute) and function.attr in CLAMPS:
            self._clamp(node, function.attr, is_method=target is UNKNOWN)
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        value = node.value
        if isinstance(value, ast.Attribute) and value.attr == "__dict__":
            self._by_name(node, value.value, node.slice)
        elif isinstance(value, ast.Call) and value.args and self.resolve(value.func) is vars:
            self._by_name(node, value.args[0], node.slice)
        return self.generic_visit(node)

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt):
            self.statement = node
        return super().visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._reference(node) or self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._reference(node) or node

    def _reference(self, node: ast.Attribute | ast.Name | ast.Call) -> ast.AST | None:
        if not isinstance(node, ast.Call) and not isinstance(node.ctx, ast.Load):
            return None
        target = self.resolve(node)
        if target is UNKNOWN:
            return None
        if is_listed(target, OUTSIDE):
            self.code.skip(self.function, OUTSIDE[target], node.lineno, "it is not in the family")
        elif is_listed(target, FUNCTIONS):
            function_name = ast.Constant(FUNCTIONS[target])
            activation = self.decided.get(node) or activation_of(target)
            return self._site(node, activation, "_ctu_function", [function_name, node])
        elif isinstance(target, functools.partial) and is_activation(target):
            if read_partial(target) is None:
                reason = "its arguments put it outside the family"
                self.code.skip(self.function, activation_of(target), node.lineno, reason)
                return None
            function_name = ast.Constant(FUNCTIONS[target.func])
            return self._site(node, activation_of(target), "_ctu_call_partial", [function_name, node])
        elif isinstance(target, nn.Module):
            spec = read_module(target)
            if isinstance(spec, ActivationSpec):
                constant = f"_ctu_spec_{spec.activation}"
                self.code.extras[constant] = types.CellType(spec)
                return self._site(node, spec.activation, "_ctu_global", [_load(constant), node])
        elif isinstance(target, types.FunctionType):
            return self._helper(node, target)
        else:
            for activation in hidden_activations(target):
                self.code.miss(self.function, activation, node.lineno, "it is scripted, or chosen from a container")
        return None

    def _site(self, node: ast.expr, activation: str, call: str, arguments: list[ast.expr]) -> ast.AST | None:
        code = self.code
        if activation not in code.selection:
            code.skip(self.function, activation, node.lineno, f"{activation!r} is not among the selected activations")
            return None
        if self.owner is None:
            code.miss(self.function, activation, node.lineno, "the function has no name for its module")
            return None
        is_attribute = isinstance(node, ast.Attribute) and self._is_self(node.value)
        key = code.record(self.function, activation, node.lineno, node.attr if is_attribute else "")  # type: ignore[attr-defined]
        return self._partial(node, [_load(call), _load(self.owner), ast.Constant(key), *arguments])

    def _method(self, node: ast.Call, function: ast.Attribute) -> ast.AST:
        name = function.attr
        partial = self._site(node, SIGNATURES[name.rstrip("_")].activation, "_ctu_method", [ast.Constant(name)])
        if partial is None:
            return self.generic_visit(node)
        node.func = partial  # type: ignore[assignment]
        node.args = [self.visit(argument) for argument in [function.value, *node.args]]
        return node

    def _helper(self, node: ast.expr, target: types.FunctionType) -> ast.AST | None:
        through_super = isinstance(node, ast.Attribute) and self._is_super(node.value)
        if is_torch(target.__module__) and not through_super:
            return None
        name = self.code.helper(target)
        if name is None:
            return None
        if self.owner is None:
            self.code.report(target, "the function that calls it has no name for its module")
            return None
        owner = [_load(self.owner)] * (2 if through_super else 1)
        return self._partial(node, [_load(name), *owner])

    def _partial(self, node: ast.expr, arguments: list[ast.expr]) -> ast.Call:
        self.changed = True
        return ast.fix_missing_locations(ast.copy_location(ast.Call(_load("_ctu_partial"), arguments, []), node))

    # -- details

    def _by_name(self, node: ast.expr, space: ast.expr, name: ast.expr) -> None:
        """Records a look-up, by a name known only at run time, of a function or class of torch or of a tensor's method."""
        method = isinstance(name, ast.Constant) and name.value in METHODS and not self._is_self(space)
        # Most look-ups by name in torch are of dtypes.
        in_line = not hasattr(self.statement, "body") and "dtype" in ast.unparse(self.statement)
        if method or (is_namespace(self.resolve(space)) and not in_line and "dtype" not in ast.unparse(node)):
            reason = "the function is chosen by name, at run time"
            if self.code.is_reached(self.function):
                self.code.miss(self.function, ANY, node.lineno, reason)
            else:
                self.code.skip(self.function, ANY, node.lineno, f"{reason}, where no forward leads to")

    def _is_self(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self.self_name

    def _is_tensor_method(self, node: ast.Call, function: ast.Attribute) -> bool:
        """By name and arguments: true for ``x.relu()``, false for ``self.relu(x)``."""
        arguments = 1 if function.attr == "prelu" else 0
        return (
            function.attr in METHODS
            and not self._is_self(function.value)
            and not node.keywords
            and len(node.args) == arguments
        )

    def _read_literals(self, node: ast.Call, function_name: str) -> Arguments | None:
        """The literal arguments; None if they rule out the family. Other arguments are read at run time."""
        try:
            positional = [ast.literal_eval(argument) for argument in node.args[1:]]
            keywords = {str(k.arg): k.value for k in node.keywords if k.arg not in ("input", "inplace")}
            named = {name: ast.literal_eval(value) for name, value in keywords.items()}
            return SIGNATURES[function_name.rstrip("_")].read(None, *positional, **named)
        except (ValueError, TypeError):
            return Arguments(None)

    def _clamp(self, node: ast.Call, name: str, is_method: bool) -> None:
        values = {k.arg: k.value for k in node.keywords}
        for argument, position in zip(("min", "max"), node.args[0 if is_method else 1 :]):
            values[argument] = position
        low = values.get("min")
        # Outside forward, a clamp is rarely an activation: paddings, lengths, probabilities.
        in_forward = "forward" in self.function.__name__
        if in_forward and isinstance(low, ast.Constant) and low.value == 0 and "max" not in values:
            self.code.skip(
                self.function, "relu", node.lineno, f"{name} at 0 is a ReLU written otherwise, and is left alone"
            )


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())
