"""Parses the source of a function, and compiles a modified syntax tree into a function that is otherwise the same."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import sys
import types
from collections.abc import Iterable
from typing import Any

_FEATURES = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)


class NoSource(Exception):
    """Raised if the source of a function is unusable; the message says why."""


def parse_function(function: types.FunctionType) -> tuple[ast.Module, ast.FunctionDef]:
    """Parses a function's definition, into a factory whose arguments are its closure; checks that it matches the code."""
    code = function.__code__
    try:
        lines, start = inspect.getsourcelines(code)
        indented = lines[0][:1].isspace()
        tree = ast.parse("".join(["if True:\n", *lines] if indented else lines))
    except (OSError, SyntaxError, IndexError) as error:
        raise NoSource("its source is not available") from error
    definition = tree.body[0].body[0] if indented else tree.body[0]  # type: ignore[attr-defined]
    if not isinstance(definition, ast.FunctionDef) or definition.name != code.co_name:
        raise NoSource("only a plain function definition can be read, not a lambda or a coroutine")
    ast.increment_lineno(tree, start - (2 if indented else 1))
    definition.decorator_list, definition.returns = [], None  # already applied
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    factory = ast.parse("def _ctu_factory(): pass").body[0]
    assert isinstance(factory, ast.FunctionDef)
    # The definition's name must not be local to the factory: a recursive function must resolve it as before.
    factory.body = [definition] if definition.name in code.co_freevars else [ast.Global([definition.name]), definition]
    owner = function.__qualname__.split(".")[-2:-1]
    body: ast.stmt = factory
    if owner and owner[0].isidentifier():  # so that self.__name is mangled as before
        body = ast.ClassDef(owner[0], bases=[], keywords=[], body=[factory], decorator_list=[])
        if sys.version_info >= (3, 12):
            body.type_params = []
    module = ast.Module([body], [])
    again = compile_function(module, function)
    if _fingerprint(again) != _fingerprint(code):
        raise NoSource("its source does not match the running code")
    return module, definition


def _fingerprint(code: types.CodeType) -> tuple[Any, ...]:
    # Not co_code: the compiler uses other instructions for `F.relu` if it sees the import of F.
    constants = [repr(const) for const in code.co_consts if not isinstance(const, types.CodeType)]
    return code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, constants


def compile_function(tree: ast.Module, function: types.FunctionType, extra: Iterable[str] = ()) -> types.CodeType:
    """Compiles the definition in ``tree``. Its closure has the function's names and ``extra``."""
    name, flags = function.__code__.co_name, function.__code__.co_flags & _FEATURES
    factory = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    factory.args.args = [ast.arg(cell) for cell in (*function.__code__.co_freevars, *extra)]
    ast.fix_missing_locations(tree)
    code = compile(tree, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    while code.co_name != name or code.co_flags & inspect.CO_NESTED == 0:  # module, class, factory, function
        code = next(const for const in code.co_consts if isinstance(const, types.CodeType))
    if sys.version_info >= (3, 11):
        code = code.replace(co_qualname=function.__code__.co_qualname)
    return code


def copy_function(
    function: types.FunctionType, code: types.CodeType, cells: list[types.CellType], wrapped: Any = None
) -> types.FunctionType:
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    functools.update_wrapper(copy, function)
    copy.__kwdefaults__ = function.__kwdefaults__
    if wrapped is None:
        del copy.__wrapped__  # type: ignore[attr-defined]
    else:
        copy.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return copy
