"""Training-free steering (S-CT): the choice of one beta for all activations by linear probes on frozen features."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from ..stats import best_beta, nearest_plain
from .probing import Probing, ProbingConfig, Score, probing
from .result import BetaSearch, Comparison


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ProbingConfig):
    """The configuration of :func:`search_beta`.

    Args:
        betas, activations, margin, feature_layer, l2, seed, batch_size, folds, probe, workers: as of
            :class:`ProbingConfig`.
        coeff: mixing coefficient c of the CT unit, in [0, 1]; or mean-free: beta^2 / (1 + beta^2), at which the integral
            of the unit equals that of the ReLU.
        memory_limit: bytes for the features kept at once. Fitting a probe needs about six times the features of one beta
            in addition.
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
    """Chooses the curvature of a frozen network for new data, without training.

    For every beta, all activations are replaced by CT units of that beta, features are computed in evaluation mode, and
    a linear probe is fitted on the training images. The beta with the best validation accuracy is chosen (the one
    nearest 1 among equals) if it beats the plain network by more than one standard error (``margin``); with few
    validation images, each beta is validated on several folds (``folds``). Only then are the test images read, once,
    for the chosen beta and the plain network.

    All betas share one pass over the training and validation images if their features fit into ``memory_limit``;
    otherwise there are several passes, with the same result. Under ``torchrun`` the processes share the batches, and all
    return the result. It is bitwise that of one process with the same number of threads; with another number of threads,
    torch may round some operations differently.

    If the plain network is not beta = 1 (SiLU and GELU networks), it is a candidate of its own.

    Args:
        model: a network with ReLU-like activations, unchanged afterwards.
        train: a data set of (image, label), or a pair of tensors: floating point images (n, ...) prepared for the network,
            and integer labels (n,). If a data set has ``labels`` or ``targets``, its images are not decoded for its labels.
        val: the same, or the fraction of ``train`` to use, drawn class by class.
        test: the same, or the fraction of ``train`` to use.
        config: betas, coefficient, probe and so on.
        device: where to run; the model is moved there. Default: the device of the model.
        progress: show a progress bar on standard error.
        options: fields of :class:`SearchConfig`, which replace those of ``config``: ``betas=[0.8, 0.9]``.

    Returns:
        :class:`BetaSearch`: accuracies, the choice, its test result with its uncertainty, and the arguments.

    Raises:
        ValueError: raised before any long work: an argument is out of range, there is only one class or too few images to
            split, the network does not take the images or has no activation to steer, or a tensor of images has NaN.
            Raised while images are read: one has NaN.
        ImportError: scikit-learn or tqdm is missing; the message names the extra.

    Examples:
        >>> result = search_beta(model, train, test=test, betas=[0.8, 0.9, 1.0], progress=False)
        >>> print(result.verdict())
        Steering did not help here: no beta did better than the plain network in validation ...

    Source: Curvature Tuning paper, section 4.1 and appendix B. Unlike in its code, the test images are not used for the choice.
    """
    started = time.perf_counter()
    config = configured(SearchConfig, config, options)
    seconds: dict[str, float] = {"probes": 0.0}  # spent on rank 0 only
    device = device_of(model, device)
    with probing(model, (train, val, test), config, device, group(device), progress) as search:
        steered, processes = search.backbone.steered, search.reader.group
        candidates = steered.candidates(config.grid)
        scores, passed = _validate(search, candidates, config, seconds)
        right = {beta: score.right for beta, score in scores.items()}
        chosen = processes.share(best_beta(right, steered.plain, config.margin) if right else None)
        compared = list(dict.fromkeys([steered.plain, chosen]))
        with timed(seconds, "test"):
            features = search.features("test", compared, "test")
        outcome = None
        if processes.rank == 0:
            answers = [search.right_on_test(scores[b], f) for b, f in zip(compared, features)]
            outcome = Comparison.of(answers[0], answers[-1])
            scores = {b: replace(score, probe=None) for b, score in scores.items()}
        scores, outcome = processes.share((scores, outcome))
        seconds["total"] = time.perf_counter() - started
        seconds = processes.share(seconds)
        processes.meet()
    assert outcome is not None
    ordered = [b for b in candidates if b is not None]
    record = search.record()
    record["sizes"] |= {"passes": passed, "processes": processes.size, "threads": torch.get_num_threads()}
    return BetaSearch(
        betas=tuple(ordered),
        val_accuracy=tuple(scores[b].accuracy for b in ordered),
        plain_val_accuracy=scores[steered.plain].accuracy,
        plain_is_beta_1=steered.plain_is_beta_1,
        chosen=chosen,
        test=outcome,
        converged=tuple(scores[b].converged for b in ordered),
        seconds=seconds,
        **record,
    )


def _validate(
    search: Probing, candidates: Sequence[float | None], config: SearchConfig, seconds: dict[str, float]
) -> tuple[dict[float | None, Score], int]:
    """The scores of all candidates, on rank 0, and the number of passes over the images.

    Probes are kept for the two that may be tested: the plain network and the best candidate.
    """
    scores: dict[float | None, Score] = {}
    samples = len(search.labels["train"]) + len(search.labels["val"])
    stretches = passes(samples, search.backbone.dim, len(candidates), config.memory_limit)
    for stretch in stretches:
        betas = [candidates[i] for i in stretch]
        with timed(seconds, "features"):
            features = search.features("search", betas, "train", "val")
        if search.reader.group.rank == 0:
            with timed(seconds, "probes"):
                scores |= zip(betas, search.fit(features, config.memory_limit // (6 * features[0].nbytes)))
            best = max(sorted(scores, key=nearest_plain), key=lambda beta: scores[beta].accuracy)
            for beta in set(scores) - {best, search.backbone.steered.plain}:
                scores[beta] = replace(scores[beta], probe=None)
        del features
    return scores, len(stretches)
