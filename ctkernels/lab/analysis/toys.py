"""Decision boundaries and regression curves of small networks at several betas."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import steer
from ..._extras import require
from ...cli.option_types import BETAS
from ...nn import TrainableCTU
from ..report import figures
from ..report.section import Picture, Section, Table, duration
from ..result import Result

SIDE = 64  # of the grids on which decision functions are drawn
RATES = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class Toys(Result):
    """The outcome of :func:`run_toys`, as plain values.

    Attributes:
        runs: one dictionary per seed with "spirals", "curve" and "circles": data points, the output of each network on a
            grid or a line (rounded to three digits), and its errors.
        setup: sizes, steps, betas, seeds.
        seconds: total duration.
    """

    SCHEMA: ClassVar[str] = "ctkernels.toys/1"

    runs: tuple[dict[str, Any], ...]
    setup: dict[str, Any]
    seconds: float

    def table(self) -> str:
        """The means over seeds, and the values of each seed, as text."""
        return "\n\n".join(f"{table.caption}\n{table.text()}" for table, _ in _measured(self.runs))

    def entries(self) -> dict[str, Any]:
        return {"setup": self.setup, "runs": list(self.runs), "seconds": {"total": self.seconds}}

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        runs = values["runs"]
        parts: list[Table | Picture] = []
        for run in runs:
            for key, draw, kind, text in PICTURES:
                alt = f"{text} Shown: {', '.join(run[key]['networks'])}."
                parts.append(Picture(figures.data_uri(draw(run[key]), kind), alt, f"{text} Seed {run['seed']}."))
        tables, lines = zip(*_measured(runs))
        parts += tables
        seeds = f"{', '.join(map(str, values['setup']['seeds']))}; all of them are shown"
        facts = [("Seeds", seeds), ("Time", duration(values["seconds"]["total"]))]
        return Section("understand", "Decision boundaries and regression curves of small networks", lines, facts, parts)


def _measured(runs: Sequence[Mapping[str, Any]]) -> list[tuple[Table, str]]:
    """A table, and a sentence about the best network, for every measure."""
    measured = []
    for title, key, measure, scale, better in MEASURES:
        scores = {
            name: [scale * run[key]["networks"][name][measure] for run in runs] for name in runs[0][key]["networks"]
        }
        means = {name: mean(each) for name, each in scores.items()}
        rows = [[name, f"{means[name]:.3g}", *(f"{v:.3g}" for v in each)] for name, each in scores.items()]
        header = ["network", "mean", *(f"seed {run['seed']}" for run in runs)]
        best = (max if better == "higher" else min)(means, key=lambda name: means[name])
        line = f"{title[0].upper()}{title[1:]}: best on average {best} ({means[best]:.3g})."
        measured.append((Table(f"{title}; {better} is better", header, rows), line))
    return measured


# title, key in a run, measure, factor, which values are better
MEASURES = (
    ("spirals, trained with flipped labels: accuracy on fresh points, %", "spirals", "accuracy", 100.0, "higher"),
    ("noisy sine: mean squared error against the sine", "curve", "error", 1.0, "lower"),
    ("two circles: training loss", "circles", "loss", 1.0, "lower"),
    ("two circles: deviation of the boundary from a circle, % of its radius", "circles", "roughness", 100.0, "lower"),
)

# key in a run, plotting function, format, caption
PICTURES = (
    ("spirals", figures.boundaries, "png", "Two spirals with flipped labels: one trained network at several β."),
    ("curve", figures.curves, "svg", "A noisy sine: one trained network at several β."),
    ("circles", figures.boundaries, "png", "Two circles: a trained network, then trained on with LoRA or T-CT."),
)


def run_toys(
    seeds: Sequence[int] = (0, 1, 2),
    betas: Sequence[float] = (1.0, 0.9, 0.5),
    *,
    coeff: float = 0.5,
    steps: tuple[int, int, int] = (2000, 20000, 4000),
) -> Toys:
    """Trains small ReLU networks and shows them at several betas: the paper's figures 1 and 2, for every seed.

    *Spirals*: two noisy arms with a sixth of the labels flipped, and a network of width 20. *Curve*: 30 noisy points of
    1.2 sin 2x, and width 64. Both networks are trained with ReLU, then steered without further training. *Circles*: 180
    points on circles of radius 1 and 3, and width 7; the trained network is fine-tuned with LoRA of rank 1, or with a
    learned (beta, c) per unit (T-CT), each with the best of three learning rates by training loss.

    Args:
        seeds: of data and weights; all are reported.
        betas: in [0, 1]; 1 is the trained network.
        coeff: of the CT unit.
        steps: of training, for the three in this order. Default: the paper's.

    Returns:
        :class:`Toys`.

    Raises:
        ValueError: there are no seeds or betas, a beta is out of range, or there is less than one step.
        ImportError: peft, for LoRA, is missing; the message names the extra.

    Examples:
        >>> print(run_toys(seeds=[0], steps=(20, 20, 20)).table())
        spirals, trained with flipped labels: accuracy on fresh points, %; higher is better
        network   mean  seed 0 ...

    Source: Curvature Tuning paper, figures 1 and 2. Its script shows figure 2 only for seeds on which T-CT beats LoRA.
    """
    if not seeds:
        raise ValueError("seeds must be one or more numbers, got none")
    BETAS.check("betas", betas)
    if len(steps) != 3 or min(steps) < 1:
        raise ValueError(f"steps must be three numbers of at least 1, got {steps}")
    require("peft", "adapters", "LoRA beside T-CT")
    started = time.perf_counter()
    runs = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            runs.append(
                {
                    "seed": seed,
                    "spirals": _spirals(seed, betas, coeff, steps[0]),
                    "curve": _curve(seed, betas, coeff, steps[1]),
                    "circles": _circles(seed, steps[2]),
                }
            )
    setup = {"seeds": list(seeds), "betas": list(betas), "coeff": coeff, "steps": list(steps), "rates": list(RATES)}
    return Toys(tuple(runs), setup, time.perf_counter() - started)


def mlp(inputs: int, width: int, depth: int = 2) -> nn.Sequential:
    """``depth`` hidden layers of ``width`` ReLUs, one output."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def spirals(n: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two interleaved arms: points (n, 2), labels 0 and 1 in turn."""
    labels = torch.arange(n) % 2
    angle = 3 * math.pi * torch.rand(n, generator=generator).sqrt()
    radius = angle + noise * torch.randn(n, generator=generator)
    turned = angle + math.pi * labels
    return torch.stack([radius * turned.cos(), radius * turned.sin()], 1), labels


def _train(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> float:
    """Trains the parameters that require gradients with AdamW. Returns the final loss."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        value = loss()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
    return float(loss().detach())


def _spirals(seed: int, betas: Sequence[float], coeff: float, steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x, true = spirals(1024, 0.7, generator)
    labels = torch.where(torch.rand(len(x), generator=generator) < 0.16, 1 - true, true)
    fresh, fresh_true = spirals(4096, 0.7, generator)
    model = mlp(2, 20)
    _train(model, lambda: _logistic(model(x), labels), steps, 1e-2)
    extent = float(x.abs().max()) * 1.05
    networks = {}
    with torch.no_grad(), steer(model, 1.0, coeff) as handle:
        for beta in betas:
            handle.beta = beta
            accuracy = float(((model(fresh)[:, 0] > 0) == fresh_true.bool()).double().mean())
            networks[f"beta {beta:g}"] = {"grid": _grid(model, extent), "accuracy": accuracy}
    return {"points": _points(x, labels), "extent": extent, "networks": networks}


def _curve(seed: int, betas: Sequence[float], coeff: float, steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x = (6 * torch.rand(30, 1, generator=generator) - 3).sort(0).values
    y = 1.2 * torch.sin(2 * x) + 0.3 * torch.randn(30, 1, generator=generator)
    model = mlp(1, 64)
    _train(model, lambda: functional.mse_loss(model(x), y), steps, 1e-3)
    line = torch.linspace(-3, 3, 241)[:, None]
    truth = 1.2 * torch.sin(2 * line)
    networks = {}
    with torch.no_grad(), steer(model, 1.0, coeff) as handle:
        for beta in betas:
            handle.beta = beta
            values = model(line)
            error = float(functional.mse_loss(values, truth))
            networks[f"beta {beta:g}"] = {"values": _rounded(values[:, 0]), "error": error}
    return {
        "points": [_rounded(x[:, 0]), _rounded(y[:, 0])],
        "line": _rounded(line[:, 0]),
        "truth": _rounded(truth[:, 0]),
        "networks": networks,
    }


def _circles(seed: int, steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    labels = torch.arange(180) % 2
    angle = 2 * math.pi * torch.rand(180, generator=generator)
    radius = 1.0 + 2.0 * labels
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    def fit(model: nn.Module, lr: float) -> float:
        return _train(model, lambda: _logistic(model(x), labels), steps, lr)

    base = mlp(2, 7, depth=1)
    fit(base, 1e-3)
    networks: dict[str, tuple[nn.Module, float, float]] = {
        "trained": (base, float(_logistic(base(x), labels).detach()), 1e-3)
    }
    for name, attach in (("LoRA, rank 1", _with_lora), ("T-CT", _with_curvature)):
        candidates = []
        for rate in RATES:
            torch.manual_seed(seed)
            network = attach(copy.deepcopy(base))
            candidates.append((network, fit(network, rate), rate))
        networks[name] = min(candidates, key=lambda candidate: candidate[1])
    results = {}
    for name, (network, loss, rate) in networks.items():
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        with torch.no_grad():
            results[name] = {
                "grid": _grid(network, 4.0),
                "loss": loss,
                "roughness": _roughness(network),
                "rate": rate,
                "parameters": trained,
            }
    return {"points": _points(x, labels), "extent": 4.0, "networks": results}


def _with_lora(model: nn.Module) -> nn.Module:
    peft = require("peft", "adapters", "LoRA beside T-CT")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return peft.inject_adapter_in_model(peft.LoraConfig(r=1, lora_alpha=1, target_modules=names), model)


def _with_curvature(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for name, module in list(model.named_children()):
        if isinstance(module, nn.ReLU):
            width = model.get_parameter(f"{int(name) - 1}.bias").numel()  # of the linear layer before it
            setattr(model, name, TrainableCTU(width, beta=0.8, coeff=0.5))  # the paper's initial values
    return model


def _roughness(model: nn.Module, angles: int = 360) -> float:
    """The relative deviation of the distance of the boundary from the centre; it counts as 4 beyond the grid."""
    angle = torch.arange(angles) * (2 * math.pi / angles)
    radii = torch.linspace(0, 4, 401)
    points = torch.stack([torch.outer(radii, angle.cos()), torch.outer(radii, angle.sin())], -1)
    outside = model(points.reshape(-1, 2)).reshape(401, angles) > 0
    first = torch.where(outside.any(0), radii[outside.int().argmax(0)], radii[-1]).double()
    return float(first.std() / first.mean().clamp_min(0.01))


def _logistic(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))


def _grid(model: nn.Module, extent: float) -> list[list[float]]:
    """The probability of class 1 on a grid of SIDE x SIDE points of [-extent, extent], rows from the bottom up."""
    line = torch.linspace(-extent, extent, SIDE)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    return [_rounded(row) for row in torch.sigmoid(model(points)[:, 0]).reshape(SIDE, SIDE)]


def _points(x: Tensor, labels: Tensor) -> list[list[float]]:
    return [_rounded(x[:, 0]), _rounded(x[:, 1]), labels.tolist()]


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 3) for v in values.tolist()]
