"""A frozen network as a backbone, steered and optionally fused, and its features at several betas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from ... import fuse, steer
from ..._factories import check_takes
from .._distributed import Group
from .._progress import bar
from .features import HookPoint, extract, find_hook_point

MEAN_FREE = "mean-free"
Beta = float | Mapping[str, float] | None  # one for all sites, or by site; None: the plain network


def coeff_at(coeff: float | str, beta: float) -> float:
    """``coeff``, or for ``"mean-free"`` the coefficient at which a unit of ``beta`` has no mean shift.

    The integral of (unit - ReLU) over all x is (pi^2 / 6) s^2 ((1 - c) - c / beta^2), s = 1 - beta. It is zero at
    c = beta^2 / (1 + beta^2): 0.5 near beta = 1, 0.448 at 0.9, 0.329 at 0.7. At c = 0.5 it is negative for beta < 1.

    Examples:
        >>> coeff_at("mean-free", 1.0)
        0.5
    """
    return beta**2 / (1 + beta**2) if isinstance(coeff, str) else coeff


@dataclass(frozen=True)
class Steered:
    """A steered network.

    Attributes:
        set_beta: sets beta; None: the plain network.
        sites: names of the steered activations.
        missed: selected activations that cannot be steered, with the reason.
        plain_is_beta_1: whether the network at beta = 1 is the plain one.
    """

    set_beta: Callable[[Any], None]
    sites: tuple[str, ...]
    missed: tuple[str, ...]
    plain_is_beta_1: bool

    @property
    def plain(self) -> float | None:
        """The beta of the plain network: 1, or None if that is not the plain one."""
        return 1.0 if self.plain_is_beta_1 else None

    def candidates(self, betas: Iterable[float]) -> list[float | None]:
        """The betas to try, ascending, including the plain network."""
        return [*sorted({*betas, 1.0})] if self.plain_is_beta_1 else [None, *sorted(set(betas))]


@contextmanager
def steered(
    model: nn.Module, run: Callable[[], Tensor], coeff: float | str, options: Mapping[str, Any]
) -> Iterator[Steered]:
    """Steers ``model``, which is in evaluation mode, with these options of :func:`ctkernels.steer`; restores it afterwards.

    ``run`` returns an output of the network, to compare the plain network with that at beta = 1.
    """
    plain = run()
    with steer(model, 1.0, **options) as handle:
        same = torch.allclose(run(), plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))

        def set_beta(beta: Any) -> None:
            if beta is None:
                handle.neutralize()
            else:
                handle.coeff, handle.beta = coeff_at(coeff, beta), beta

        missed = tuple(f"{miss.name} ({miss.activation}): {miss.reason}" for miss in handle.missed)
        yield Steered(set_beta, tuple(site.name for site in handle.sites), missed, same)


@dataclass(frozen=True)
class Backbone:
    """A network whose features (b, dim) are read at a hook point. ``features(beta)``: a function from batch to features."""

    steered: Steered
    point: HookPoint
    dim: int
    features: Callable[[Any], Callable[[Tensor], Tensor]]


@contextmanager
def plain_backbone(model: nn.Module, example: Tensor, point: HookPoint) -> Iterator[Backbone]:
    """Reads features of ``model`` without steering. The model is in evaluation mode."""
    with point.capture(model) as features:
        dim = features(example).shape[1]
        yield Backbone(Steered(lambda beta: None, (), (), True), point, dim, lambda beta: features)


@contextmanager
def steered_backbone(
    model: nn.Module,
    example: Tensor,
    point: HookPoint | str | None,
    coeff: float | str = 0.5,
    options: Mapping[str, Any] | None = None,
    fast: bool = False,
) -> Iterator[Backbone]:
    """Steers ``model``, which is in evaluation mode, and reads its features; restores it afterwards.

    Args:
        point: a :class:`HookPoint`, or the argument ``feature_layer`` of :func:`find_hook_point`.
        coeff, options: as in :func:`steered`.
        fast: fuse the network meanwhile (:func:`ctkernels.fuse`), which changes features by rounding.
    """
    check_takes(model, example, what="train: images")
    hook = point if isinstance(point, HookPoint) else find_hook_point(model, example, point)

    def run() -> Tensor:
        with hook.capture(model) as features:
            return features(example)

    with steered(model, run, coeff, options or {}) as network, hook.capture(model) as features, ExitStack() as stack:
        dim = features(example).shape[1]
        if fast:
            with suppress(ValueError):  # nothing to fuse
                stack.enter_context(fuse(model))

        def features_at(beta: Any) -> Callable[[Tensor], Tensor]:
            def run_at(batch: Tensor) -> Tensor:
                network.set_beta(beta)
                return features(batch)

            return run_at

        yield Backbone(network, hook, dim, features_at)


@dataclass(frozen=True)
class FeatureReader:
    """Extracts features of data at several betas in one pass, with a progress bar."""

    backbone: Backbone
    group: Group
    device: torch.device
    batch_size: int
    workers: int = 0
    progress: bool = False

    def __call__(self, text: str, data: Sequence[Dataset[Any]], betas: Sequence[Beta]) -> Tensor:
        samples = len(ConcatDataset(data))
        batches = len(range(self.group.rank * self.batch_size, samples, self.group.size * self.batch_size))
        with bar(batches * len(betas), text, self.progress and self.group.rank == 0) as advance:
            return extract(
                data,
                [self.backbone.features(b) for b in betas],
                self.backbone.dim,
                batch_size=self.batch_size,
                workers=self.workers,
                device=self.device,
                group=self.group,
                advance=advance,
            )
