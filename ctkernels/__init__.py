"""Fused kernels and drop-in layers for Curvature Tuning and JoLA, two methods that adapt a frozen, pretrained network."""

import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Fusion",
    "Steering",
    "__version__",
    "explain",
    "functional",
    "fuse",
    "handle_of",
    "load_pretrained",
    "nn",
    "save_pretrained",
    "steer",
    "use_backend",
]


def _starts_command() -> bool:
    """Whether ``python -m ctkernels`` or the console command ``ctkernels`` imports this package.

    These import torch only when a command needs it. While Python locates the module of ``-m``, ``sys.argv[0]`` is "-m".
    """
    arguments = getattr(sys, "argv", [])
    started = sys.orig_argv[-len(arguments)] if 0 < len(arguments) <= len(sys.orig_argv) else ""
    return os.path.basename(started) == "ctkernels" and arguments[0] in ("-m", started)


if TYPE_CHECKING or not _starts_command():
    from . import functional, nn
    from ._public import (
        Fusion,
        Steering,
        explain,
        fuse,
        handle_of,
        load_pretrained,
        save_pretrained,
        steer,
        use_backend,
    )

if not TYPE_CHECKING:  # to a type checker, a name that is not in the list above is an error

    def __getattr__(name: str) -> Any:
        """Imports public names lazily in a process of the command line."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _public

        return getattr(_public, name)
