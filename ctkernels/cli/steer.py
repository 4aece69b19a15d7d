"""``python -m ctkernels steer``: search beta for a network and a folder of images."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

SUMMARY = """\
Find the curvature at which a pretrained network fits new data best, without training it (S-CT).

Every ReLU-like activation becomes a curvature-tuning unit with one knob, beta: 1 is the network as it is, lower is
smoother. For each beta a linear probe is fitted on frozen features of the training images; the beta with the best
validation accuracy is compared with the plain network on the test images, once."""

EXAMPLES = """\
examples:
  # a folder with one subfolder of images per class; a fifth each is held out for validation and for test
  python -m ctkernels steer photos/ --model resnet18

  # folders train/, val/ and test/ or an .npz with x_train, y_train, x_test, y_test are used as they are
  python -m ctkernels steer data.npz --model timm:resnet50d --betas 0.8:1:0.02

  # your own network and weights; checkpoints are read without unpickling
  python -m ctkernels steer photos/ --model my_project.networks:make --weights best.safetensors

  # without a network connection: packaged MobileNetV2 weights and Fashion-MNIST, a small sample
  python -m ctkernels steer fashion-mnist --model mobilenet_v2 --weights packaged \\
      --size 64 --resize 64 --max-train 900 --max-test 600 --betas 0.7,0.8,0.85,0.9,0.95,1

  # four processes share the work, with the result of one
  torchrun --nproc-per-node 4 -m ctkernels steer photos/ --model resnet50

results:
  OUT/result.json            accuracies, choice, test with its uncertainty, and everything needed to repeat the run
  OUT/accuracy_vs_beta.png   the picture

exit codes: 0 done, 2 bad input, 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m ctkernels steer",
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("data", help="folder of images, .npz file, or fashion-mnist")
    network = p.add_argument_group("network")
    network.add_argument("--model", required=True, help="torchvision name, timm:NAME, or factory module:function")
    network.add_argument(
        "--weights",
        default="default",
        help="default: the library's pretrained ones, may download; none: random; packaged: from an installed package; "
        "else a .safetensors or torch.save file (default: %(default)s)",
    )
    network.add_argument("--activations", help="kinds to steer, comma-separated (default: all that can be)")
    network.add_argument(
        "--feature-layer", help="submodule whose output is probed (default: what enters the classifier)"
    )
    network.add_argument(
        "--coeff",
        type=lambda text: text if text == "mean-free" else float(text),
        default=0.5,
        help="mixing coefficient c of the unit, or mean-free: beta^2 / (1 + beta^2) (default: %(default)s)",
    )
    network.add_argument(
        "--betas",
        default="0.7:1:0.01",
        help="START:STOP:STEP with both ends, or values with commas (default: %(default)s); 1 always takes part",
    )
    images = p.add_argument_group("images")
    images.add_argument("--size", type=int, default=224, help="pixels that the network sees (default: %(default)s)")
    images.add_argument("--resize", type=int, help="shorter side before the centre crop (default: size * 256 / 224)")
    images.add_argument(
        "--normalise",
        choices=("target", "imagenet"),
        default="target",
        help="mean and deviation of up to 1000 training images, or of ImageNet (default: %(default)s)",
    )
    images.add_argument(
        "--val", type=float, default=0.2, help="fraction for validation if none is given (default: %(default)s)"
    )
    images.add_argument(
        "--test", type=float, default=0.2, help="fraction for test if none is given (default: %(default)s)"
    )
    images.add_argument("--max-train", type=int, help="at most so many for training and validation (default: all)")
    images.add_argument("--max-test", type=int, help="at most so many for test (default: all)")
    probe = p.add_argument_group("probe")
    probe.add_argument(
        "--probe",
        choices=("logistic", "adam"),
        default="logistic",
        help="logistic regression on standardised features, or the paper's own with Adam (default: %(default)s)",
    )
    probe.add_argument("--l2", type=float, default=0.01, help="penalty of the logistic probe (default: %(default)s)")
    running = p.add_argument_group("running")
    running.add_argument("--seed", type=int, default=0, help="of splits, samples and probe (default: %(default)s)")
    running.add_argument("--batch-size", type=int, default=32, help="images per forward pass (default: %(default)s)")
    running.add_argument("--workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    running.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    running.add_argument("--memory-limit", default="2GiB", help="for features kept at once (default: %(default)s)")
    running.add_argument("--out", default="out/steer", help="folder for the results (default: %(default)s)")
    running.add_argument("--no-plot", action="store_true", help="no picture")
    running.add_argument("--no-progress", action="store_true", help="no progress bar")
    return p


def parse_betas(text: str) -> list[float]:
    """``"0.7:1:0.1"`` gives 0.7, 0.8, 0.9, 1; ``"0.8,1"`` gives these."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if not (step > 0 and stop >= start):
                raise ValueError
            return [round(start + i * step, 10) for i in range(int((stop - start) / step + 1e-9) + 1)]
        return [float(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        raise ValueError(f"--betas must be START:STOP:STEP or values with commas, got {text!r}") from None


def parse_bytes(text: str) -> int:
    """``"2GiB"``, ``"500 MB"``, ``"1e9"``: a number of bytes."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*([a-z]*)\s*", text.lower())
    if match and match[2] in units and float(match[1]) > 0:
        return int(float(match[1]) * units[match[2]])
    raise ValueError(f"--memory-limit must be a size such as 500MB or 2GiB, got {text!r}")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import recipes
    from .._extras import require
    from ..recipes import _distributed
    from ..recipes.picture import plot

    betas = parse_betas(arguments.betas)
    memory_limit = parse_bytes(arguments.memory_limit)
    preprocess = recipes.Preprocess(size=arguments.size, resize=arguments.resize)
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    if not arguments.no_plot:
        require("matplotlib.figure", "recipes", "the picture")
    splits = recipes.load_data(arguments.data)
    train, val, test = splits.complete(
        val=arguments.val,
        test=arguments.test,
        seed=arguments.seed,
        max_train=arguments.max_train,
        max_test=arguments.max_test,
    )
    torch.manual_seed(arguments.seed)  # for --weights none, and factories that draw weights
    model = recipes.load_model(arguments.model, arguments.weights)
    if arguments.normalise == "target":
        preprocess = recipes.normalised_like(preprocess, train)
    out.mkdir(parents=True, exist_ok=True)
    result = recipes.search_beta(
        model,
        *(part.prepared(preprocess) for part in (train, val, test)),
        betas=betas,
        coeff=arguments.coeff,
        activations=arguments.activations.split(",") if arguments.activations else None,
        feature_layer=arguments.feature_layer,
        probe=arguments.probe,
        l2=arguments.l2,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=arguments.device or _distributed.launched_device(),
        memory_limit=memory_limit,
        progress=not arguments.no_progress,
    )
    if _distributed.launched_rank() == 0:
        print(f"{splits.source}: {len(train)} train, {len(val)} validation, {len(test)} test images")
        print(f"{arguments.model}: {len(result.sites)} activations steered; features: {result.feature_layer}")
        print(f"\n{result.table()}\n")
        print(result.verdict())
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
        if not arguments.no_plot:
            plot(result, out / "accuracy_vs_beta.png", title=f"{arguments.model} on {Path(arguments.data).name}")
            print(f"saved {out / 'accuracy_vs_beta.png'}")
    return 0
