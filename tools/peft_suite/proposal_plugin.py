"""A pytest plugin that selects JoLA's rows of peft's tests, over a source tree with contrib/peft in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from suite_common import prepare

FAST = (
    "test_merge_layers[Vanilla MLP 4 JoLA",
    "test_save_pretrained[Vanilla MLP 1 JoLA",
    "test_only_params_are_updated[Vanilla MLP 4 JoLA",
    "test_mixed_adapter_batches_base_model[JoLA",
    "test_methods[JolaConfig",
    "test_jola.py",
)

# of an adapter that only the hub has
HUB = ("::test_from_pretrained[", "::test_from_pretrained_cache_dir[", "::test_save_pretrained_with_runtime_config[")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="a handful of tests on an MLP")


def pytest_configure(config: pytest.Config) -> None:
    names = sorted({Path(argument.split("::")[0]).stem.removeprefix("test_") for argument in config.args})
    prepare(config, "tests", tuple(names), models=not config.getoption("--fast"))


def _of_jola(item: pytest.Item) -> bool:
    import peft

    cls = peft.JolaConfig  # type: ignore[attr-defined]  # that of the proposal
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    return item.path.name == "test_jola.py" or any(value is cls or isinstance(value, cls) for value in values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if _of_jola(item)]
    for item in kept:
        if any(name in item.nodeid for name in HUB):
            item.add_marker(pytest.mark.skip(reason="asks the hub for an adapter"))
    if config.getoption("--fast"):
        kept = [item for item in kept if any(name in item.nodeid for name in FAST)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
