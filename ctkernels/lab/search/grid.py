"""Training-free steering (S-CT): find the beta whose frozen features a linear probe reads best."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import nn

from ...cli.option_types import COEFF, SIZE
from .._distributed import group
from .._progress import timed
from ..config import configured
from ..images.features import passes
from ..images.inputs import Images, device_of
from .probing import ProbingConfig, Score, chosen_by, probing
from .result import BetaSearch, Comparison


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ProbingConfig):
    """The configuration of :func:`search_beta`.

    Args:
        betas, activations, margin, feature_layer, l2, seed, batch_size, folds, probe, workers: as of
            :class:`ProbingConfig`.
        coeff: mixing coefficient c of the CT unit, in [0, 1]; or mean-free: beta^2 / (1 + beta^2), at which the unit of
            that beta adds nothing to the integral of the ReLU.
        memory_limit: bytes for the features kept at once. Fitting a probe needs about six times one beta's features
            more.
    """

    coeff: Annotated[float | str, COEFF] = 0.5
    memory_limit: Annotated[int, SIZE] = 2 << 30


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
    nearest 1 among equals, if it is better than the plain network by more than one standard error (``margin``); with few
    validation images, each beta is validated on several folds (``folds``). Only then are the test images read, once,
    for the chosen beta and the plain network.

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
        Steering did not help here: no beta did better than the plain network in validation ...

    Source: Curvature Tuning paper, section 4.1 and appendix B. Unlike its code, the choice never sees the test images.
    """
    started = time.perf_counter()
    config = configured(SearchConfig, config, options)
    seconds: dict[str, float] = {"probes": 0.0}  # which only the first process fits
    device = device_of(model, device)
    with probing(model, (train, val, test), config, device, group(device), progress) as search:
        steered, labels, processes = search.backbone.steered, search.labels, search.reader.group
        reference, candidates = steered.plain, steered.candidates(config.grid)
        samples = len(labels["train"]) + len(labels["val"])
        stretches = passes(samples, search.backbone.dim, len(candidates), config.memory_limit)
        scores: dict[float | None, Score] = {}
        for stretch in stretches:
            betas = [candidates[i] for i in stretch]
            with timed(seconds, "features"):
                features = search.features("search", betas, "train", "val")
            if processes.rank == 0:
                with timed(seconds, "probes"):
                    scores |= zip(betas, search.fit(features, config.memory_limit // (6 * features[0].nbytes)))
                    scores = _nearest_first(scores)
                    _forget(scores, reference)
            del features
        chosen = processes.share(chosen_by(scores, reference, config.margin) if scores else None)
        compared = [reference] if chosen == reference else [reference, chosen]
        with timed(seconds, "test"):
            features = search.features("test", compared, "test")
        outcome = None
        if processes.rank == 0:
            right = [search.right_on_test(scores[b], f) for b, f in zip(compared, features)]
            outcome = Comparison.of(right[0], right[-1])
            scores = {b: replace(score, probe=None) for b, score in scores.items()}
        scores, outcome = processes.share((scores, outcome))
        seconds["total"] = time.perf_counter() - started
        seconds = processes.share(seconds)
        processes.meet()
    assert outcome is not None
    ordered = [b for b in candidates if b is not None]
    record = search.record()
    record["sizes"] |= {"passes": len(stretches), "processes": processes.size, "threads": torch.get_num_threads()}
    return BetaSearch(
        betas=tuple(ordered),
        val_accuracy=tuple(scores[b].accuracy for b in ordered),
        plain_val_accuracy=scores[reference].accuracy,
        plain_is_beta_1=steered.plain_is_beta_1,
        chosen=chosen,
        test=outcome,
        converged=tuple(scores[b].converged for b in ordered),
        seconds=seconds,
        **record,
    )


def _nearest_first(scores: dict[float | None, Score]) -> dict[float | None, Score]:
    """The plain network first, then from the beta nearest 1 on: of equals the first is chosen."""
    return dict(sorted(scores.items(), key=lambda item: -2.0 if item[0] is None else -item[0]))


def _forget(scores: dict[float | None, Score], reference: float | None) -> None:
    """Keep the probes that the test may need: the best so far and the plain network's."""
    best = max(scores, key=lambda beta: scores[beta].accuracy)
    for beta in set(scores) - {best, reference}:
        scores[beta] = replace(scores[beta], probe=None)
