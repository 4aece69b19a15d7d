"""Curvature and slope of a network in its input: exact Hessian-vector products, and Jacobian norms by power iteration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import steer
from ...cli.option_types import BETAS, COUNT, SEED, SHARE, choice
from .._restoring import evaluation, frozen
from ..config import BetasConfig, configured
from ..images.features import output_tensor
from ..report import figures
from ..report.section import Picture, Section, Table, beta_name, duration, subject
from ..result import Result, percent

QUANTITIES = ("loss", "logit", "margin")
Scalar = Callable[[Tensor], Tensor]


def hessian_vector(function: Scalar, x: Tensor, v: Tensor) -> Tensor:
    """Hessian-vector products H v of every sample, exact (forward mode over reverse mode).

    Args:
        function: from inputs (n, ...) to one number per sample (n,), each of which depends only on its sample.
        x: floating point (n, ...).
        v: of ``x``'s shape.

    Returns:
        Tensor of ``x``'s shape.

    Raises:
        ValueError: ``v`` has another shape than ``x``, or the function does not return one number per sample.

    Examples:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> hessian_vector(lambda x: (x**3).sum(1), x, torch.ones(1, 2))
        tensor([[ 6., 12.]])
    """
    if v.shape != x.shape:
        raise ValueError(f"v must have x's shape {tuple(x.shape)}, got {tuple(v.shape)}")

    def total(x: Tensor) -> Tensor:
        values = function(x)
        if values.shape != x.shape[:1]:
            raise ValueError(f"function must give one number per sample, ({len(x)},), got {tuple(values.shape)}")
        return values.sum()

    return torch.func.jvp(torch.func.grad(total), (x,), (v,))[1]


def curvature(function: Scalar, x: Tensor, directions: Tensor) -> Tensor:
    """Second derivatives of a function along straight lines through ``x``: v' H v / v' v.

    Args:
        function: as in :func:`hessian_vector`.
        x: floating point (n, ...).
        directions: (k, n, ...), none of them zero.

    Returns:
        (k, n): positive where the function is convex along the direction.

    Raises:
        ValueError: directions have another shape, or one is zero.

    Examples:
        >>> x = torch.zeros(1, 2)
        >>> curvature(lambda x: x[:, 0] ** 2, x, torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[2.],
                [0.]])
    """
    if directions.shape[1:] != x.shape:
        raise ValueError(f"directions must have the shape (k, *{tuple(x.shape)}), got {tuple(directions.shape)}")
    lengths = directions.flatten(2).norm(dim=2)
    if not bool((lengths > 0).all()):
        raise ValueError("directions must not be zero, got one that is")
    unit = directions / lengths.reshape(*lengths.shape, *[1] * (x.dim() - 1))
    return torch.stack([(v * hessian_vector(function, x, v)).flatten(1).sum(1) for v in unit])


def random_directions(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` unit directions per sample, (count, *x.shape), uniformly distributed on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, *x.shape, generator=generator, dtype=torch.float64)
    lengths = normal.flatten(2).norm(dim=2).reshape(count, len(x), *[1] * (x.dim() - 1))
    return (normal / lengths).to(x)


def data_directions(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` unit directions per sample, (count, *x.shape), towards random other samples.

    Raises:
        ValueError: all samples are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = x.flatten(1).double()
    chosen = torch.empty(count, *flat.shape, dtype=torch.float64, device=x.device)
    for i, sample in enumerate(flat):
        towards = flat - sample
        lengths = towards.norm(dim=1)
        others = (lengths > 0).nonzero()[:, 0].cpu()
        if not len(others):
            raise ValueError(f"x must have samples that differ, sample {i} equals all others")
        drawn = others[torch.randint(len(others), (count,), generator=generator)]
        chosen[:, i] = towards[drawn] / lengths[drawn, None]
    return chosen.reshape(count, *x.shape).to(x.dtype)


def lipschitz(function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 50, seed: int = 0) -> Tensor:
    """Local Lipschitz constants: the spectral norms of the Jacobian at every sample, by power iteration on J'J.

    Estimates grow towards the norm, and the iteration ends early once none grows by more than a factor of 1e-4.

    Args:
        function: from inputs (n, ...) to outputs (n, d), each of which depends only on its sample.
        x: floating point (n, ...).
        iterations: maximal number.
        seed: of the initial vector.

    Returns:
        (n,).

    Examples:
        >>> lipschitz(lambda x: x @ torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(1, 2)).round()
        tensor([3.])

    Source: Curvature Tuning paper, appendix C.1, bounds this constant.
    """
    COUNT.check("iterations", iterations)
    v = random_directions(x, 1, seed)[0]
    estimate = x.new_zeros(len(x))
    shape = (-1, *[1] * (x.dim() - 1))
    pull: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(function, x)[1]
    for _ in range(iterations):
        forward: Tensor = torch.func.jvp(function, (x,), (v,))[1]
        norms = forward.flatten(1).norm(dim=1)
        converged = bool((norms <= estimate * (1 + 1e-4)).all())
        estimate = torch.maximum(estimate, norms)
        if converged:
            break
        (back,) = pull(forward)
        lengths = back.flatten(1).norm(dim=1)
        v = torch.where(
            lengths.reshape(shape) > 0,
            back / lengths.clamp_min(1e-300 if x.dtype == torch.float64 else 1e-38).reshape(shape),
            v,
        )
    return estimate


def scalar_of(model: Callable[[Tensor], Tensor], quantity: str, labels: Tensor) -> Scalar:
    """A function from inputs to one number per sample, for a classifier that returns logits (n, classes).

    ``quantity``: ``"loss"``: cross-entropy; ``"logit"``: of the label's class; ``"margin"``: that logit minus the mean of the
    others.
    """
    choice(*QUANTITIES).check("quantity", quantity)

    def value(x: Tensor) -> Tensor:
        logits = model(x)
        if quantity == "loss":
            return functional.cross_entropy(logits, labels, reduction="none")
        logit = logits.gather(1, labels[:, None])[:, 0]
        return logit if quantity == "logit" else logit - (logits.sum(1) - logit) / (logits.shape[1] - 1)

    return value


@dataclass(frozen=True)
class CurvatureProfile(Result):
    """Curvature and slope of a network at several betas.

    Attributes:
        betas: measured betas; None is the plain network.
        rows: for each beta, mean and quartiles over samples (and directions) of the absolute ``data`` and ``random``
            curvature, and of ``lipschitz``; and the ``accuracy``, as a network with constant output has neither curvature
            nor slope.
        quantity: the differentiated quantity.
        labelled: whether accuracy refers to labels; else it is the agreement with the plain network.
        samples, directions: their numbers.
        seconds: total duration.
    """

    SCHEMA: ClassVar[str] = "ctkernels.curvature/1"

    betas: tuple[float | None, ...]
    rows: tuple[dict[str, Any], ...]
    quantity: str
    samples: int
    directions: int
    seconds: float
    labelled: bool = True

    def table(self) -> str:
        """The means over images for every beta, as text."""
        return _means(self.entries()).text()

    def entries(self) -> dict[str, Any]:
        return {
            "quantity": self.quantity,
            "samples": self.samples,
            "directions": self.directions,
            "labelled": self.labelled,
            "rows": [{"beta": beta, **row} for beta, row in zip(self.betas, self.rows)],
            "seconds": {"total": self.seconds},
        }

    @classmethod
    def section(cls, values: Mapping[str, Any]) -> Section:
        plain, steered = values["rows"][0], values["rows"][1]
        measured = (
            f"second derivatives of the {values['quantity']}, {values['samples']} images, "
            f"{values['directions']} directions of each kind"
        )
        verdict = (
            f"From the plain network to β = {steered['beta']:g}, curvature towards other images went from "
            f"{plain['data']['mean']:.3g} to {steered['data']['mean']:.3g}, and the Lipschitz constant from "
            f"{plain['lipschitz']['mean']:.3g} to {steered['lipschitz']['mean']:.3g}; {_scored(values)} from "
            f"{percent(plain['accuracy'])} to {percent(steered['accuracy'])}."
        )
        parts: list[Table | Picture] = [
            Picture(
                figures.data_uri(figures.curvature_lines(values["rows"], values["samples"], _scored(values))),
                f"Curvature, Lipschitz constant and {_scored(values)} against beta; the table below has the numbers.",
                f"Means over images; bands go from the first to the third quartile, bars of {_scored(values)} are one "
                "standard error.",
            ),
            _means(values),
        ]
        facts = [("Measured", measured), ("Time", duration(values["seconds"]["total"]))]
        return Section("understand", f"Curvature and slope{subject(values)}", [verdict], facts, parts)


def _scored(values: Mapping[str, Any]) -> str:
    """The name of the accuracy in a saved profile; older profiles always have labels."""
    return "accuracy" if values.get("labelled", True) else "agreement with the plain network"


def _means(values: Mapping[str, Any]) -> Table:
    kinds = ("data", "random", "lipschitz")
    header = ["β", "towards other images", "random directions", "Lipschitz", _scored(values)]
    cells = [
        [beta_name(row["beta"]), *(f"{row[kind]['mean']:.4g}" for kind in kinds), percent(row["accuracy"])]
        for row in values["rows"]
    ]
    return Table("Means over images", header, cells)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(BetasConfig):
    """The configuration of :func:`curvature_profile`.

    Args:
        activations: as of :class:`BetasConfig`.
        betas: START:STOP:STEP with both ends, or values, in [0, 1].
        coeff: mixing coefficient c of the CT unit, in [0, 1].
        quantity: the differentiated quantity, see :func:`scalar_of`.
        directions: of each kind, per image.
        seed: of images and directions.
        batch_size: images per pass.
    """

    betas: Annotated[Iterable[float] | str, BETAS] = "0.5,0.7,0.8,0.9,0.95,1"
    coeff: Annotated[float, SHARE] = 0.5
    quantity: Annotated[str, choice(*QUANTITIES)] = "margin"
    directions: Annotated[int, COUNT] = 4
    seed: Annotated[int, SEED] = 0
    batch_size: Annotated[int, COUNT] = 16


def curvature_profile(
    model: nn.Module, x: Tensor, labels: Tensor | None, config: ProfileConfig | None = None, **options: Any
) -> CurvatureProfile:
    """Measures curvature and slope of a classifier around data, for the plain network and at several betas.

    At beta = 1, the logits of a network of piecewise-linear units have no curvature apart from pooling and normalisation:
    the kinks of ReLU have measure zero. The loss adds the curvature of the softmax.

    Args:
        model: returns logits (n, classes). It is measured in evaluation mode, and unchanged afterwards.
        x: inputs of the network, floating point (n, ...), at least two different samples.
        labels: int64 (n,). None: the answers of the plain network, if it has other classes.
        config: betas, quantity and so on.
        options: fields of :class:`ProfileConfig`, which replace those of ``config``.

    Raises:
        ValueError: the quantity is unknown, there are fewer than two samples, or not as many labels.

    Examples:
        >>> profile = curvature_profile(model, images, labels, betas=[0.9, 1.0])
        >>> print(profile.table())
        β      towards other images ...

    Source: Curvature Tuning paper, theorem 3.1, which compares these Hessians.
    """
    started = time.perf_counter()
    config = configured(ProfileConfig, config, options)
    labelled = labels is not None
    if labels is None:
        with evaluation(model), torch.no_grad():
            labels = torch.cat([output_tensor(model(part)).argmax(1) for part in x.split(config.batch_size)])
    if len(x) < 2 or labels.shape != (len(x),):
        raise ValueError(f"x must be at least two samples with a label each, got {len(x)} and {tuple(labels.shape)}")
    directions = {
        "data": data_directions(x, config.directions, config.seed),
        "random": random_directions(x, config.directions, config.seed),
    }

    def measure() -> dict[str, Any]:
        measured: dict[str, list[Tensor]] = {"data": [], "random": [], "lipschitz": [], "right": []}
        for part in (slice(i, i + config.batch_size) for i in range(0, len(x), config.batch_size)):
            function = scalar_of(model, config.quantity, labels[part])
            for kind, vectors in directions.items():
                measured[kind].append(curvature(function, x[part], vectors[:, part]).abs().flatten())
            measured["lipschitz"].append(lipschitz(model, x[part], seed=config.seed))
            with torch.no_grad():
                measured["right"].append((model(x[part]).argmax(1) == labels[part]).double())
        joined = {kind: torch.cat(parts) for kind, parts in measured.items()}
        accuracy = float(joined.pop("right").mean())
        return {**{kind: _summary(values) for kind, values in joined.items()}, "accuracy": accuracy}

    with evaluation(model), frozen(model):
        rows: list[dict[str, Any]] = [measure()]
        with steer(model, 1.0, config.coeff, **config.steering) as handle:
            for beta in config.grid:
                handle.beta = beta
                rows.append(measure())
    seconds = time.perf_counter() - started
    betas, measured = (None, *config.grid), (config.quantity, len(x), config.directions)
    return CurvatureProfile(betas, tuple(rows), *measured, seconds, labelled)


def _summary(values: Tensor) -> dict[str, float]:
    values = values.detach().double()
    low, middle, high = torch.quantile(
        values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=values.device)
    )
    return {"mean": float(values.mean()), "low": float(low), "median": float(middle), "high": float(high)}
