"""``python -m ctkernels search``: a beta per stage or per activation."""

from __future__ import annotations

import argparse

from ...cli import option_types as types
from ...cli.errors import OptionError
from .options import (
    add_image_data,
    add_image_options,
    add_network_options,
    add_running_options,
    command_parser,
    config_of,
    load_inputs,
    option,
    running,
    tell_result,
)

SUMMARY = """\
Find the curvature at which a frozen network fits new data best, with more than one knob (S-CT): one beta per stage, per
activation, or for any number of groups, by grid, coordinate or Bayesian search. The first evaluation is the plain network;
the best in validation is compared with it on the test images, once."""

EXAMPLES = """\
examples:
  python -m ctkernels search photos/ --model resnet18
  python -m ctkernels search photos/ --model resnet18 --strategy bayesian --groups site --evaluations 200

  # two workers on one study; a third call reports the result
  python -m ctkernels search photos/ --model resnet18 --strategy bayesian --storage trials.log &
  python -m ctkernels search photos/ --model resnet18 --strategy bayesian --storage trials.log

results:
  OUT/result.json   every evaluation, the chosen betas, how many evaluations it took, and the test with its uncertainty"""


GROUPS = ("shared", "stage", "site")
GROUPING: types.Kind[int | str] = types.Kind(
    "shared, stage, site, or a number of groups", lambda text: text if text in GROUPS else types.COUNT.read(text)
)


def parser() -> argparse.ArgumentParser:
    p = command_parser("search", SUMMARY, EXAMPLES)
    add_image_data(p)
    search = p.add_argument_group("search")
    option(search, "--strategy", ("grid", "coordinate", "bayesian"), "coordinate", "")
    option(search, "--groups", GROUPING, "stage", "what shares a beta: shared, stage, site, or a number")
    option(search, "--evaluations", types.COUNT, 60, "at most so many")
    search.add_argument(
        "--storage", type=types.STORAGE, help="file or database that workers of a Bayesian search share"
    )
    option(search, "--study", types.TEXT, "ctkernels", "its name in the storage")
    network = add_network_options(p, "0.7:1:0.05")
    option(network, "--coeff", types.SHARE, 0.5, "mixing coefficient c")
    add_image_options(p)
    add_running_options(p, "out/search", "of splits and samples", 32)
    return p


def run(arguments: argparse.Namespace) -> int:
    from ..search.strategies import StrategyConfig, search_betas

    if arguments.storage is not None and arguments.strategy != "bayesian":
        raise OptionError(f"--storage must go with --strategy bayesian, got --strategy {arguments.strategy}")
    config = config_of(StrategyConfig, arguments)
    inputs = load_inputs(arguments)
    result = search_betas(inputs.model, inputs.train, inputs.val, inputs.test, config, **running(arguments))
    tell_result(result, arguments, inputs)
    return 0
