"""python -m ctkernels bench: the benchmark suite, from an installed package or a clone."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import ctkernels

PACKAGE = "ctkernels.benchmarks"  # in the wheel; a clone has the folder beside the package


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    return suite().parser("python -m ctkernels bench")


def run(arguments: argparse.Namespace) -> int:
    """Run the suite."""
    return suite().run(arguments)


def suite() -> ModuleType:
    """The suite's main module.

    Raises:
        ImportError: it is neither in the installed package nor beside it.
    """
    folder = Path(ctkernels.__file__).parent.parent / "benchmarks"
    if PACKAGE not in sys.modules and (folder / "__main__.py").exists():  # a clone's own, before an installed one
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError(f"{PACKAGE}: expected in the installed package or in {folder}; install ctkernels again")
    return importlib.import_module(f"{PACKAGE}.__main__")
