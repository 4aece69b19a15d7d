"""Reading a frozen network's features at values of beta: what every search and frozen method does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from ... import fuse, steer
from ..._factories import check_takes
from .._distributed import Group
from .._progress import bar
from ..betas import coeff_at
from ..images.features import Tap, extract, find_tap


@dataclass(frozen=True)
class Subject:
    """A steered network: ``features(beta)`` is a function from a batch to features; None: of the plain network."""

    features: Callable[[float | None], Callable[[Tensor], Tensor]]
    tap: Tap
    dim: int
    sites: tuple[str, ...]
    missed: tuple[str, ...]
    plain_is_beta_1: bool


@contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, and back to what each submodule was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def fused(model: nn.Module) -> Iterator[nn.Module]:
    """The network fused, so that it runs faster and gives the same within rounding; as it is where nothing can be."""
    try:
        fusion: Any = fuse(model)
    except ValueError:
        fusion = nullcontext()
    with fusion:
        yield model


@contextmanager
def subject_of(
    model: nn.Module, example: Tensor, place: Tap | str | None, steering: dict[str, Any], fast: bool = False
) -> Iterator[Subject]:
    """``model`` steered.

    Args:
        model: in evaluation mode; afterwards it is as it was.
        example: a batch it takes.
        place: where features are taken, a :class:`Tap` or as in :func:`find_tap`.
        steering: ``coeff``, and options of :func:`ctkernels.steer`.
        fast: whether to fuse it meanwhile (:func:`ctkernels.fuse`): features then differ by rounding.

    Raises:
        ValueError: the network does not take the example, or has nothing to steer.
    """
    coeff, options = steering["coeff"], {k: v for k, v in steering.items() if k != "coeff"}
    check_takes(model, example, what="train: images")
    tap = place if isinstance(place, Tap) else find_tap(model, example, place)
    with tap.capture(model) as features:
        as_is = features(example)
    with steer(model, 1.0, **options) as handle, tap.capture(model) as features, ExitStack() as stack:
        at_one = features(example)
        if fast:
            stack.enter_context(fused(model))
        same = torch.allclose(at_one, as_is, rtol=1e-4, atol=1e-5 * float(as_is.abs().max()))

        def features_at(beta: float | None) -> Callable[[Tensor], Tensor]:
            def run(batch: Tensor) -> Tensor:
                if beta is None:
                    handle.neutralize()
                else:
                    handle.coeff, handle.beta = coeff_at(coeff, beta), beta
                return features(batch)

            return run

        yield Subject(
            features=features_at,
            tap=tap,
            dim=as_is.shape[1],
            sites=tuple(site.name for site in handle.sites),
            missed=tuple(f"{miss.name} ({miss.activation}): {miss.reason}" for miss in handle.missed),
            plain_is_beta_1=same,
        )


@dataclass(frozen=True)
class Reader:
    """One pass over data for some settings of the network, with a progress bar."""

    subject: Subject
    group: Group
    device: torch.device
    batch_size: int
    workers: int
    progress: bool

    def __call__(self, text: str, data: Sequence[Dataset[Any]], betas: Sequence[float | None]) -> Tensor:
        samples = len(ConcatDataset(data))
        batches = len(range(self.group.rank * self.batch_size, samples, self.group.size * self.batch_size))
        with bar(batches * len(betas), text, self.progress and self.group.rank == 0) as advance:
            return extract(
                data,
                [self.subject.features(b) for b in betas],
                self.subject.dim,
                batch_size=self.batch_size,
                workers=self.workers,
                device=self.device,
                group=self.group,
                advance=advance,
            )
