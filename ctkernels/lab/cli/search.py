"""``python -m ctkernels search``: a beta per stage or per activation."""

from __future__ import annotations

import argparse

from ...cli import option_types as types
from ...cli.errors import OptionError
from .options import (
    add_image_options,
    add_network_options,
    command_parser,
    image_data,
    load_images,
    load_network,
    plain_preprocess,
    preprocess_for,
    save_result,
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
    p.add_argument("data", type=image_data, help="folder of images, .npz file, or fashion-mnist")
    search = p.add_argument_group("search")
    search.add_argument(
        "--strategy", choices=("grid", "coordinate", "bayesian"), default="coordinate", help="(default: %(default)s)"
    )
    search.add_argument(
        "--groups",
        type=GROUPING,
        default="stage",
        help="what shares a beta: shared, stage, site, or a number (default: %(default)s)",
    )
    search.add_argument("--evaluations", type=types.COUNT, default=60, help="at most so many (default: %(default)s)")
    search.add_argument(
        "--storage", type=types.STORAGE, help="file or database that workers of a Bayesian search share"
    )
    search.add_argument(
        "--study", type=types.TEXT, default="ctkernels", help="its name in the storage (default: %(default)s)"
    )
    network = add_network_options(p, "0.7:1:0.05")
    network.add_argument("--coeff", type=types.SHARE, default=0.5, help="mixing coefficient c (default: %(default)s)")
    add_image_options(p)
    running = p.add_argument_group("running")
    running.add_argument("--seed", type=types.SEED, default=0, help="of splits and samples (default: %(default)s)")
    running.add_argument(
        "--batch-size", type=types.COUNT, default=32, help="images per forward pass (default: %(default)s)"
    )
    running.add_argument(
        "--workers", type=types.WORKERS, default=0, help="processes that decode images (default: %(default)s)"
    )
    running.add_argument("--device", type=types.device, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    running.add_argument(
        "--out", type=types.OUT, default="out/search", help="folder for the results (default: %(default)s)"
    )
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return p


def run(arguments: argparse.Namespace) -> int:
    from ..._extras import require
    from .. import _distributed
    from ..search.strategies import search_betas

    if arguments.strategy == "bayesian":
        require("optuna", "lab", "Bayesian search")
    elif arguments.storage is not None:
        raise OptionError(f"--storage must go with --strategy bayesian, got --strategy {arguments.strategy}")
    plain_preprocess(arguments)
    model = load_network(arguments)
    splits, train, val, test = load_images(arguments)
    preprocess = preprocess_for(arguments, train)
    result = search_betas(
        model,
        *(part.prepared(preprocess) for part in (train, val, test)),
        strategy=arguments.strategy,
        groups=arguments.groups,
        betas=arguments.betas,
        evaluations=arguments.evaluations,
        coeff=arguments.coeff,
        activations=arguments.activations,
        feature_layer=arguments.feature_layer,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=arguments.device or _distributed.launched_device(),
        storage=arguments.storage,
        study=arguments.study,
        progress=not arguments.no_progress,
    )
    print(f"{splits.source}: {len(train)} train, {len(val)} validation, {len(test)} test images")
    print(f"\n{result.table()}\n\n{result.verdict()}")
    save_result(result, arguments.out, arguments, splits, train, preprocess)
    return 0
