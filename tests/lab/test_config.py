"""Configurations: one place for the range, the default and the description of what functions and commands take."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from ctkernels import lab
from ctkernels.lab.cli.options import config_of
from ctkernels.lab.config import Config, fields_of
from ctkernels.lab.jola import Answering, MethodsConfig
from ctkernels.lab.jola.config import TrainingConfig as TextTrainingConfig
from ctkernels.lab.robustness.attacks import AttackConfig
from ctkernels.lab.transfer import ImageOptions, TrainingConfig

CONFIGS: list[type[Config]] = [
    lab.SearchConfig,
    lab.StrategyConfig,
    lab.RobustnessConfig,
    lab.ProfileConfig,
    lab.TransferConfig,
    lab.TuneConfig,
    ImageOptions,
    TrainingConfig,
    MethodsConfig,
    TextTrainingConfig,
    Answering,
    AttackConfig,
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__qualname__)
def test_every_option_is_described_and_has_a_default_in_its_range(config):
    fields = fields_of(config)
    assert fields
    for name, (kind, optional, default, text) in fields.items():
        assert text or name == "weight_decay", f"{name} is not in the docstring"
        assert ":class:" not in text
        assert "`" not in text
        if default is None:
            assert optional, name
        elif isinstance(default, str):
            kind(default)
        else:
            kind.check(name, default)


@pytest.mark.parametrize(
    ("command", "name", "needed"),
    [
        ("steer", "SearchConfig", ["digits", "--model", "resnet18"]),
        ("search", "StrategyConfig", ["digits", "--model", "resnet18"]),
        ("tune", "TuneConfig", ["digits", "--model", "resnet18"]),
        ("compare", "TransferConfig", ["digits", "--model", "resnet18"]),
    ],
)
def test_a_command_without_options_is_the_function_without_options(command, name, needed):
    for module in ("sklearn", "torchvision", "threadpoolctl"):
        pytest.importorskip(module, reason="the commands need ctkernels[lab]")
    parser = importlib.import_module(f"ctkernels.lab.cli.{command}").parser()
    kind: Any = getattr(lab, name)
    assert config_of(kind, parser.parse_args(needed)) == kind()


def test_values_may_be_texts_as_on_the_command_line():
    config = lab.TransferConfig(betas="0.8:1:0.1", activations="relu,relu6", memory_limit="2MiB")
    assert config.grid == (0.8, 0.9, 1.0)
    assert config.activations == ("relu", "relu6")
    assert config.memory_limit == 2 << 20
    with pytest.raises(ValueError, match=r"memory_limit must be a size such as 500MB or 2GiB, got 'large'"):
        lab.TransferConfig(memory_limit="large")
    with pytest.raises(ValueError, match=r"activations must be some of relu, .* got .*'swish'"):
        lab.TransferConfig(activations=["swish"])


def test_options_that_a_configuration_does_not_have_are_named():
    with pytest.raises(TypeError, match=r"options must be fields of TransferConfig, .*, got \['beta'\]"):
        lab.compare_transfer({}, {}, beta=0.9)
