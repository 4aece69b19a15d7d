"""Test conditions: attacks and corruptions of images, which are pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..images.sets import ImageSet
from ..labelled import stratified_order
from .attacks import Threat, attack
from .config import RobustnessConfig
from .corruptions import corrupt
from .result import Outcome

Pixels = ImageSet | tuple[Tensor, Tensor]
CORRUPTION = "corruptions"


@dataclass
class Images:
    """Pixels (n, c, h, w) in [0, 1] and labels, with corrupted versions as they are asked for (not kept)."""

    pixels: Tensor
    labels: Tensor

    def sample(self, limit: int | None, seed: int) -> Images:
        if limit is None or limit >= len(self.labels):
            return self
        taken = stratified_order(self.labels, seed)[:limit].sort().values
        return Images(self.pixels[taken], self.labels[taken])


def read_pixels(data: Pixels, name: str) -> Images:
    if isinstance(data, ImageSet):
        gray = len(data) > 0 and (data.raw(0).dim() == 2 or data.raw(0).shape[0] == 1)
        images = [data.preprocess.pixels(data.raw(i)) for i in range(len(data))]
        if not images:
            raise ValueError(f"{name} must have images, got none")
        stack = torch.stack([image[:1] if gray else image for image in images])
        return Images(stack, data.labels)
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        raise ValueError(f"{name} must be an ImageSet or a pair of tensors (pixels, labels), got {type(data).__name__}")
    pixels, labels = data
    if pixels.dim() != 4 or not pixels.is_floating_point() or len(pixels) == 0:
        raise ValueError(
            f"{name}: pixels must be floating point (n, c, h, w), got {pixels.dtype}, shape {tuple(pixels.shape)}"
        )
    bad = (~((pixels >= 0) & (pixels <= 1))).flatten(1).any(1)  # NaN compares false
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{name}: pixels must be in [0, 1] without NaN, as normalisation happens inside the network: "
            f"{int(bad.sum())} of {len(pixels)} images are not, the first is number {first}"
        )
    if labels.shape != (len(pixels),) or labels.is_floating_point():
        raise ValueError(
            f"{name}: labels must be {len(pixels)} integers, got {labels.dtype}, shape {tuple(labels.shape)}"
        )
    return Images(pixels.float(), labels.long())


@dataclass(frozen=True)
class Condition:
    """Something that makes images harder: ``measure`` is a classifier's outcome under it, image by image."""

    name: str
    about: dict[str, Any]
    measure: Callable[[nn.Module, Images, Sequence[str] | None], Outcome]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, **self.about}


def conditions_of(config: RobustnessConfig) -> list[Condition]:
    """Each threat, and all corruptions together."""
    corruptions, severities, seed = config.corruptions, config.severities, config.seed

    def under(threat: Threat) -> Callable[[nn.Module, Images, Sequence[str] | None], Outcome]:
        def measure(classifier: nn.Module, images: Images, attacks: Sequence[str] | None) -> Outcome:
            some = images.sample(config.max_attacked, seed)
            attacked = attack(classifier, some.pixels, some.labels, threat, config, attacks=attacks)
            steps = attacked.accuracies()
            return Outcome(tuple(attacked.robust.double().tolist()), steps.pop("clean"), steps)

        return measure

    def corrupted(classifier: nn.Module, images: Images, _: object) -> Outcome:
        def right(pixels: Tensor) -> Tensor:
            return _right(classifier, pixels, images.labels, config.batch_size)

        clean = right(images.pixels)
        each = {
            (name, severity): right(corrupt(images.pixels, name, severity, seed))
            for name in corruptions
            for severity in severities
        }
        mean_of = {
            name: float(torch.stack([each[name, s] for s in severities]).double().mean()) for name in corruptions
        }
        average = torch.stack(list(each.values())).double().mean(0)
        return Outcome(tuple(average.tolist()), float(clean.double().mean()), mean_of)

    conditions = [Condition(str(t), {"kind": "attack", "norm": t.norm, "eps": t.eps}, under(t)) for t in config.threats]
    if config.corrupts:
        about = {"kind": "corruption", "corruptions": list(corruptions), "severities": list(severities)}
        conditions.append(Condition(CORRUPTION, about, corrupted))
    return conditions


@torch.no_grad()
def _right(classifier: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """bool (n,): whether each image is classified rightly."""
    device = next((p.device for p in classifier.parameters()), pixels.device)
    parts = [classifier(batch.to(device)).argmax(1).cpu() for batch in pixels.split(batch_size)]
    return torch.cat(parts) == labels
