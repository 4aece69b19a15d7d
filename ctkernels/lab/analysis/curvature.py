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
    """H v for every sample: the derivative along ``v`` of the gradient, exact (forward mode over reverse mode).

    Args:
        function: from inputs (n, ...) to one number per sample (n,); samples must not depend on each other.
        x: floating point (n, ...).
        v: of ``x``'s shape.

    Returns:
        Tensor of ``x``'s shape.

    Raises:
        ValueError: ``v`` is not of ``x``'s shape, or the function does not give one number per sample.

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
        (k, n): positive where the function curves up.

    Raises:
        ValueError: directions of another shape, or a zero one.

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
    """``count`` directions per sample, (count, *x.shape): evenly distributed on the sphere, of length 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, *x.shape, generator=generator, dtype=torch.float64)
    lengths = drawn.flatten(2).norm(dim=2).reshape(count, len(x), *[1] * (x.dim() - 1))
    return (drawn / lengths).to(x)


def data_directions(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` directions per sample, (count, *x.shape): towards other samples, drawn at random, of length 1.

    Raises:
        ValueError: a sample that no other sample differs from.
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
    """Local Lipschitz constants: the spectral norm of the Jacobian at every sample, by power iteration on J'J.

    The iteration approaches the norm from below; it stops early once no sample's estimate grows by more than 1e-4.

    Args:
        function: from inputs (n, ...) to outputs (n, d); samples must not depend on each other.
        x: floating point (n, ...).
        iterations: at most.
        seed: of the first vector.

    Returns:
        (n,).

    Examples:
        >>> lipschitz(lambda x: x @ torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(1, 2)).round()
        tensor([3.])

    Source: Curvature Tuning paper, appendix C.1, bounds what this measures.
    """
    COUNT.check("iterations", iterations)
    v = random_directions(x, 1, seed)[0]
    estimate = x.new_zeros(len(x))
    shape = (-1, *[1] * (x.dim() - 1))
    pull: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(function, x)[1]
    for _ in range(iterations):
        forward: Tensor = torch.func.jvp(function, (x,), (v,))[1]
        grown = forward.flatten(1).norm(dim=1)
        done = bool((grown <= estimate * (1 + 1e-4)).all())
        estimate = torch.maximum(estimate, grown)
        if done:
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
    """One number per sample of a classifier.

    Args:
        model: gives logits (n, classes).
        quantity: ``"loss"``: cross-entropy; ``"logit"``: of the label's class; ``"margin"``: that minus the mean of the
            other classes' logits.
        labels: int64 (n,).

    Raises:
        ValueError: an unknown quantity.
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
        betas: those measured; None is the network as it was.
        rows: for each beta, mean and quartiles over samples (and directions) of the absolute ``data`` and ``random``
            curvature, and of ``lipschitz``; and the ``accuracy``, without which a small slope says little: a network that
            always gives the same answer has none.
        quantity: what was differentiated.
        labelled: whether accuracy is against labels; else it is agreement with the plain network.
        samples, directions: how many.
        seconds: in all.
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
        """Means over images for every beta, as text."""
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
        plain, soft = values["rows"][0], values["rows"][1]
        measured = (
            f"second derivatives of the {values['quantity']}, {values['samples']} images, "
            f"{values['directions']} directions of each kind"
        )
        says = (
            f"From the plain network to β = {soft['beta']:g}, curvature towards other images went from "
            f"{plain['data']['mean']:.3g} to {soft['data']['mean']:.3g}, and the Lipschitz constant from "
            f"{plain['lipschitz']['mean']:.3g} to {soft['lipschitz']['mean']:.3g}; {_scored(values)} from "
            f"{percent(plain['accuracy'])} to {percent(soft['accuracy'])}."
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
        return Section("understand", f"Curvature and slope{subject(values)}", [says], facts, parts)


def _scored(values: Mapping[str, Any]) -> str:
    """The name of the accuracy in a saved profile; older ones do not say whether there were labels."""
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
        quantity: what is differentiated, see :func:`scalar_of`.
        directions: of each kind, per image.
        seed: of images and directions.
        batch_size: images at once.
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
    """Measure how curved and how steep a classifier is around data, as it is and at several betas.

    A network of piecewise-linear units has no curvature in its logits at beta = 1 but for pooling and normalisation; a
    ReLU's bends, being of measure zero, do not show. Loss adds the softmax's.

    Args:
        model: gives logits (n, classes); put into evaluation mode, and left as it was.
        x: floating point (n, ...), as the network takes it; at least two samples that differ.
        labels: int64 (n,). None: the plain network's own answers, for a network of other classes.
        config: betas, what is differentiated and so on.
        options: fields of :class:`ProfileConfig`, in place of ``config``'s.

    Raises:
        ValueError: an unknown quantity, fewer than two samples, another number of labels.

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
