"""Lazy imports of optional packages, with errors that name the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports ``module``, one of the optional dependencies ``ctkernels[extra]``.

    Args:
        module: dotted name, such as ``"sklearn.linear_model"``.
        extra: name of the group in the package's optional dependencies, such as ``"lab"``.
        purpose: what needs it, for the message: ``"the linear probe"``.

    Raises:
        ImportError: the module (or its top-level package) is not installed, or is broken; the message names the extra.

    Examples:
        >>> require("json", "lab", "the picture").dumps([])
        '[]'
        >>> require("no_such_module", "lab", "the picture")
        Traceback (most recent call last):
            ...
        ImportError: ...
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ImportError(
            f'{purpose} needs {missing}, which is not installed; install it with: pip install "ctkernels[{extra}]"'
        ) from error
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module}, which is installed but does not import ({error}); "
            f'reinstall it with: pip install --force-reinstall "ctkernels[{extra}]"'
        ) from error
