"""What names in a function's code stand for, read without running it."""

from __future__ import annotations

import ast
import dis
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from .activations import FUNCTIONS, MODULES, OUTSIDE, Use, read_module

UNKNOWN: Any = object()
CLAMPS = ("clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_")
_NAMING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
_CLASSES = {path.rpartition(".")[2] for path, row in MODULES.items() if isinstance(row, Use)}
_WORDS = {*FUNCTIONS.values(), *OUTSIDE.values(), *CLAMPS, *_CLASSES}


def is_torch(module_name: str | None) -> bool:
    return module_name is not None and (module_name == "torch" or module_name.startswith("torch."))


def lookup(function: types.FunctionType, name: str) -> Any:
    """What a name that is not local to ``function`` stands for now, or UNKNOWN."""
    code = function.__code__
    if name in code.co_freevars:
        try:
            return (function.__closure__ or ())[code.co_freevars.index(name)].cell_contents
        except ValueError:  # a cell that is still empty
            return UNKNOWN
    return function.__globals__.get(name, UNKNOWN)


def member(target: Any, name: str) -> Any:
    """``target.name`` where reading it runs no code of a stranger: in modules and classes."""
    if isinstance(target, types.ModuleType):
        return vars(target).get(name, UNKNOWN)
    if isinstance(target, type):
        return getattr(target, name, UNKNOWN)
    return UNKNOWN


def is_listed(target: Any, table: dict[Any, str]) -> bool:
    try:
        return target in table
    except TypeError:  # unhashable
        return False


def is_activation(target: Any) -> bool:
    """A function of torch that is an activation, or a module that is one and lives outside the model."""
    if isinstance(target, nn.Module):
        return isinstance(read_module(target), Use)
    return is_listed(target, FUNCTIONS)


def code_names(code: types.CodeType) -> set[str]:
    """Every global, attribute and closure name in a function's code and in the functions nested in it."""
    names = {*code.co_names, *code.co_freevars}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= code_names(const)
    return names


def mentions(function: types.FunctionType, memo: dict[types.FunctionType, bool]) -> bool:
    """Whether ``function``, or a function outside torch that it names, can contain an activation call.

    Decided from bytecode, cheaply; it may say yes where the source then shows none, never the reverse.
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
        targets = list(_named(current, names))
        if names & _WORDS or any(is_activation(target) for target in targets):
            memo[function] = memo[current] = True
            return True
        todo += [t for t in targets if isinstance(t, types.FunctionType) and not is_torch(t.__module__)]
    memo.update(dict.fromkeys(seen, False))
    return False


def direct_activations(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(written name, function) of the activation functions that bytecode loads: for code that has no source."""
    written, target = "", UNKNOWN
    for instruction in dis.get_instructions(function):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME"):
            written = instruction.argval
            target = lookup(function, written)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and target is not UNKNOWN:
            written = f"{written}.{instruction.argval}"
            target = member(target, instruction.argval)
        elif instruction.opname not in ("CACHE", "PUSH_NULL", "NOP"):
            target = UNKNOWN
        if target is not UNKNOWN and is_activation(target):
            yield written, target
            target = UNKNOWN


def bound_names(tree: ast.AST) -> tuple[set[str], dict[str, Any]]:
    """The names that a function, or one nested in it, binds; and, apart, what its own import statements bind."""
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


def _named(function: types.FunctionType, names: set[str]) -> Iterator[Any]:
    for name in names:
        target = lookup(function, name)
        yield target
        if isinstance(target, types.ModuleType) and not is_torch(target.__name__):
            yield from (member(target, attribute) for attribute in names)
        elif isinstance(target, type) and not is_torch(target.__module__):
            yield from (found for attribute in names if callable(found := target.__dict__.get(attribute)))
