"""``python -m ctkernels curvature``: what the knob does to a network, measured and drawn."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ._options import command_parser
from .steer import parse_betas

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


def parser() -> argparse.ArgumentParser:
    p = command_parser("curvature", SUMMARY, EXAMPLES)
    p.add_argument(
        "data", nargs="?", help="folder of images, .npz file, or fashion-mnist (default: the small networks)"
    )
    p.add_argument(
        "--betas", help="START:STOP:STEP or values with commas (default: 0.5,0.7,0.8,0.9,0.95,1; small: 1,0.9,0.5)"
    )
    p.add_argument("--coeff", type=float, default=0.5, help="mixing coefficient c (default: %(default)s)")
    p.add_argument("--out", default="out/curvature", help="folder for the results (default: %(default)s)")
    small = p.add_argument_group("small networks")
    small.add_argument("--seeds", default="0,1,2", help="of data and weights, with commas (default: %(default)s)")
    small.add_argument("--steps", default="2000,20000,4000", help="spirals, curve, circles (default: %(default)s)")
    network = p.add_argument_group("your network")
    network.add_argument("--model", help="torchvision name, timm:NAME, or factory module:function")
    network.add_argument(
        "--weights", default="default", help="default, none, packaged or a file (default: %(default)s)"
    )
    network.add_argument(
        "--quantity", choices=("loss", "logit", "margin"), default="margin", help="what is differentiated"
    )
    network.add_argument("--images", type=int, default=64, help="how many (default: %(default)s)")
    network.add_argument("--directions", type=int, default=4, help="of each kind, per image (default: %(default)s)")
    network.add_argument("--size", type=int, default=224, help="pixels that the network sees (default: %(default)s)")
    network.add_argument("--resize", type=int, help="shorter side before the centre crop (default: size * 256 / 224)")
    network.add_argument("--batch-size", type=int, default=16, help="images at once (default: %(default)s)")
    network.add_argument("--seed", type=int, default=0, help="of images and directions (default: %(default)s)")
    return p


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    if (arguments.data is None) != (arguments.model is None):
        raise ValueError("data and --model belong together, got one without the other")
    return _small(arguments, out) if arguments.data is None else _profile(arguments, out)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} must be whole numbers with commas, got {text!r}") from None


def _small(arguments: argparse.Namespace, out: Path) -> int:
    from .._files import replacing
    from ..analysis import run_toys
    from ..report import figures

    seeds, steps = _numbers("seeds", arguments.seeds), _numbers("steps", arguments.steps)
    if len(steps) != 3:
        raise ValueError(f"--steps must be three numbers, got {arguments.steps!r}")
    betas = parse_betas(arguments.betas or "1,0.9,0.5")
    result = run_toys(seeds, betas, coeff=arguments.coeff, steps=(steps[0], steps[1], steps[2]))
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

    from .. import recipes
    from ..analysis import curvature_profile
    from ..recipes.features import output_tensor

    if arguments.images < 2:
        raise ValueError(f"--images must be at least 2, got {arguments.images}")
    splits = recipes.load_data(arguments.data)
    torch.manual_seed(arguments.seed)
    model = recipes.load_model(arguments.model, arguments.weights)
    preprocess = recipes.normalised_like(recipes.Preprocess(size=arguments.size, resize=arguments.resize), splits.train)
    some = (splits.test or splits.train).sample(arguments.images, arguments.seed).prepared(preprocess)
    images = torch.stack([some[i][0] for i in range(len(some))])
    with torch.no_grad():
        classes = output_tensor(model(images[:1])).shape[-1]
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
        betas=parse_betas(arguments.betas or "0.5,0.7,0.8,0.9,0.95,1"),
        coeff=arguments.coeff,
        quantity=arguments.quantity,
        directions=arguments.directions,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    print(profile.table())
    profile.save(
        out / "result.json",
        command=arguments.command,
        options={k: v for k, v in vars(arguments).items() if k not in ("command", "traceback")},
        data={"source": splits.source, "preprocess": dataclasses.asdict(preprocess)},
    )
    print(f"saved {out / 'result.json'}")
    return 0
