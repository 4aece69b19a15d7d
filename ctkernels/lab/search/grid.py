"""Training-free steering (S-CT): find the beta whose frozen features a linear probe reads best."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..._extras import require
from .._distributed import group
from ..config import SteeringConfig, check_least, configured
from ..images.backbone import FeatureReader, evaluation, steered_backbone
from ..images.features import passes
from ..images.inputs import Images, check_labels, device_of, example_of, split
from ..images.probe import Probe, fit_probe
from .result import BetaSearch, Comparison


@dataclass(frozen=True, kw_only=True)
class SearchConfig(SteeringConfig):
    """The configuration of :func:`search_beta`.

    Args:
        betas, coeff, activations, feature_layer, l2, seed, batch_size: as of :class:`SteeringConfig`. ``coeff`` may be
            ``"mean-free"``: beta^2 / (1 + beta^2), at which the unit of that beta adds nothing to the integral of the
            ReLU.
        probe: ``"logistic"`` or ``"adam"``, see :func:`fit_probe`.
        workers: processes that decode images.
        memory_limit: bytes for the features kept at once. Fitting a probe needs about six times one beta's features
            more.
    """

    probe: str = "logistic"
    workers: int = 0
    memory_limit: int = 2 << 30

    MAY_BE_MEAN_FREE: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, workers=0, memory_limit=1)

    def _probe(self) -> str:
        return self.probe


def search_beta(
    model: nn.Module,
    train: Images,
    val: Images | float = 0.2,
    test: Images | float = 0.2,
    config: SearchConfig | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
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
        config: betas, coefficient, probe and so on.
        device: where to run; the model is moved there. Default: where it is.
        progress: show a bar on standard error.
        options: fields of :class:`SearchConfig`, in place of ``config``'s: ``betas=[0.8, 0.9]``.

    Returns:
        :class:`BetaSearch`: accuracies, the choice, its test result with its uncertainty, and how to repeat it.

    Raises:
        ValueError: before any long work: an argument out of range, labels of one class, too few images to split, images
            the network does not take, NaN in a tensor of images, no activation to steer. While images are read: one
            with NaN.
        ImportError: scikit-learn or tqdm is missing; the message names the extra.

    Examples:
        >>> result = search_beta(model, train, test=test, betas=[0.8, 0.9, 1.0], progress=False)
        >>> print(result.verdict())
        Steering did not help here: no beta did better than the plain network in validation; ...

    Source: Curvature Tuning paper, section 4.1 and appendix B. Unlike its code, the choice never sees the test images.
    """
    started = time.perf_counter()
    config = configured(SearchConfig, config, options)
    images, fractions = split(train, val, test, config.seed)
    labels = check_labels(images)
    where = device_of(model, device)
    seconds = dict.fromkeys(("features", "probes", "test"), 0.0)
    with evaluation(model.to(where)), ExitStack() as stack:
        example = example_of(images["train"], where)
        backbone = stack.enter_context(
            steered_backbone(model, example, config.feature_layer, config.coeff, config.steering, fast=True)
        )
        processes = group(where)
        reader = FeatureReader(backbone, processes, where, config.batch_size, config.workers, progress)
        reference, candidates = backbone.steered.plain, backbone.steered.candidates(config.grid)
        samples = len(labels["train"]) + len(labels["val"])
        stretches = passes(samples, backbone.dim, len(candidates), config.memory_limit)
        scores: dict[float | None, _Score] = {}
        for stretch in stretches:
            betas = [candidates[i] for i in stretch]
            with _timed(seconds, "features"):
                features = reader("search", [images["train"], images["val"]], betas)
            if processes.rank == 0:
                with _timed(seconds, "probes"):
                    _score(scores, betas, features, labels, config)
                    _forget(scores, reference)
            del features
        chosen = processes.share(_best(scores))
        compared = [reference] if chosen == reference else [reference, chosen]
        with _timed(seconds, "test"):
            features = reader("test", [images["test"]], compared)
        outcome = None
        if processes.rank == 0:
            right = [scores[b].predict(f) == labels["test"] for b, f in zip(compared, features)]
            outcome = Comparison.of(right[0], right[-1])
            scores = {b: replace(score, probe=None) for b, score in scores.items()}
        scores, outcome = processes.share((scores, outcome))
        seconds["total"] = time.perf_counter() - started
        seconds = processes.share(seconds)
        processes.meet()
    assert outcome is not None
    ordered = [b for b in candidates if b is not None]
    return BetaSearch(
        betas=tuple(ordered),
        val_accuracy=tuple(scores[b].accuracy for b in ordered),
        plain_val_accuracy=scores[reference].accuracy,
        plain_is_beta_1=backbone.steered.plain_is_beta_1,
        chosen=chosen,
        test=outcome,
        sites=backbone.steered.sites,
        missed=backbone.steered.missed,
        arguments={**config.arguments(), "device": str(where), **fractions},
        sizes={
            **{name: len(values) for name, values in labels.items()},
            "classes": int(labels["train"].max()) + 1,
            "features": backbone.dim,
            "passes": len(stretches),
            "processes": processes.size,
            "threads": torch.get_num_threads(),
        },
        feature_layer=str(backbone.point),
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
    config: SearchConfig,
) -> None:
    """Fit probes for ``betas`` on their features (train, then val); add their validation accuracy to ``scores``."""
    threadpoolctl = require("threadpoolctl", "lab", "a linear probe")
    n = len(labels["train"])

    def fit(x: Tensor) -> _Score:
        probe = fit_probe(x[:n], labels["train"], config.probe, config.l2, config.seed)
        return _Score(float((probe.predict(x[n:]) == labels["val"]).double().mean()), probe.converged, probe)

    threads = torch.get_num_threads()
    # Probes run side by side, each on one thread: then their sums do not depend on how many threads there are.
    fitting = max(1, config.memory_limit // (6 * features[0].nbytes))
    side_by_side = 1 if config.probe == "adam" else min(threads, fitting)
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
