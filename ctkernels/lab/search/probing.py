"""A frozen network and its images during a search: features at values of beta, probes fitted to them, their scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..._extras import require
from ...cli.option_types import COUNT, WORKERS, choice
from .._distributed import Group
from .._restoring import evaluation
from ..config import SteeringConfig
from ..images.backbone import Backbone, Beta, FeatureReader, steered_backbone
from ..images.inputs import Images, check_labels, example_of, split
from ..images.probe import PROBES, Probe, fit_probe
from ..labelled import validation_folds
from ..stats import folds_for, preferred


@dataclass(frozen=True, kw_only=True)
class ProbingConfig(SteeringConfig):
    """Settings of every search.

    Args:
        betas, activations, margin, coeff, feature_layer, l2, seed, batch_size: as of :class:`SteeringConfig`.
        folds: ways to cut training and validation images, of which each setting is validated on all. Default: one from
            200 validation images on and for a validation set of the data's own; else as many as validate on 200
            images, at most five.
        probe: "logistic": logistic regression on standardised features; "adam": the paper's own (see :func:`fit_probe`).
        workers: processes that decode images.
    """

    folds: Annotated[int | None, COUNT] = None
    probe: Annotated[str, choice(*PROBES)] = "logistic"
    workers: Annotated[int, WORKERS] = 0

    def _probe(self) -> str:
        return self.probe


@dataclass(frozen=True)
class Score:
    """How well probes read the classes of the validation images.

    Attributes:
        right: 1 or 0 for every validation image, fold by fold.
        converged: whether all probes reached their optimum.
        probe: the first fold's, while it is kept.
    """

    right: tuple[int, ...]
    converged: bool
    probe: Probe | None

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


def chosen_by(scores: dict[Any, Score], plain: Any, margin: float) -> Any:
    """The key of the best score, of equals the first; ``plain`` unless that is better beyond ``margin``."""
    best = max(scores, key=lambda key: scores[key].accuracy)
    return (plain, best)[preferred([scores[plain].right, scores[best].right], margin)]


@dataclass(frozen=True)
class Probing:
    """A frozen network, its images, and the probes that a search fits.

    Attributes:
        config: of the search.
        images, labels: of "train", "val" and "test".
        fractions: of the training images that were cut off for "val" and "test".
        cuts: indices of the training and of the validation part of each fold, see :func:`validation_folds`.
        example: an image that the network takes, as a batch.
        reader: extracts features.
    """

    config: ProbingConfig
    images: dict[str, Any]
    labels: dict[str, Tensor]
    fractions: dict[str, float]
    cuts: list[tuple[Tensor, Tensor]]
    example: Tensor
    reader: FeatureReader

    @property
    def backbone(self) -> Backbone:
        return self.reader.backbone

    def features(self, text: str, betas: Sequence[Beta], *names: str) -> Tensor:
        """Features (betas, n, dim) of the named images, one after the other; ``text`` labels the progress bar."""
        return self.reader(text, [self.images[name] for name in names], betas)

    def fit(self, features: Tensor, at_once: int = 1) -> list[Score]:
        """Fit a probe per fold to each of some betas' features, of the training and then the validation images.

        As many as ``at_once`` run side by side, each on one thread: so their sums do not depend on how many threads
        there are.
        """
        threadpoolctl = require("threadpoolctl", "lab", "a linear probe")
        config, labels = self.config, torch.cat([self.labels["train"], self.labels["val"]])

        def fit(x: Tensor) -> Score:
            probes, right = [], []
            for train, val in self.cuts:
                probes.append(fit_probe(x[train], labels[train], config.probe, config.l2, config.seed))
                right += (probes[-1].predict(x[val]) == labels[val]).int().tolist()
            return Score(tuple(right), all(probe.converged for probe in probes), probes[0])

        threads = torch.get_num_threads()
        side_by_side = 1 if config.probe == "adam" else max(1, min(threads, at_once))
        torch.set_num_threads(1)
        try:
            with (
                threadpoolctl.threadpool_limits(1),
                warnings.catch_warnings(),
                ThreadPoolExecutor(side_by_side) as pool,
            ):
                warnings.simplefilter("ignore")  # about convergence, which the result tells
                return list(pool.map(fit, features))
        finally:
            torch.set_num_threads(threads)

    def right_on_test(self, score: Score, features: Tensor) -> Tensor:
        """bool (n,): whether each test image is classified rightly."""
        assert score.probe is not None
        return score.probe.predict(features) == self.labels["test"]

    def record(self) -> dict[str, Any]:
        """Fields that the results of all searches have."""
        backbone, labels = self.backbone, self.labels
        return {
            "sites": backbone.steered.sites,
            "missed": backbone.steered.missed,
            "feature_layer": str(backbone.point),
            "arguments": {**self.config.arguments(), "device": str(self.reader.device), **self.fractions},
            "sizes": {
                **{name: len(values) for name, values in labels.items()},
                "folds": len(self.cuts),
                "validated": sum(len(val) for _, val in self.cuts),
                "classes": int(labels["train"].max()) + 1,
                "features": backbone.dim,
            },
        }


@contextmanager
def probing(
    model: nn.Module,
    data: tuple[Images, Images | float, Images | float],
    config: ProbingConfig,
    device: torch.device,
    group: Group,
    progress: bool = False,
) -> Iterator[Probing]:
    """Check the images, (train, val, test), and steer the network in evaluation mode; afterwards it is as it was."""
    images, fractions = split(*data, config.seed)
    labels = check_labels(images)
    own = "val" not in fractions
    count = config.folds or (1 if own else folds_for(len(labels["val"]), len(labels["train"])))
    cuts = validation_folds(labels["train"], labels["val"], count, config.seed)
    with evaluation(model.to(device)), ExitStack() as stack:
        example = example_of(images["train"], device)
        backbone = stack.enter_context(
            steered_backbone(model, example, config.feature_layer, config.coeff, config.steering, fast=True)
        )
        reader = FeatureReader(backbone, group, device, config.batch_size, config.workers, progress)
        yield Probing(config, images, labels, fractions, cuts, example, reader)
