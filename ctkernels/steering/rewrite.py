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
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

from .activations import ANY, FORMS, FUNCTIONS, METHODS, MODULES, OUTSIDE, Use, activation_of, read_module, read_partial
from .lookup import (
    CLAMPS,
    UNKNOWN,
    bound_names,
    hidden_activations,
    is_activation,
    is_listed,
    is_space,
    is_torch,
    lookup,
    member,
)

if TYPE_CHECKING:
    from .class_code import ClassCode


class Rewriter(ast.NodeTransformer):
    """Redirects the activation calls of one function's definition, and records them in ``scan``."""

    def __init__(
        self, scan: ClassCode, function: types.FunctionType, definition: ast.FunctionDef, helper: bool
    ) -> None:
        self.scan, self.function, self.definition = scan, function, definition
        self.bound, self.imported = bound_names(definition)
        self.changed = False
        self.statement: ast.stmt = definition
        arguments = definition.args
        first = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][:1]
        is_method = any(function in base.__dict__.values() for base in scan.cls.__mro__) if helper else True
        self.own = first[0] if first and is_method else None  # what a method calls its module: `self`
        self.owner: str | None = self.own  # where the knobs are
        if helper:
            self.owner = "_ctu_owner"
            arguments.posonlyargs.insert(0, ast.arg(self.owner))
        elif self._is_rebound(self.own):
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
                if node.attr == "__class__":
                    return self.scan.cls
                if isinstance(static, staticmethod):
                    return static.__func__
                return UNKNOWN if hasattr(type(static), "__get__") else static  # a method would get `self`
            if self._is_super(node.value):
                return self._inherited(node.value, node.attr)
            target = self.resolve(node.value)
            return UNKNOWN if target is UNKNOWN else member(target, node.attr)
        if isinstance(node, ast.Call) and not node.keywords and isinstance(node.func, ast.Name):
            function, arguments = self.resolve(node.func), node.args
            if function is type and len(arguments) == 1 and self._is_own(arguments[0]):
                return self.scan.cls
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
            len(node.args) == 2 and isinstance(node.args[1], ast.Name) and node.args[1].id == self.own
        )

    def _inherited(self, call: ast.Call, name: str) -> Any:
        mro = self.scan.cls.__mro__
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
            self.scan.miss(self.function, activation_of(target), node.lineno, "it writes to a tensor that it is given")
            node.args = [self.visit(argument) for argument in node.args]
            return node
        if is_listed(target, FUNCTIONS) and not self._in_family(node, FUNCTIONS[target]):
            reason = "its arguments put it outside the family"
            self.scan.skip(self.function, activation_of(target), node.lineno, reason)
            node.args = [self.visit(argument) for argument in node.args]
            return node
        if isinstance(function, ast.Call):
            made = self.resolve(function.func)
            row = MODULES.get(f"{made.__module__}.{made.__qualname__}") if isinstance(made, type) else None
            if isinstance(row, Use):
                self.scan.miss(
                    self.function, row.activation, node.lineno, f"it makes a new {made.__name__} at every call"
                )
        if isinstance(function, ast.Attribute) and function.attr in self.scan.children and self._is_own(function.value):
            key = self.scan.child_call(self.function, function.attr, node.lineno)
            if key:
                self.changed = True
                node.keywords.append(ast.keyword("site", ast.copy_location(ast.Constant(key), node)))
        if target is getattr and len(node.args) > 1:
            found = self._reference(node)
            if found is not None:
                return found
            if self.resolve(node) is UNKNOWN:
                self._by_name(node, node.args[0], node.args[1])
        if isinstance(function, ast.Attribute) and target is UNKNOWN and self._is_tensor_method(node, function):
            return self._method(node, function)
        if isinstance(function, ast.Attribute) and function.attr in CLAMPS:
            self._clamp(node, function.attr, is_method=target is UNKNOWN)
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        held = node.value
        if isinstance(held, ast.Attribute) and held.attr == "__dict__":
            self._by_name(node, held.value, node.slice)
        elif isinstance(held, ast.Call) and held.args and self.resolve(held.func) is vars:
            self._by_name(node, held.args[0], node.slice)
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
            self.scan.skip(self.function, OUTSIDE[target], node.lineno, "it is not in the family")
        elif is_listed(target, FUNCTIONS):
            form = ast.Constant(FUNCTIONS[target])
            return self._site(node, activation_of(target), "_ctu_function", [form, node])
        elif isinstance(target, functools.partial) and is_activation(target):
            if read_partial(target) is None:
                reason = "its arguments put it outside the family"
                self.scan.skip(self.function, activation_of(target), node.lineno, reason)
                return None
            form = ast.Constant(FUNCTIONS[target.func])
            return self._site(node, activation_of(target), "_ctu_made", [form, node])
        elif isinstance(target, nn.Module):
            use = read_module(target)
            if isinstance(use, Use):
                constant = f"_ctu_use_{use.activation}"
                self.scan.extras[constant] = types.CellType(use)
                return self._site(node, use.activation, "_ctu_global", [_load(constant), node])
        elif isinstance(target, types.FunctionType):
            return self._helper(node, target)
        else:
            for activation in hidden_activations(target):
                self.scan.miss(self.function, activation, node.lineno, "it is scripted, or chosen from a container")
        return None

    def _site(self, node: ast.expr, activation: str, call: str, arguments: list[ast.expr]) -> ast.AST | None:
        scan = self.scan
        if activation not in scan.selection:
            scan.skip(self.function, activation, node.lineno, f"{activation!r} is not among the selected activations")
            return None
        if self.owner is None:
            scan.miss(self.function, activation, node.lineno, "the function has no name for its module")
            return None
        own = isinstance(node, ast.Attribute) and self._is_own(node.value)
        key = scan.record(self.function, activation, node.lineno, node.attr if own else "")  # type: ignore[attr-defined]
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

    def _by_name(self, node: ast.expr, space: ast.expr, name: ast.expr) -> None:
        """A look-up of a function or a class of torch by a name that only the run tells, or of a tensor's method."""
        method = isinstance(name, ast.Constant) and name.value in METHODS and not self._is_own(space)
        # What is looked up in torch by its name is most often a dtype.
        in_line = not hasattr(self.statement, "body") and "dtype" in ast.unparse(self.statement)
        if method or (is_space(self.resolve(space)) and not in_line and "dtype" not in ast.unparse(node)):
            reason = "the function is chosen by name, at run time"
            if self.scan.is_reached(self.function):
                self.scan.miss(self.function, ANY, node.lineno, reason)
            else:
                self.scan.skip(self.function, ANY, node.lineno, f"{reason}, where no forward leads to")

    def _is_own(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self.own

    def _is_tensor_method(self, node: ast.Call, function: ast.Attribute) -> bool:
        """By its name and arguments: ``self.relu(x)`` is none, ``x.relu()`` is one."""
        arguments = 1 if function.attr == "prelu" else 0
        return (
            function.attr in METHODS
            and not self._is_own(function.value)
            and not node.keywords
            and len(node.args) == arguments
        )

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


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())
