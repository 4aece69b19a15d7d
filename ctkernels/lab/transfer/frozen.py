"""The methods that leave the network alone: a linear probe, and S-CT, which chooses the best of many."""

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
from ..experiment import rank
from ..images.backbone import FeatureReader, coeff_at, plain_backbone, steered_backbone
from ..images.features import passes
from ..labelled import batches
from ..stats import preferred, standard_error
from .config import TransferConfig
from .folds import FoldLog, on_folds
from .heads import fit_head, head_input
from .inputs import Split
from .state import batch_norms


@dataclass(frozen=True)
class FrozenNetwork:
    """A frozen network whose features are read, plain or at values of beta.

    Args:
        model: on its device; it is left as it was.
        coeff: of the CT unit, a number or "mean-free"; None: only the plain network.
        config: betas, kinds of activation, batch size and so on.
        group: the processes that share reading.
        split: the images. Batch-normalisation statistics are estimated on its training images, for every beta, where
            ``config.bn`` is "train".
    """

    model: nn.Module
    coeff: float | str | None
    config: TransferConfig
    group: Group
    split: Split

    def fit(self, classes: int, lr: float, seed: int, cuts: Sequence[tuple[Tensor, Tensor]]) -> FoldLog:
        """Train a head for every candidate on every fold of ``cuts``, and keep the best in validation.

        Of equals it is the one nearest the plain network, which is kept itself unless another is better beyond
        ``config.margin``.
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
        best = max(logs, key=lambda b: (rank(logs[b].validation)[0], 2.0 if b is None else b))
        pair = [list(map(int, logs[b].validated)) for b in (plain, best)]
        chosen = (plain, best)[preferred(pair, self.config.margin)]
        log = logs[chosen]
        log.details |= {"head": sum(value.numel() for value in log.state.values()), "validated": log.validated}
        if self.coeff is not None:
            search = [
                {"beta": b, "coeff": self._coeff_at(b), "val_accuracy": logs[b].validation["accuracy"]} for b in logs
            ]
            over = [b - a for a, b in zip(*pair)]
            ahead = {"beta": best, "points": mean(over), "standard_error": standard_error(over)}
            log.details["detail"] = {
                "beta": chosen,
                "coeff": self._coeff_at(chosen),
                "search": search,
                "best": ahead,
            }
        return log

    def right(self, state: dict[str, Tensor], beta: float | None) -> list[bool]:
        """Classify the test images: True for each that is right, in order."""
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
        device = next(self.model.parameters()).device
        example = self.split.train[0][0][None].to(device)
        point = head_input(self.model, example)
        with evaluation(self.model):
            if self.coeff is None:
                opened = plain_backbone(self.model, example, point)
            else:
                opened = steered_backbone(self.model, example, point, self.coeff, self.config.steering)
            with opened as backbone:
                config = self.config
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
def recalibrated(model: nn.Module, images: Dataset[Any], network: Any, batch_size: int, workers: int) -> Iterator[None]:
    """Give batch normalisation the mean statistics of the batches of ``images``; afterwards its own again.

    For a network that is not trained this stands in for the batch statistics that training would go by.
    """
    layers = [m for m in batch_norms(model) if m.track_running_stats]
    device = next(model.parameters()).device
    before = [(m.momentum, {k: b.clone() for k, b in m.named_buffers()}) for m in layers]
    single = len(images) > batch_size and len(images) % batch_size == 1  # type: ignore[arg-type]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
            layer.train()
        for batch, _ in batches(images, batch_size, workers, drop_last=single):
            network(batch.to(device))
        for layer in layers:
            layer.eval()
        yield
    finally:
        with torch.no_grad():
            for layer, (momentum, buffers) in zip(layers, before):
                layer.momentum = momentum
                for name, value in buffers.items():
                    getattr(layer, name).copy_(value)
