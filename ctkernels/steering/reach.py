"""Which functions a forward pass may call."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from .lookup import code_names, default_values, is_torch, named


def reached(classes: Iterable[type]) -> set[types.FunctionType]:
    """The functions that the forwards of ``classes`` may call, rather too many than too few.

    Methods are found by name: ``x.embed(...)`` reaches every ``embed`` of ``classes``, whatever ``x`` is. What is not
    reached loads, saves or converts a model, and is no part of what it computes.
    """
    by_name: dict[str, list[types.FunctionType]] = {}
    for base in {base for cls in classes for base in cls.__mro__ if not is_torch(base.__module__)}:
        for name, value in vars(base).items():
            function = _plain(value)
            if function is not None:
                by_name.setdefault(name, []).append(function)
    found: set[types.FunctionType] = set()
    todo = [f for name, functions in by_name.items() if "forward" in name or name == "__call__" for f in functions]
    while todo:
        current = todo.pop()
        if current in found or is_torch(current.__module__):
            continue
        found.add(current)
        names = code_names(current.__code__)
        for target in (*named(current, names), *default_values(current), getattr(current, "__wrapped__", None)):
            function = _plain(target)
            if function is not None:
                todo.append(function)
        for name in names:
            todo += by_name.get(name, ())
    return found


def _plain(found: Any) -> types.FunctionType | None:
    """The function that a class's attribute or a global stands for."""
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    return found if isinstance(found, types.FunctionType) else None
