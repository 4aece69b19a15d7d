"""A pytest plugin that replaces the methods in peft's tests with this package's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from suite_common import prepare
from suite_exceptions import EXCEPTIONS, FAST

from ctkernels.adapters import CurvatureConfig, JointConfig, JolaConfig

OURS = (JolaConfig, CurvatureConfig, JointConfig)


class JolaOnMlp(JolaConfig):
    """JoLA for tests that pass only module names of an MLP, which has no heads."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"head_dim": 2, "init_std": 0.5} | values)


class CurvatureOnMlp(CurvatureConfig):
    """Curvature Tuning for the same tests: the activation after the named linear layer."""

    def __init__(self, **values: Any) -> None:
        names = [re.sub(r"lin\d$", "relu", name) for name in values.pop("target_modules")]
        super().__init__(**LAYER | values | {"target_modules": names})


# peft's lists require an identity initialisation
JOLA = {"target_modules": ["lin1"], "head_dim": 5, "init_std": 0.0}
# gates without clipping, so that every log alpha gets a gradient in every step, as the tests expect
SOFT = {"temperature": 5.0, "stretch": (-1e-4, 1.0001)}
LAYER = {"granularity": "layer"}
# The tests' inputs reach 90: with a smaller beta, more of them give beta and coeff a gradient.
SOFT_LAYER = LAYER | {"init_beta": 0.5}
JOINT = {"jola": JOLA | SOFT, "curvature": LAYER}
BESIDE = {"jola": JOLA | SOFT | {"target_modules": ["lin0"]}, "curvature": LAYER, "modules_to_save": ["lin1"]}

CUSTOM: list[tuple[str, str, type, dict[str, Any]]] = [
    ("MLP JoLA", "MLP", JolaConfig, JOLA),
    ("MLP JoLA, soft gates", "MLP", JolaConfig, JOLA | SOFT),
    ("MLP JoLA, pattern", "MLP", JolaConfig, JOLA | {"target_modules": ".*lin1", "head_dim": 20}),
    ("MLP JoLA, modules_to_save", "MLP", JolaConfig, JOLA | {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("EmbConv1D JoLA", "EmbConv1D", JolaConfig, JOLA | {"target_modules": ["conv1d"]}),
    ("MLP CT", "MLP", CurvatureConfig, {"input_shape": [10]}),
    ("MLP CT, layer", "MLP", CurvatureConfig, LAYER),
    ("MLP CT, modules_to_save", "MLP", CurvatureConfig, {"input_shape": [10], "modules_to_save": ["lin1"]}),
    ("MLP_LayerNorm CT", "MLP_LayerNorm", CurvatureConfig, {"input_shape": [10], "init_beta": 0.8}),
    ("EmbConv1D CT", "EmbConv1D", CurvatureConfig, LAYER),
    ("Conv1d CT", "Conv1d", CurvatureConfig, SOFT_LAYER),
    ("Conv2d CT", "Conv2d", CurvatureConfig, {"layout": {"relu": [1, 10]}, "init_beta": 0.5}),
    ("Conv2d CT, layer", "Conv2d", CurvatureConfig, SOFT_LAYER),
    ("Conv3d CT", "Conv3d", CurvatureConfig, LAYER),
    ("MLP joint CT", "MLP", JointConfig, JOINT),
    ("MLP joint CT, modules_to_save", "MLP", JointConfig, BESIDE),
]
SEVERAL = [
    ("JoLA, same modules", "jola", JolaConfig, JOLA | {"init_std": 0.5}, JOLA | {"init_std": 0.5}),
    (
        "JoLA, other modules",
        "jola",
        JolaConfig,
        JOLA | {"init_std": 0.5, "target_modules": ["lin0"]},
        JOLA | {"init_std": 0.5},
    ),
    ("CT", "curvature", CurvatureConfig, LAYER | {"init_beta": 0.3}, LAYER | {"init_beta": 0.6}),
]
MIXED = [
    (
        "JoLA, mixed",
        JolaConfig(target_modules=["lin0"], head_dim=5, init_std=0.5),
        JolaConfig(target_modules=["lin0"], head_dim=5, init_std=0.5),
    ),
    (
        "CT, mixed",
        CurvatureConfig(granularity="layer", init_beta=0.3),
        CurvatureConfig(granularity="layer", init_beta=0.6),
    ),
    (
        "joint CT, mixed",
        JointConfig(
            jola={"target_modules": ["lin0"], "head_dim": 5, "init_std": 0.5}, curvature=LAYER | {"init_beta": 0.3}
        ),
        JointConfig(
            jola={"target_modules": ["lin0"], "head_dim": 5, "init_std": 0.5}, curvature=LAYER | {"init_beta": 0.6}
        ),
    ),
]
TASKS = {
    "decoder_models": "CAUSAL_LM",
    "feature_extraction_models": "FEATURE_EXTRACTION",
    "encoder_decoder_models": "SEQ_2_SEQ_LM",
}


def _away_from_identity(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    if issubclass(config_class, JolaConfig):
        return values | {"init_std": 0.5}
    if issubclass(config_class, JointConfig):
        own = {"jola": {"init_std": 0.5}, "curvature": {"init_beta": 0.3, "init_coeff": 0.4}}
        return values | {method: values.get(method, {}) | part for method, part in own.items()}
    return values | {"init_beta": 0.3, "init_coeff": 0.4}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="a handful of tests on an MLP")


def pytest_configure(config: pytest.Config) -> None:
    modules = prepare(config, "peft_tests", ("custom_models", *TASKS), models=not config.getoption("--fast"))
    # the lists are changed in place before collection: `parametrize` holds the lists themselves
    custom: Any = modules["custom_models"]
    custom.TEST_CASES[:] = CUSTOM
    custom.ALL_PEFT_CONFIG_CLASSES[:] = (JolaOnMlp, CurvatureOnMlp)
    custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = SEVERAL
    custom.MIXED_ADAPTER_TEST_CASES[:] = MIXED
    custom.set_init_weights_false = _away_from_identity
    for name, task in TASKS.items():
        module: Any = modules[name]
        module.ALL_CONFIGS[:] = [
            (JolaConfig, {"task_type": task, "target_modules": None} | SOFT),
            (CurvatureConfig, {"task_type": task, "target_modules": None, "activations": "all"}),
        ]
        module.set_init_weights_false = _away_from_identity


def _is_ours(item: pytest.Item) -> bool:
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    return any(issubclass(value, OURS) if isinstance(value, type) else isinstance(value, OURS) for value in values)


def _name(item: pytest.Item) -> str:
    return item.nodeid.split("::", 1)[-1]


def _check_exceptions(items: list[pytest.Item]) -> None:
    """Raise an error for an exception that matches no test, for example after peft renamed one."""
    names = [_name(item) for item in items if _is_ours(item)]
    unused = [pattern for pattern in EXCEPTIONS if not any(re.search(pattern, name) for name in names)]
    if unused:
        raise pytest.UsageError("suite_exceptions.py: no test is called like these\n" + "\n".join(unused))


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Keep the tests with one of our configurations, and mark the intended failures."""
    collected = {item.nodeid.split("::")[0].rpartition("/test_")[2] for item in items}
    if collected >= {f"{name}.py" for name in ("custom_models", *TASKS)} and "::" not in "".join(config.args):
        _check_exceptions(items)  # before -k deselects tests
    yield
    kept = [item for item in items if _is_ours(item)]
    if config.getoption("--fast"):
        kept = [item for item in kept if re.search(FAST, _name(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for item in items:
        for pattern, reason in EXCEPTIONS.items():
            if re.search(pattern, _name(item)):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
                break


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
