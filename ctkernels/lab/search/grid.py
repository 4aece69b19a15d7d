"""Training-free steering (S-CT): find the beta whose frozen features a linear probe reads best."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._extras import require
from .._distributed import group
from ..betas import Images, check_betas, check_labels, check_numbers, device_of, example_of, split
from ..images.features import passes
from ..images.probe import Probe, check_probe, fit_probe
from .reading import Reader, evaluation, subject_of
from .result import BetaSearch, Comparison


def search_beta(
    model: nn.Module,
    train: Images,
    val: Images | float = 0.2,
    test: Images | float = 0.2,
    *,
    betas: Iterable[float] | None = None,
    coeff: float | str = 0.5,
    activations: Iterable[str] | None = None,
    feature_layer: str | None = None,
    probe: str = "logistic",
    l2: float = 0.01,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str | None = None,
    memory_limit: int = 2 << 30,
    progress: bool = True,
) -> BetaSearch:
    """Choose the curvature of a frozen network for new data, without training it.

    For every beta, all activations are replaced by CT units of that beta, features are computed in evaluation mode, and
    a linear probe is fitted on the training images. The beta with the best validation accuracy is chosen, the one
    nearest 1 among equals. Only then are the test images read, once, for the chosen beta and the plain network.

    All betas share one pass over the training and validation images, as long as their features fit ``memory_limit``;
    otherwise there are as many passes as it takes, with the same result. Under ``torchrun`` the batches are dealt to
    the processes and the result is every process's. It is the same, bit for bit, as one process's with the same number
    of threads; with another number of threads, torch may round some operations differently.

    Where the plain network is not beta = 1 (SiLU and GELU networks), it takes part as a candidate of its own.

    Args:
        model: any network with ReLU-like activations. It is left as it was.
        train: a data set of (image, label), or a pair of tensors: floating point images (n, ...) ready for the network,
            and integer labels (n,). Data sets with ``labels`` or ``targets`` are not decoded for their labels.
        val: the same, or the fraction of ``train`` to use, drawn class by class.
        test: the same, or the fraction of ``train`` to use.
        betas: in [0, 1]. Default 0.70 to 1.00 in steps of 0.01. beta = 1 always takes part.
        coeff: the mixing coefficient c of the CT unit, in [0, 1]; or ``"mean-free"``: beta^2 / (1 + beta^2), at which
            the unit of that beta adds nothing to the integral of the ReLU.
        activations: which kinds to steer; default :func:`ctkernels.steer`'s.
        feature_layer: name of a submodule whose output is used. Default: what enters the classifier, the last linear
            layer.
        probe: ``"logistic"`` or ``"adam"``, see :func:`fit_probe`.
        l2: penalty of the logistic probe.
        seed: of the split and of the probe.
        batch_size: images per forward pass.
        workers: processes that decode images.
        device: where to run; the model is moved there. Default: where it is.
        memory_limit: bytes for the features kept at once. Fitting a probe needs about six times one beta's features
            more.
        progress: show a bar on standard error.

    Returns:
        :class:`BetaSearch`: accuracies, the choice, its test result with its uncertainty, and how to repeat it.

    Raises:
        ValueError: before any long work: an argument out of range, labels of one class, too few images to split, images
            the network does not take, NaN in a tensor of images, no activation to steer. While images are read: one
            with NaN.
        ImportError: scikit-learn or tqdm is missing; the message names the extra.

    Example:
        >>> result = search_beta(model, train, test=test, betas=[0.8, 0.9, 1.0])  # doctest: +SKIP
        >>> print(result.verdict())  # doctest: +SKIP

    Source: Curvature Tuning paper, section 4.1 and appendix B. Unlike its code, the choice never sees the test images.
    """
    started = time.perf_counter()
    grid = check_betas(betas)
    check_numbers(coeff=coeff, batch_size=batch_size, workers=workers, memory_limit=memory_limit)
    check_probe(probe, l2)
    steering: dict[str, Any] = {"coeff": coeff}
    if activations is not None:
        steering["activations"] = tuple(activations)
    images, fractions = split(train, val, test, seed)
    labels = check_labels(images)
    place = device_of(model, device)
    seconds = dict.fromkeys(("features", "probes", "test"), 0.0)
    with evaluation(model.to(place)), ExitStack() as stack:
        example = example_of(images["train"], place)
        subject = stack.enter_context(subject_of(model, example, feature_layer, steering, fast=True))
        us = group(place)
        reader = Reader(subject, us, place, batch_size, workers, progress)
        reference = 1.0 if subject.plain_is_beta_1 else None
        candidates: list[float | None] = [*sorted(grid | {1.0})] if subject.plain_is_beta_1 else [None, *sorted(grid)]
        stretches = passes(len(labels["train"]) + len(labels["val"]), subject.dim, len(candidates), memory_limit)
        scores: dict[float | None, _Score] = {}
        for stretch in stretches:
            some = [candidates[i] for i in stretch]
            with _timed(seconds, "features"):
                found = reader("search", [images["train"], images["val"]], some)
            if us.rank == 0:
                with _timed(seconds, "probes"):
                    _score(scores, some, found, labels, memory_limit, (probe, l2, seed))
                    _forget(scores, reference)
            del found
        chosen = us.share(_best(scores))
        compared = [reference] if chosen == reference else [reference, chosen]
        with _timed(seconds, "test"):
            found = reader("test", [images["test"]], compared)
        outcome = None
        if us.rank == 0:
            right = [scores[b].predict(f) == labels["test"] for b, f in zip(compared, found)]
            outcome = Comparison.of(right[0], right[-1])
            scores = {b: replace(score, probe=None) for b, score in scores.items()}
        processes = us.size
        scores, outcome = us.share((scores, outcome))
        seconds["total"] = time.perf_counter() - started
        seconds = us.share(seconds)
        us.meet()
    assert outcome is not None
    ordered = [b for b in candidates if b is not None]
    return BetaSearch(
        betas=tuple(ordered),
        val_accuracy=tuple(scores[b].accuracy for b in ordered),
        plain_val_accuracy=scores[reference].accuracy,
        plain_is_beta_1=subject.plain_is_beta_1,
        chosen=chosen,
        test=outcome,
        sites=subject.sites,
        missed=subject.missed,
        arguments={
            "betas": sorted(grid),
            "coeff": coeff,
            "activations": None if activations is None else list(steering["activations"]),
            "feature_layer": feature_layer,
            "probe": probe,
            "l2": l2,
            "seed": seed,
            "batch_size": batch_size,
            "workers": workers,
            "device": str(place),
            "memory_limit": memory_limit,
            **fractions,
        },
        sizes={
            **{name: len(data) for name, data in labels.items()},
            "classes": int(labels["train"].max()) + 1,
            "features": subject.dim,
            "passes": len(stretches),
            "processes": processes,
            "threads": torch.get_num_threads(),
        },
        feature_layer=str(subject.tap),
        converged=tuple(scores[b].converged for b in ordered),
        seconds=seconds,
    )


# --- the choice -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Score:
    accuracy: float
    converged: bool
    probe: Probe | None

    def predict(self, features: Tensor) -> Tensor:
        assert self.probe is not None
        return self.probe.predict(features)


def _score(
    scores: dict[float | None, _Score],
    betas: Sequence[float | None],
    features: Tensor,
    labels: dict[str, Tensor],
    memory_limit: int,
    recipe: tuple[str, float, int],
) -> None:
    """Fit probes for ``betas`` on their features (train, then val); add their validation accuracy to ``scores``."""
    threadpoolctl = require("threadpoolctl", "lab", "a linear probe")
    n = len(labels["train"])

    def fit(x: Tensor) -> _Score:
        probe = fit_probe(x[:n], labels["train"], *recipe)
        return _Score(float((probe.predict(x[n:]) == labels["val"]).double().mean()), probe.converged, probe)

    threads = torch.get_num_threads()
    # Probes run side by side, each on one thread: then their sums do not depend on how many threads there are.
    side_by_side = 1 if recipe[0] == "adam" else min(threads, max(1, memory_limit // (6 * features[0].nbytes)))
    torch.set_num_threads(1)
    try:
        with threadpoolctl.threadpool_limits(1), warnings.catch_warnings(), ThreadPoolExecutor(side_by_side) as pool:
            warnings.simplefilter("ignore")  # about convergence, which the result tells
            scores.update(zip(betas, pool.map(fit, features)))
    finally:
        torch.set_num_threads(threads)


def _best(scores: dict[float | None, _Score]) -> float | None:
    """The best validation accuracy; of equals the plain network, then the beta nearest 1."""
    return max(scores, key=lambda beta: (scores[beta].accuracy, 2.0 if beta is None else beta), default=None)


def _forget(scores: dict[float | None, _Score], reference: float | None) -> None:
    """Keep the probes that the test may need: the best so far and the plain network's."""
    for beta in set(scores) - {_best(scores), reference}:
        scores[beta] = replace(scores[beta], probe=None)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start
