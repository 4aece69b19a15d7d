"""``python -m ctkernels search``: a beta per stage or per activation."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from .steer import parse_betas

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
  OUT/result.json   every evaluation, the chosen betas, how many evaluations it took, and the test with its uncertainty

exit codes: 0 done, 2 bad input, 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m ctkernels search",
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("data", help="folder of images, .npz file, or fashion-mnist")
    search = p.add_argument_group("search")
    search.add_argument(
        "--strategy", choices=("grid", "coordinate", "bayesian"), default="coordinate", help="(default: %(default)s)"
    )
    search.add_argument(
        "--groups", default="stage", help="what shares a beta: shared, stage, site, or a number (default: %(default)s)"
    )
    search.add_argument("--evaluations", type=int, default=60, help="at most so many (default: %(default)s)")
    search.add_argument(
        "--betas", default="0.7:1:0.05", help="START:STOP:STEP or values with commas (default: %(default)s)"
    )
    search.add_argument("--storage", help="file or database that workers of a Bayesian search share")
    search.add_argument("--study", default="ctkernels", help="its name in the storage (default: %(default)s)")
    network = p.add_argument_group("network")
    network.add_argument("--model", required=True, help="torchvision name, timm:NAME, or factory module:function")
    network.add_argument(
        "--weights", default="default", help="default, none, packaged or a file (default: %(default)s)"
    )
    network.add_argument("--activations", help="kinds to steer, comma-separated (default: all that can be)")
    network.add_argument(
        "--feature-layer", help="submodule whose output is probed (default: what enters the classifier)"
    )
    network.add_argument("--coeff", type=float, default=0.5, help="mixing coefficient c (default: %(default)s)")
    images = p.add_argument_group("images")
    images.add_argument("--size", type=int, default=224, help="pixels that the network sees (default: %(default)s)")
    images.add_argument("--resize", type=int, help="shorter side before the centre crop (default: size * 256 / 224)")
    images.add_argument("--val", type=float, default=0.2, help="fraction for validation if none is given")
    images.add_argument("--test", type=float, default=0.2, help="fraction for test if none is given")
    images.add_argument("--max-train", type=int, help="at most so many for training and validation (default: all)")
    images.add_argument("--max-test", type=int, help="at most so many for test (default: all)")
    running = p.add_argument_group("running")
    running.add_argument("--seed", type=int, default=0, help="of splits and samples (default: %(default)s)")
    running.add_argument("--batch-size", type=int, default=32, help="images per forward pass (default: %(default)s)")
    running.add_argument("--workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    running.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    running.add_argument("--out", default="out/search", help="folder for the results (default: %(default)s)")
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return p


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import recipes
    from ..recipes import _distributed
    from ..recipes.strategies import search_betas

    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    splits = recipes.load_data(arguments.data)
    train, val, test = splits.complete(
        val=arguments.val,
        test=arguments.test,
        seed=arguments.seed,
        max_train=arguments.max_train,
        max_test=arguments.max_test,
    )
    torch.manual_seed(arguments.seed)
    model = recipes.load_model(arguments.model, arguments.weights)
    preprocess = recipes.normalised_like(recipes.Preprocess(size=arguments.size, resize=arguments.resize), train)
    result = search_betas(
        model,
        *(part.prepared(preprocess) for part in (train, val, test)),
        strategy=arguments.strategy,
        groups=int(arguments.groups) if arguments.groups.isdecimal() else arguments.groups,
        betas=parse_betas(arguments.betas),
        evaluations=arguments.evaluations,
        coeff=arguments.coeff,
        activations=arguments.activations.split(",") if arguments.activations else None,
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
    result.save(
        out / "result.json",
        command=arguments.command,
        options={k: v for k, v in vars(arguments).items() if k not in ("command", "traceback")},
        data={
            "source": splits.source,
            "classes": list(train.classes),
            "preprocess": dataclasses.asdict(preprocess),
        },
    )
    print(f"\nsaved {out / 'result.json'}")
    return 0
