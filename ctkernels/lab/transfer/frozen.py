"""The methods that leave the network alone: a linear probe, and S-CT, which chooses the best of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .._distributed import Group
from ..betas import coeff_at
from ..images.features import passes
from ..search.reading import Reader, Subject, evaluation, subject_of
from .heads import Budget, Run, fit_head, head_place, rank
from .state import batch_norms


@dataclass(frozen=True)
class Frozen:
    """A frozen network whose features are read, at the plain network or at values of beta.

    Args:
        model: on its device; it is left as it was.
        example: a batch the network takes.
        betas: those to choose from; None: only the plain network.
        coeff: of the CT unit, a number or "mean-free".
        activations: kinds to steer; None: :func:`ctkernels.steer`'s default.
        recalibrate: images on which the statistics of batch normalisation are estimated anew, for every beta.
    """

    model: nn.Module
    example: Tensor
    betas: Sequence[float] | None
    coeff: float | str
    activations: Sequence[str] | None
    recalibrate: Dataset[Any] | None
    budget: Budget
    group: Group
    batch_size: int
    workers: int
    memory_limit: int
    progress: bool

    def fit(
        self, train: Dataset[Any], val: Dataset[Any], labels: dict[str, Tensor], classes: int, lr: float, seed: int
    ) -> tuple[Run, dict[str, Any]]:
        """Train a head for every candidate; the one with the best validation, of equals the one nearest the network.

        Returns:
            the run of the chosen candidate, and ``detail`` of :class:`Cell`.
        """
        n = len(labels["train"])
        runs: dict[float | None, Run] = {}
        with self._open("fit") as read:
            candidates = self._candidates(read.subject)
            at_once = len(candidates) if self.recalibrate is None else 1
            width = read.subject.dim
            for stretch in passes(n + len(labels["val"]), width, len(candidates), self.memory_limit):
                for some in (stretch[i : i + at_once] for i in range(0, len(stretch), at_once)):
                    betas = [candidates[i] for i in some]
                    for beta, x in zip(betas, self._features(read, [train, val], betas)):
                        if self.group.rank == 0:
                            data = (x[:n], labels["train"], x[n:], labels["val"], classes)
                            runs[beta] = fit_head(*data, lr=lr, budget=self.budget, seed=seed)
        runs = self.group.share(runs)
        best = max(runs, key=lambda b: (rank(runs[b].epochs[runs[b].best - 1])[0], 2.0 if b is None else b))
        if self.betas is None:
            return runs[best], {}
        found = [(b, runs[b].epochs[runs[b].best - 1]["accuracy"]) for b in runs]
        return runs[best], {
            "beta": best,
            "coeff": None if best is None else coeff_at(self.coeff, best),
            "search": [
                {"beta": b, "coeff": None if b is None else coeff_at(self.coeff, b), "val_accuracy": accuracy}
                for b, accuracy in found
            ],
        }

    def right(self, test: Dataset[Any], labels: Tensor, state: dict[str, Tensor], beta: float | None) -> list[bool]:
        """Whether each test image was classified rightly, in order."""
        with self._open("test") as read:
            features = self._features(read, [test], [beta])
            found: list[bool] = []
            if self.group.rank == 0:
                found = ((features[0] @ state["weight"].T + state["bias"]).argmax(1) == labels).tolist()
        return self.group.share(found)

    def _candidates(self, subject: Subject) -> list[float | None]:
        if self.betas is None:
            return [None]
        if subject.plain_is_beta_1:
            return [*sorted({*self.betas, 1.0})]
        return [None, *sorted(set(self.betas))]

    @contextmanager
    def _open(self, text: str) -> Iterator[Reader]:
        tap = head_place(self.model, self.example)
        steering: dict[str, Any] = {"coeff": self.coeff}
        if self.activations is not None:
            steering["activations"] = tuple(self.activations)
        with evaluation(self.model):
            if self.betas is None:
                with tap.capture(self.model) as features:
                    dim = features(self.example).shape[1]
                    yield self._reader(Subject(lambda beta: features, tap, dim, (), (), True))
            else:
                with subject_of(self.model, self.example, tap, steering) as subject:
                    yield self._reader(subject)

    def _reader(self, subject: Subject) -> Reader:
        return Reader(subject, self.group, self.example.device, self.batch_size, self.workers, self.progress)

    def _features(self, read: Reader, data: Sequence[Dataset[Any]], betas: Sequence[float | None]) -> Tensor:
        if self.recalibrate is None:
            return read("features", data, betas)
        (beta,) = betas
        with recalibrated(self.model, self.recalibrate, read.subject.features(beta), self.batch_size, self.workers):
            return read("features", data, betas)


@contextmanager
def recalibrated(model: nn.Module, images: Dataset[Any], network: Any, batch_size: int, workers: int) -> Iterator[None]:
    """Batch normalisation with the mean statistics of the batches of ``images``; afterwards with its own again.

    For a network that is not trained this stands in for the batch statistics that training would go by.
    """
    layers = [m for m in batch_norms(model) if m.track_running_stats]
    device = next(model.parameters()).device
    before = [(m.momentum, {k: b.clone() for k, b in m.named_buffers()}) for m in layers]
    alone = len(images) > batch_size and len(images) % batch_size == 1  # type: ignore[arg-type]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
            layer.train()
        for batch, _ in DataLoader(images, batch_size, num_workers=workers, drop_last=alone):
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
