"""Look-up of user functions that build networks and data, with errors that attribute failures to the user's code."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def find_factory(
    name: str, kind: type[Any] | tuple[type[Any], ...] = nn.Module, role: str = "model"
) -> Callable[[], Any]:
    """Finds the function ``package.module:function`` or ``file.py:function``, without arguments, that returns a ``kind``.

    Imports the module; for a file, puts its folder first in ``sys.path``. ``kind`` may be several classes. ``role`` ("model",
    "data") is its name in errors, also in those of the returned function.

    Raises:
        ValueError: another form of name, no such module, file or function, or an error that importing it raised.
    """
    place, colon, function = name.rpartition(":")
    file = place.endswith(".py")
    dotted = all(part.isidentifier() for part in place.split("."))
    if not (colon and function.isidentifier() and (file or dotted)):
        raise ValueError(f"{role} must be package.module:function or file.py:function, got {name!r}")
    title = f"{role} {name!r}"
    module = _from_file(Path(place), title) if file else _from_path(place, title)
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"{title}: {place} has no function {function!r}")

    def build() -> Any:
        result = _theirs(f"{title}: the function", make)
        if not isinstance(result, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join("torch.nn.Module" if k is nn.Module else k.__name__ for k in kinds)
            raise ValueError(f"{title} must return a {wanted}, got {type(result).__name__}")
        return result

    return build


def check_takes(model: nn.Module, *inputs: Tensor, what: str, name: str = "") -> Any:
    """Runs a user's network without gradients.

    Raises:
        ValueError: the network fails on the inputs; the message starts with ``what``, and has the network's ``name`` or
            class and its error.
    """
    try:
        with torch.no_grad():
            return model(*inputs)
    except Exception as error:
        shapes = " and ".join(str(tuple(value.shape)) for value in inputs)
        raise ValueError(
            f"{what} of shape {shapes} do not fit {name or type(model).__name__}: {told(error)}"
        ) from error


def told(error: BaseException) -> str:
    """An error of foreign code in one line: ``"RuntimeError: mat1 and mat2 shapes cannot be multiplied"``."""
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _theirs(what: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """Runs the user's code; turns any error into a ValueError that attributes it to that code."""
    try:
        return run(*arguments)
    except (Exception, SystemExit) as error:  # SystemExit: a script without a main guard
        raise ValueError(f"{what} raised {told(error)}") from error


def _from_path(place: str, title: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place + ".").startswith(error.name + "."):
            raise ValueError(f"{title}: no module named {error.name!r} here or on PYTHONPATH") from error
        raise ValueError(f"{title}: importing it raised {told(error)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{title}: importing it raised {told(error)}") from error


def _from_file(path: Path, title: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{title}: expected a file, found none at {path}")
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "").absolute() == path.absolute():
        return known
    if known is not None:
        raise ValueError(f"{title}: a module named {path.stem!r} has been imported already; rename the file")
    if str(path.absolute().parent) not in sys.path:
        sys.path.insert(0, str(path.absolute().parent))  # for its imports, now and later
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # for pickling its classes and finding their source
    try:
        _theirs(f"{title}: importing it", spec.loader.exec_module, module)
    except ValueError:
        del sys.modules[path.stem]
        raise
    return module
