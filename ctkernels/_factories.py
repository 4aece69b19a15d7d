"""Networks and data of a user's own: the functions that build them, by name, and errors of that code told as such."""

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
    """The function at ``package.module:function`` or ``file.py:function``, which takes nothing and returns a ``kind``.

    ``kind`` may be several classes; ``role`` ("model", "data") is what errors call it. The module is imported, a file by its
    path with its folder first in ``sys.path``. What the returned function raises names the factory.

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
    """The outputs of a network that may not be ours, without gradients.

    Raises:
        ValueError: it does not take the inputs; the message begins with ``what``, calls the network by ``name`` or
            class, and has what it raised.
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
    """An error of somebody else's code in one line: ``"RuntimeError: mat1 and mat2 shapes cannot be multiplied"``."""
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _theirs(what: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """Run the user's code; whatever it raises becomes a ValueError that says that it was this code."""
    try:
        return run(*arguments)
    except (Exception, SystemExit) as error:  # SystemExit: a script that is no module
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
        sys.path.insert(0, str(path.absolute().parent))  # for what it imports, now and later
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes can be pickled and their sources found
    try:
        _theirs(f"{title}: importing it", spec.loader.exec_module, module)
    except ValueError:
        del sys.modules[path.stem]
        raise
    return module
