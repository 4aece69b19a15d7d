"""What both plugins do around peft's tests: stand-ins for modules that are not installed, markers, and the hub's models."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


@contextmanager
def _stand_ins(**attributes: str) -> Iterator[None]:
    """Provide stand-ins for missing modules that peft's tests import, but the tests run here do not use."""
    import transformers.trainer  # noqa: F401  (looks for datasets itself, and must not find the stand-in)

    missing = [name for name in attributes if importlib.util.find_spec(name) is None]
    for name in missing:
        module = types.ModuleType(name)
        setattr(module, attributes[name], type(attributes[name], (), {}))
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def prepare(config: pytest.Config, package: str, names: tuple[str, ...], models: bool = True) -> dict[str, ModuleType]:
    """Import peft's test modules, and write the models that they load into the current folder.

    Args:
        config: pytest's.
        package: the package that the modules are in.
        names: the modules, without `test_`.
        models: whether any test loads a model.
    """
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: of peft's own")
    pytest.register_assert_rewrite(package)
    with _stand_ins(diffusers="StableDiffusionPipeline", datasets="load_dataset"):
        modules = {name: importlib.import_module(f"{package}.test_{name}") for name in names}
    if models and not hasattr(config, "workerinput"):
        import suite_models

        suite_models.make(Path.cwd())
    return modules
