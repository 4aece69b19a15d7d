"""``python -m ctkernels curvature``: what the knob does to a network, measured and drawn."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ...cli import option_types as types
from ...cli.errors import OptionError
from .options import add_image_data, command_parser, load_network, network_name, option, plain_preprocess, record_of

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
    p = command_parser("curvature", SUMMARY, EXAMPLES)
    add_image_data(p, nargs="?", more=" (default: the small networks)")
    p.add_argument(
        "--betas",
        type=types.BETAS,
        help="START:STOP:STEP or values with commas (default: 0.5,0.7,0.8,0.9,0.95,1; small: 1,0.9,0.5)",
    )
    option(p, "--coeff", types.SHARE, 0.5, "mixing coefficient c")
    option(p, "--out", types.OUT, "out/curvature", "folder for the results")
    small = p.add_argument_group("small networks")
    option(small, "--seeds", types.SEEDS, "0,1,2", "of data and weights, with commas")
    option(small, "--steps", STEPS, "2000,20000,4000", "spirals, curve, circles")
    network = p.add_argument_group("your network")
    network.add_argument("--model", type=network_name, help="torchvision name, timm:NAME, or factory module:function")
    option(network, "--weights", types.WEIGHTS, "default", "default, none, packaged or a file")
    network.add_argument(
        "--quantity", choices=("loss", "logit", "margin"), default="margin", help="what is differentiated"
    )
    option(network, "--images", types.whole(2), 64, "how many")
    option(network, "--directions", types.COUNT, 4, "of each kind, per image")
    option(network, "--size", types.PIXELS, 224, "pixels that the network sees")
    network.add_argument(
        "--resize", type=types.PIXELS, help="shorter side before the centre crop (default: size * 256 / 224)"
    )
    option(network, "--batch-size", types.COUNT, 16, "images at once")
    option(network, "--seed", types.SEED, 0, "of images and directions")
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
    from ..analysis import curvature_profile
    from ..images.features import output_tensor

    plain = plain_preprocess(arguments)
    model = load_network(arguments)
    splits = lab.load_data(arguments.data)
    preprocess = lab.normalised_like(plain, splits.train)
    some = (splits.test or splits.train).sample(arguments.images, arguments.seed).prepared(preprocess)
    images = torch.stack([some[i][0] for i in range(len(some))])
    classes = output_tensor(check_takes(model, images[:1], what="data: images")).shape[-1]
    with torch.no_grad():
        # a network of other classes: the curvature of what it would say
        labels = (
            some.labels
            if classes == len(some.classes)
            else torch.cat([output_tensor(model(part)).argmax(1) for part in images.split(arguments.batch_size)])
        )
    profile = curvature_profile(
        model,
        images,
        labels,
        betas=arguments.betas or [0.5, 0.7, 0.8, 0.9, 0.95, 1.0],
        coeff=arguments.coeff,
        quantity=arguments.quantity,
        directions=arguments.directions,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    print(profile.table())
    profile.save(
        out / "result.json",
        **record_of(arguments),
        data={"source": splits.source, "preprocess": dataclasses.asdict(preprocess)},
    )
    print(f"saved {out / 'result.json'}")
    return 0
