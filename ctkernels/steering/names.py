"""Static resolution of names in function code, and of the functions that code can reach."""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import re
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .activations import (
    FUNCTIONS,
    METHODS,
    MODULES,
    NAMESPACES,
    OUTSIDE,
    SIGNATURES,
    ActivationSpec,
    activation_of,
    read_module,
)

UNKNOWN: Any = object()
CLAMPS = ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_")
_BY_NAME = {"getattr", "vars", "__dict__"}
_NAMING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
_CLASSES = {path.rpartition(".")[2] for path, row in MODULES.items() if isinstance(row, ActivationSpec)}
_WORDS = {*FUNCTIONS.values(), *OUTSIDE.values(), *CLAMPS, *_CLASSES}


def is_torch(module_name: str | None) -> bool:
    return module_name is not None and (module_name == "torch" or module_name.startswith("torch."))


def lookup(function: types.FunctionType, name: str) -> Any:
    """The current value of a global or closure name in ``function``, or UNKNOWN."""
    code = function.__code__
    if name in code.co_freevars:
        try:
            return (function.__closure__ or ())[code.co_freevars.index(name)].cell_contents
        except ValueError:  # an empty cell
            return UNKNOWN
    return function.__globals__.get(name, vars(builtins).get(name, UNKNOWN))


def member(target: Any, name: str) -> Any:
    """``target.name`` if reading it runs no foreign code (modules, classes); else UNKNOWN."""
    if isinstance(target, types.ModuleType):
        return vars(target).get(name, UNKNOWN)
    if isinstance(target, (type, torch._ops.OpOverloadPacket)):
        return getattr(target, name, UNKNOWN)
    return UNKNOWN


def is_listed(target: Any, table: dict[Any, str]) -> bool:
    try:
        return target in table
    except TypeError:  # unhashable
        return False


def is_activation(target: Any) -> bool:
    """Whether ``target`` is an activation function of torch, a partial of one, or an activation module."""
    if isinstance(target, nn.Module):
        return isinstance(read_module(target), ActivationSpec)
    return is_listed(target.func if isinstance(target, functools.partial) else target, FUNCTIONS)


def is_namespace(target: Any) -> bool:
    """Whether ``target`` is a module or class of torch in which activations may be looked up by name."""
    return any(target is space for space in (*NAMESPACES, nn))


def default_values(function: types.FunctionType) -> list[Any]:
    """The default values of ``function``'s arguments."""
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def code_names(code: types.CodeType) -> set[str]:
    """Every global, attribute and closure name in a function's code, nested functions included."""
    names = {*code.co_names, *code.co_freevars}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= code_names(const)
    return names


def mentions(function: types.FunctionType, memo: dict[types.FunctionType, bool]) -> bool:
    """True if ``function``, or a function outside torch that it names, may contain an activation call.

    A cheap test of the bytecode, without false negatives.
    """
    seen: set[types.FunctionType] = set()
    todo = [function]
    while todo:
        current = todo.pop()
        if memo.get(current):
            memo[function] = True
            return True
        if current in seen or current in memo:
            continue
        seen.add(current)
        names = code_names(current.__code__)
        targets = [*named(current, names), *default_values(current), getattr(current, "__wrapped__", None)]
        by_name = bool(names & _BY_NAME) and ("functional" in names or any(map(is_namespace, targets)))
        by_name = by_name or ("getattr" in names and any(method in current.__code__.co_consts for method in METHODS))
        if names & _WORDS or by_name or any(is_activation(t) or hidden_activations(t) for t in targets):
            memo[function] = memo[current] = True
            return True
        todo += [t for t in targets if isinstance(t, types.FunctionType) and not is_torch(t.__module__)]
    memo.update(dict.fromkeys(seen, False))
    return False


def hidden_activations(target: Any) -> list[str]:
    """The activations in a scripted function, or in a list, tuple or dict."""
    if isinstance(target, torch.jit.ScriptFunction):
        operators = {name.rstrip("_") for name in re.findall(r"aten::(\w+)", str(target.inlined_graph))}
        return sorted(SIGNATURES[name].activation for name in operators & set(SIGNATURES))
    values = target.values() if isinstance(target, dict) else target if isinstance(target, (list, tuple)) else ()
    return sorted({activation_of(value) for value in values if is_activation(value)})


def known_calls(
    function: types.FunctionType, memo: dict[types.FunctionType, bool]
) -> Iterator[tuple[types.FunctionType, Any, int]]:
    """(function, activation function, line) of the activations in the bytecode of ``function`` and its helpers.

    For code whose source is unusable. ``x.relu()`` is yielded as ``torch.relu``.
    """
    seen, todo = {function}, [function]
    while todo:
        current = todo.pop()
        line, target, method = current.__code__.co_firstlineno, UNKNOWN, ""
        for instruction in dis.get_instructions(current):
            operation, argument = instruction.opname, instruction.argval
            if operation in ("CACHE", "PUSH_NULL", "NOP", "PRECALL"):
                continue
            if operation.startswith("CALL") and method and argument == 0:  # no arguments other than x
                yield current, getattr(torch, method), line
            method = ""
            if operation in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME"):
                target = lookup(current, argument)
            elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
                method = argument if target is UNKNOWN and argument in ("relu", "relu_") else ""
                target = UNKNOWN if target is UNKNOWN else member(target, argument)
            else:
                target = UNKNOWN
            if target is not UNKNOWN and is_activation(target):
                yield current, target, line
            if isinstance(target, types.FunctionType) and not is_torch(target.__module__) and target not in seen:
                seen.add(target)
                if mentions(target, memo):
                    todo.append(target)


def bound_names(tree: ast.AST) -> tuple[set[str], dict[str, Any]]:
    """(names bound in a function, nested functions included; {name: value} of names bound only by its imports)."""
    bound: set[str] = set()
    imported: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, _NAMING) and node.name and node is not tree:
            bound.add(node.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name if alias.asname else alias.name.split(".")[0]
                imported[alias.asname or path] = sys.modules.get(path, UNKNOWN)
        elif isinstance(node, ast.ImportFrom):
            source = sys.modules.get(node.module or "") if node.level == 0 else None
            for alias in node.names:
                imported[alias.asname or alias.name] = member(source, alias.name) if source else UNKNOWN
    return bound, {name: target for name, target in imported.items() if name not in bound}


def named(function: types.FunctionType, names: set[str]) -> Iterator[Any]:
    """Possible values of ``names`` in the code of ``function``."""
    for name in names:
        target = lookup(function, name)
        yield target
        if isinstance(target, types.ModuleType) and not is_torch(target.__name__):
            yield from (member(target, attribute) for attribute in names)
        elif isinstance(target, type) and not is_torch(target.__module__):
            yield from (value for attribute in names if callable(value := target.__dict__.get(attribute)))


def reached(classes: Iterable[type]) -> set[types.FunctionType]:
    """The functions that the forwards of ``classes`` may call: an upper bound.

    Methods are matched by name: ``x.embed(...)`` reaches every ``embed`` of ``classes``. Functions that are not reached load,
    save or convert a model, and are not part of its computation.
    """
    by_name: dict[str, list[types.FunctionType]] = {}
    for base in {base for cls in classes for base in cls.__mro__ if not is_torch(base.__module__)}:
        for name, value in vars(base).items():
            function = _function_of(value)
            if function is not None:
                by_name.setdefault(name, []).append(function)
    reachable: set[types.FunctionType] = set()
    todo = [f for name, functions in by_name.items() if "forward" in name or name == "__call__" for f in functions]
    while todo:
        current = todo.pop()
        if current in reachable or is_torch(current.__module__):
            continue
        reachable.add(current)
        names = code_names(current.__code__)
        for target in (*named(current, names), *default_values(current), getattr(current, "__wrapped__", None)):
            function = _function_of(target)
            if function is not None:
                todo.append(function)
        for name in names:
            todo += by_name.get(name, ())
    return reachable


def _function_of(value: Any) -> types.FunctionType | None:
    """The function behind a class attribute or a global."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None
