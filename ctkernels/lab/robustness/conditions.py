"""Test conditions, attacks and corruptions, on images of pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
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
class PixelSet:
    """Pixels (n, c, h, w) in [0, 1] and labels."""

    pixels: Tensor
    labels: Tensor

    def sample(self, limit: int | None, seed: int) -> PixelSet:
        """A stratified sample of at most ``limit`` images; None: all."""
        if limit is None or limit >= len(self.labels):
            return self
        taken = stratified_order(self.labels, seed)[:limit].sort().values
        return PixelSet(self.pixels[taken], self.labels[taken])


def read_pixels(data: Pixels, name: str) -> PixelSet:
    """The pixels and labels of an argument. ValueError, starting with ``name``, for pixels outside [0, 1] and the like."""
    if isinstance(data, ImageSet):
        gray = len(data) > 0 and (data.raw(0).dim() == 2 or data.raw(0).shape[0] == 1)
        images = [data.preprocess.pixels(data.raw(i)) for i in range(len(data))]
        if not images:
            raise ValueError(f"{name} must have images, got none")
        stack = torch.stack([image[:1] if gray else image for image in images])
        return PixelSet(stack, data.labels)
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        raise ValueError(f"{name} must be an ImageSet or a pair of tensors (pixels, labels), got {type(data).__name__}")
    pixels, labels = data
    if pixels.dim() != 4 or not pixels.is_floating_point() or len(pixels) == 0:
        raise ValueError(
            f"{name}: pixels must be floating point (n, c, h, w), got {pixels.dtype}, shape {tuple(pixels.shape)}"
        )
    outside = (~((pixels >= 0) & (pixels <= 1))).flatten(1).any(1)  # NaN compares false
    if outside.any():
        first = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"{name}: pixels must be in [0, 1] without NaN, as normalisation happens inside the network: "
            f"{int(outside.sum())} of {len(pixels)} images are not, the first is number {first}"
        )
    if labels.shape != (len(pixels),) or labels.is_floating_point():
        raise ValueError(
            f"{name}: labels must be {len(pixels)} integers, got {labels.dtype}, shape {tuple(labels.shape)}"
        )
    return PixelSet(pixels.float(), labels.long())


@dataclass(frozen=True)
class Attack:
    """The condition of a threat, tested on at most ``config.max_attacked`` images."""

    threat: Threat
    config: RobustnessConfig

    @property
    def name(self) -> str:
        return str(self.threat)

    def measure(self, classifier: nn.Module, images: PixelSet, attacks: Sequence[str] | None) -> Outcome:
        sample = images.sample(self.config.max_attacked, self.config.seed)
        attacked = attack(classifier, sample.pixels, sample.labels, self.threat, self.config, attacks=attacks)
        steps = attacked.accuracies()
        return Outcome(tuple(attacked.robust.double().tolist()), steps.pop("clean"), steps)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kind": "attack", "norm": self.threat.norm, "eps": self.threat.eps}


@dataclass(frozen=True)
class Corruption:
    """The condition of all corruptions at all severities; the outcome of an image is its share of right answers."""

    config: RobustnessConfig
    name: str = CORRUPTION

    def measure(self, classifier: nn.Module, images: PixelSet, attacks: Sequence[str] | None) -> Outcome:
        config = self.config

        def right(pixels: Tensor) -> Tensor:
            return _right(classifier, pixels, images.labels, config.batch_size)

        clean = right(images.pixels)
        each = {
            name: [right(corrupt(images.pixels, name, severity, config.seed)) for severity in config.severities]
            for name in config.corruptions
        }
        steps = {name: float(torch.stack(answers).double().mean()) for name, answers in each.items()}
        shares = torch.stack([answer for answers in each.values() for answer in answers]).double().mean(0)
        return Outcome(tuple(shares.tolist()), float(clean.double().mean()), steps)

    def describe(self) -> dict[str, Any]:
        corruptions, severities = list(self.config.corruptions), list(self.config.severities)
        return {"name": self.name, "kind": "corruption", "corruptions": corruptions, "severities": severities}


Condition = Attack | Corruption


def conditions_of(config: RobustnessConfig) -> list[Condition]:
    """Each threat, and all corruptions together."""
    conditions: list[Condition] = [Attack(threat, config) for threat in config.threats]
    return [*conditions, Corruption(config)] if config.corrupts else conditions


@torch.no_grad()
def _right(classifier: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """bool (n,): whether each image is classified correctly."""
    device = next((p.device for p in classifier.parameters()), pixels.device)
    parts = [classifier(batch.to(device)).argmax(1).cpu() for batch in pixels.split(batch_size)]
    return torch.cat(parts) == labels
