"""Methods that leave the network unchanged: the linear probe, and S-CT, which chooses among many betas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .._distributed import Group
from .._restoring import evaluation
from ..images.backbone import FeatureReader, coeff_at, plain_backbone, steered_backbone
from ..images.features import passes
from ..labelled import batches
from ..stats import best_beta, scores_of, standard_error
from .config import TransferConfig
from .folds import FoldLog, on_folds
from .heads import fit_head, head_input
from .inputs import PreparedSplit
from .state import batch_norms, ends_with_single


@dataclass(frozen=True)
class FrozenNetwork:
    """A frozen network whose features are extracted, plain or at several betas.

    Args:
        model: on its device; unchanged afterwards.
        coeff: of the CT unit, a number or "mean-free"; None: the plain network only.
        split: the examples. If ``config.bn`` is "train", batch normalisation is recalibrated on its training examples.
    """

    model: nn.Module
    coeff: float | str | None
    config: TransferConfig
    group: Group
    split: PreparedSplit

    def fit(self, classes: int, lr: float, seed: int, cuts: Sequence[tuple[Tensor, Tensor]]) -> FoldLog:
        """Trains a head for every candidate on every fold of ``cuts``, and keeps that of the best in validation.

        Among equals the candidate nearest the plain network is best; the plain network itself is kept unless the best beats
        it beyond ``config.margin``.
        """
        split = self.split
        y = torch.cat([split.labels["train"], split.labels["val"]])
        logs: dict[float | None, FoldLog] = {}

        def fit(x: Tensor, cut: tuple[Tensor, Tensor], others: Sequence[FoldLog]) -> FoldLog:
            (train, val), training = cut, self.config.training
            data = x[train], y[train], x[val], y[val], classes
            return fit_head(*data, lr=lr, training=training, seed=seed, others=others)

        with self._reader() as read:
            candidates = [None] if self.coeff is None else read.backbone.steered.candidates(self.config.grid)
            at_once = 1 if self.config.bn == "train" else len(candidates)
            plain = read.backbone.steered.plain if self.coeff is not None else None
            for stretch in passes(len(y), read.backbone.dim, len(candidates), self.config.memory_limit):
                for start in range(stretch.start, stretch.stop, at_once):
                    betas = candidates[start : min(start + at_once, stretch.stop)]
                    for beta, x in zip(betas, self._features(read, [split.train, split.val], betas)):
                        if self.group.rank == 0:
                            logs[beta] = on_folds(cuts, partial(fit, x))
        logs = self.group.share(logs)
        scores = {beta: scores_of(log.validated) for beta, log in logs.items()}
        chosen = best_beta(scores, plain, self.config.margin)
        log = logs[chosen]
        log.details |= {"head": sum(value.numel() for value in log.state.values()), "validated": log.validated}
        if self.coeff is not None:
            best = best_beta(scores, plain, margin=0.0)
            gains = [b - a for a, b in zip(scores[plain], scores[best])]
            log.details["detail"] = {
                "beta": chosen,
                "coeff": self._coeff_at(chosen),
                "search": [
                    {"beta": b, "coeff": self._coeff_at(b), "val_accuracy": logs[b].validation["accuracy"]}
                    for b in logs
                ],
                "best": {"beta": best, "points": mean(gains), "standard_error": standard_error(gains)},
            }
        return log

    def right(self, state: dict[str, Tensor], beta: float | None) -> list[bool]:
        """Whether each test example is classified correctly, in order."""
        right: list[bool] = []
        with self._reader() as read:
            features = self._features(read, [self.split.test], [beta])
            if self.group.rank == 0:
                logits = features[0] @ state["weight"].T + state["bias"]
                right = (logits.argmax(1) == self.split.labels["test"]).tolist()
        return self.group.share(right)

    def _coeff_at(self, beta: float | None) -> float | None:
        return None if beta is None or self.coeff is None else coeff_at(self.coeff, beta)

    @contextmanager
    def _reader(self) -> Iterator[FeatureReader]:
        config, device = self.config, next(self.model.parameters()).device
        example = self.split.train[0][0][None].to(device)
        point = head_input(self.model, example)
        with evaluation(self.model):
            if self.coeff is None:
                opened = plain_backbone(self.model, example, point)
            else:
                opened = steered_backbone(self.model, example, point, self.coeff, config.steering)
            with opened as backbone:
                size = config.training.batch_size
                yield FeatureReader(backbone, self.group, device, size, config.workers, config.progress)

    def _features(self, read: FeatureReader, data: Sequence[Dataset[Any]], betas: Sequence[float | None]) -> Tensor:
        if self.config.bn != "train":
            return read("features", data, betas)
        (beta,) = betas
        size, workers = self.config.training.batch_size, self.config.workers
        with recalibrated(self.model, self.split.train, read.backbone.features(beta), size, workers):
            return read("features", data, betas)


@contextmanager
def recalibrated(
    model: nn.Module, examples: Dataset[Any], network: Any, batch_size: int, workers: int
) -> Iterator[None]:
    """Sets the statistics of batch normalisation to their mean over batches of ``examples``; restores them afterwards.

    ``network`` is called on the batches: ``model``, or its features at some beta.
    """
    layers = [m for m in batch_norms(model) if m.track_running_stats]
    device = next(model.parameters()).device
    saved = [(m.momentum, {k: b.clone() for k, b in m.named_buffers()}) for m in layers]
    single = ends_with_single(examples, batch_size)
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
            layer.train()
        for batch, _ in batches(examples, batch_size, workers, drop_last=single):
            network(batch.to(device))
        for layer in layers:
            layer.eval()
        yield
    finally:
        with torch.no_grad():
            for layer, (momentum, buffers) in zip(layers, saved):
                layer.momentum = momentum
                for name, value in buffers.items():
                    getattr(layer, name).copy_(value)
