"""A frozen network and its images in a search: features at several betas, and the scores of probes fitted to them."""

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
from ..stats import folds_for


@dataclass(frozen=True, kw_only=True)
class ProbingConfig(SteeringConfig):
    """Settings of every search.

    Args:
        betas, activations, margin, coeff, feature_layer, l2, seed, batch_size: as of :class:`SteeringConfig`.
        folds: number of folds of training and validation images; each setting is validated on all. Default: one if there
            are 200 or more validation images, or a validation split; else as many as validate on 200 images, at most
            five.
        probe: "logistic": logistic regression on standardised features; "adam": the paper's (see :func:`fit_probe`).
        workers: processes that decode images.
    """

    folds: Annotated[int | None, COUNT] = None
    probe: Annotated[str, choice(*PROBES)] = "logistic"
    workers: Annotated[int, WORKERS] = 0

    def _probe(self) -> str:
        return self.probe


@dataclass(frozen=True)
class Score:
    """The validation of a setting.

    Attributes:
        right: 1 or 0 for every validation image, fold by fold.
        converged: whether all probes reached their optimum.
        probe: of the first fold; None once it is not needed any more.
    """

    right: tuple[int, ...]
    converged: bool
    probe: Probe | None

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Probing:
    """A frozen network and its "train", "val" and "test" images, to which a search fits probes.

    Attributes:
        fractions: of the training images that were cut off for "val" and "test".
        cuts: indices of the training and validation parts of each fold, see :func:`validation_folds`.
        example: an image as a batch.
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
        """Features (betas, n, dim) of the named images, concatenated. ``text`` labels the progress bar."""
        return self.reader(text, [self.images[name] for name in names], betas)

    def fit(self, features: Tensor, at_once: int = 1) -> list[Score]:
        """Fits probes, one per fold, to the features (betas, n, dim) of the training and validation images.

        At most ``at_once`` betas are fitted concurrently, each on one thread, so that results do not depend on the number
        of threads.
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
        concurrent = 1 if config.probe == "adam" else max(1, min(threads, at_once))
        torch.set_num_threads(1)
        try:
            with (
                threadpoolctl.threadpool_limits(1),
                warnings.catch_warnings(),
                ThreadPoolExecutor(concurrent) as pool,
            ):
                warnings.simplefilter("ignore")  # about convergence, which the score records
                return list(pool.map(fit, features))
        finally:
            torch.set_num_threads(threads)

    def right_on_test(self, score: Score, features: Tensor) -> Tensor:
        """bool (n,): whether each test image is classified correctly."""
        assert score.probe is not None
        return score.probe.predict(features) == self.labels["test"]

    def record(self) -> dict[str, Any]:
        """The fields that the results of all searches share."""
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
    """Checks the images (train, val, test) and steers the network in evaluation mode; restores it afterwards."""
    images, fractions = split(*data, config.seed)
    labels = check_labels(images)
    count = config.folds or (folds_for(len(labels["val"]), len(labels["train"])) if "val" in fractions else 1)
    cuts = validation_folds(labels["train"], labels["val"], count, config.seed)
    with evaluation(model.to(device)), ExitStack() as stack:
        example = example_of(images["train"], device)
        backbone = stack.enter_context(
            steered_backbone(model, example, config.feature_layer, config.coeff, config.steering, fast=True)
        )
        reader = FeatureReader(backbone, group, device, config.batch_size, config.workers, progress)
        yield Probing(config, images, labels, fractions, cuts, example, reader)
