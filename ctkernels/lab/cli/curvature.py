"""``python -m ctkernels curvature``: what the knob does to a network, measured and drawn."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ...cli import option_types as types
from ...cli.errors import OptionError
from ..analysis.curvature import ProfileConfig, curvature_profile
from ..transfer.config import ImageOptions
from . import options

SUMMARY = """\
Measure what the knob does. With DATA and --model: curvature (exact Hessian-vector products) and local Lipschitz constants of
your network around your images, for several betas. Without: train small networks, turn their knob, and draw decision
boundaries and regression curves, as in the Curvature Tuning paper's figures 1 and 2, for every seed asked for."""

EXAMPLES = """\
examples:
  python -m ctkernels curvature                                # the small networks; about five minutes
  python -m ctkernels curvature --seeds 0 --steps 500,2000,1000    # a quick look
  python -m ctkernels curvature photos/ --model resnet18 --images 64

results:
  OUT/result.json, and OUT/*.png for the small networks"""


def _steps(text: str) -> tuple[int, int, int]:
    spirals, curve, circles = (types.COUNT.read(part) for part in text.split(","))
    return spirals, curve, circles


STEPS = types.Kind("three whole numbers of at least 1 with commas", _steps)


def parser() -> argparse.ArgumentParser:
    p = options.command_parser("curvature", SUMMARY, EXAMPLES)
    options.add_image_data(p, nargs="?", more=" (default: the small networks)")
    p.add_argument(
        "--betas",
        type=types.BETAS,
        help=f"{types.BETAS.expected} (default: {ProfileConfig.betas}; small: 1,0.9,0.5)",
    )
    options.add_fields(p, ProfileConfig, "coeff")
    options.option(p, "--out", types.OUT, "out/curvature", "folder for the results")
    small = p.add_argument_group("small networks")
    options.option(small, "--seeds", types.SEEDS, "0,1,2", "of data and weights, with commas")
    options.option(small, "--steps", STEPS, "2000,20000,4000", "spirals, curve, circles")
    network = p.add_argument_group("your network")
    options.add_model(network, required=False)
    options.add_device(network, "cpu")
    options.option(network, "--images", types.whole(2), 64, "how many")
    options.add_fields(network, ImageOptions, "size", "resize")
    options.add_fields(network, ProfileConfig, "quantity", "directions", "batch_size", "seed")
    return p


def run(arguments: argparse.Namespace) -> int:
    if (arguments.data is None) != (arguments.model is None):
        raise OptionError("data and --model belong together, got one without the other")
    return _small(arguments, arguments.out) if arguments.data is None else _profile(arguments, arguments.out)


def _small(arguments: argparse.Namespace, out: Path) -> int:
    from ..._extras import require
    from ..._files import replacing
    from ..analysis import run_toys
    from ..report import figures

    require("matplotlib", "lab", "the plots")
    betas = arguments.betas or [1.0, 0.9, 0.5]
    result = run_toys(arguments.seeds, betas, coeff=arguments.coeff, steps=arguments.steps)
    print(result.table())
    result.save(out / "result.json", command=arguments.command)
    print(f"saved {out / 'result.json'}")
    for run in result.runs:
        for key, draw in (("spirals", figures.boundaries), ("curve", figures.curves), ("circles", figures.boundaries)):
            path = out / f"{key}-seed{run['seed']}.png"
            with replacing(path) as temporary:
                draw(run[key]).savefig(temporary)
            print(f"saved {path}")
    return 0


def _profile(arguments: argparse.Namespace, out: Path) -> int:
    import torch

    from ... import lab
    from ..._factories import check_takes
    from ..images.data import find_images
    from ..images.features import output_tensor

    plain = options.plain_preprocess(arguments)
    device = arguments.device or "cpu"
    model = options.load_network(arguments).to(device)
    splits = find_images(arguments.data)()
    preprocess = lab.normalised_like(plain, splits.train)
    some = (splits.test or splits.train).sample(arguments.images, arguments.seed).prepared(preprocess)
    images = torch.stack([some[i][0] for i in range(len(some))]).to(device)
    classes = output_tensor(check_takes(model, images[:1], what="data: images")).shape[-1]
    # a network of other classes: the curvature of what it would say
    labels = some.labels.to(device) if classes == len(some.classes) else None
    config = options.config_of(ProfileConfig, arguments, betas=arguments.betas or ProfileConfig.betas)
    profile = curvature_profile(model, images, labels, config)
    print(profile.table())
    profile.save(
        out / "result.json",
        **options.record_of(arguments),
        data={"source": splits.source, "preprocess": dataclasses.asdict(preprocess)},
    )
    print(f"saved {out / 'result.json'}")
    return 0
