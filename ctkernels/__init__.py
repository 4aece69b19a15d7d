"""Fused kernels and drop-in layers for two ways of adapting a frozen, pretrained network: Curvature Tuning and JoLA."""

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
    """Whether ``python -m ctkernels`` or the console command ``ctkernels`` is what imports this package.

    They need torch only when they know what to do. While Python looks for the module of ``-m``, ``sys.argv[0]`` is "-m".
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
        """The public names in a process of the command line, which imports them late."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _public

        return getattr(_public, name)
