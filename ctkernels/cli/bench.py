"""python -m ctkernels bench: the benchmark suite, from an installed package or a clone."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ctkernels

PACKAGE = "ctkernels.benchmarks"  # where the wheel has the folder that a clone has beside the package


class _PassOn(argparse.ArgumentParser):
    """Leaves everything it does not know, --help included, to the suite."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        known.rest = rest
        return known


def parser() -> argparse.ArgumentParser:
    """The command's options: none of its own."""
    return _PassOn(prog="python -m ctkernels bench", add_help=False)


def run(arguments: argparse.Namespace) -> int:
    """Run the suite with the remaining options."""
    return suite().main(arguments.rest)


def suite() -> ModuleType:
    """The suite's main module.

    Raises:
        ImportError: neither in the installed package nor beside it.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        folder = Path(ctkernels.__file__).parent.parent / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not (folder / "__main__.py").exists():
            raise ImportError(f"{PACKAGE}: expected in the installed package or in {folder}; install ctkernels again")
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{PACKAGE}.__main__")
