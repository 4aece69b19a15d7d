"""``python -m ctkernels search``: a beta per stage or per activation."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ...cli.errors import OptionError
from ..search.strategies import StrategyConfig, search_betas
from . import options

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


def parser() -> argparse.ArgumentParser:
    p = options.command_parser("search", SUMMARY, EXAMPLES)
    options.add_image_data(p)
    fields = ("strategy", "groups", "evaluations", "storage", "study", "probe", "l2")
    options.add_fields(p.add_argument_group("search"), StrategyConfig, *fields)
    options.add_network_options(p, StrategyConfig)
    options.add_image_options(p)
    options.add_running_options(p, StrategyConfig, "seed", "batch_size", "workers", out="out/search")
    return p


def run(arguments: argparse.Namespace) -> int:
    if arguments.storage is not None and arguments.strategy != "bayesian":
        raise OptionError(f"--storage must go with --strategy bayesian, got --strategy {arguments.strategy}")
    config = options.config_of(StrategyConfig, arguments)
    inputs = options.load_inputs(arguments)
    config = replace(config, folds=inputs.folds(config.folds))
    inputs.tell(config.folds or 1, config.margin)
    result = search_betas(inputs.model, inputs.train, inputs.val, inputs.test, config, **options.running(arguments))
    options.tell_result(result, arguments, inputs)
    return 0
