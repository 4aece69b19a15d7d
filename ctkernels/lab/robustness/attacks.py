"""Adversarial attacks in pixel space: the authors' AutoAttack, on networks with normalisation inside."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..._extras import require
from ...cli.option_types import COUNT, SEED, Kind, names
from .._restoring import frozen
from ..config import Config, configured
from ..images.features import HookPoint, output_tensor
from ..images.probe import Probe

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # for their loss, a ratio of sorted logits
NORMS = {"linf": "Linf", "l2": "L2"}
TARGETS = 9  # classes for a targeted attack, the most probable first
ROUNDING = 2.0**-23  # of a float32 pixel in [0, 1] plus a perturbation
_SOME = names(ATTACKS)
ATTACKS_OR_STANDARD: Kind[Sequence[str] | None] = Kind(
    f"{_SOME.expected}, or standard",
    lambda text: None if text == "standard" else _SOME.read(text),
    lambda value: value is None or (len(value) > 0 and _SOME.fits(value)),
)


@dataclass(frozen=True)
class Threat:
    """A threat model: pixels in [0, 1] change by at most ``eps`` in ``norm``, and stay in [0, 1].

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: the bound, > 0. In RobustBench, 8/255 and 0.5 for CIFAR-10.
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {list(NORMS)}, got {self.norm!r}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps must be a positive number, got {self.eps}")

    def size(self, change: Tensor) -> Tensor:
        """The norm of each change (n, ...), as float64 (n,)."""
        flat = change.flatten(1).double()
        return flat.abs().amax(1) if self.norm == "linf" else flat.norm(dim=1)

    def allows(self, before: Tensor, after: Tensor) -> Tensor:
        """bool (n,): whether each change of float32 pixels is within the bound, up to rounding, and within [0, 1]."""
        entries = 1 if self.norm == "linf" else before[0].numel()
        near = self.size(after - before) <= self.eps + ROUNDING * math.sqrt(entries)
        return near & ((after >= 0) & (after <= 1)).flatten(1).all(1)

    def __str__(self) -> str:
        scaled = self.eps * 255
        as_fraction = self.norm == "linf" and abs(scaled - round(scaled)) < 1e-9
        return f"{'ℓ∞' if self.norm == 'linf' else 'ℓ2'} {f'{round(scaled)}/255' if as_fraction else f'{self.eps:g}'}"


class PixelClassifier(nn.Module):
    """A network from pixels in [0, 1] to logits, with normalisation and an optional linear probe inside.

    Bounds therefore apply to pixels, and gradients pass through normalisation and probe.

    Args:
        model: takes normalised images. Its mode is not changed; attacks need evaluation mode.
        mean, std: of each channel. Default: no normalisation, for any number of channels.
        probe: classifies features; needs ``point``. Default: the network's own output.
        point: the hook point of the features.

    Shape: (n, c, h, w) to (n, classes). One channel is repeated for a network with more (``len(mean)``).

    Examples:
        >>> classifier = PixelClassifier(model.eval(), (0.5,), (0.25,))
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        probe: Probe | None = None,
        point: HookPoint | None = None,
    ) -> None:
        super().__init__()
        if (probe is None) != (point is None):
            raise ValueError("probe and point must be given together")
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std or ())):
            raise ValueError(f"mean and std must be given together, with one value per channel, got {mean} and {std}")
        self.model, self.point = model, point
        self.channels = None if mean is None else len(mean)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for name, values in (("mean", mean or (0.0,)), ("std", std or (1.0,))):
            self.register_buffer(name, torch.tensor(values, device=device)[:, None, None])
        self.head: nn.Linear | None = None
        if probe is not None:
            # ((x - mean) / scale) @ weight.T + bias as one product, with constants computed in float64
            weight = probe.weight / probe.scale
            bias = probe.bias - (probe.weight * (probe.mean / probe.scale)).sum(1)
            self.head = nn.Linear(weight.shape[1], weight.shape[0], device=device).requires_grad_(False)
            with torch.no_grad():
                self.head.weight.copy_(torch.from_numpy(weight))
                self.head.bias.copy_(torch.from_numpy(bias))

    mean: Tensor
    std: Tensor

    def normalised(self, pixels: Tensor) -> Tensor:
        """The normalised input of the network."""
        if self.channels is not None and pixels.shape[1] == 1:
            pixels = pixels.expand(-1, self.channels, -1, -1)
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        images = self.normalised(pixels)
        if self.head is None or self.point is None:
            return output_tensor(self.model(images))
        with self.point.capture(self.model, gradients=True) as features:
            return self.head(features(images))


@dataclass(frozen=True)
class Attacked:
    """The outcome of attacks: whether each image is classified correctly, ``clean`` and ``after`` each attack."""

    clean: Tensor
    after: dict[str, Tensor] = field(default_factory=dict)
    adversarial: Tensor | None = None

    @property
    def robust(self) -> Tensor:
        """bool (n,): whether the clean image and the results of all attacks are classified correctly."""
        return list(self.after.values())[-1] if self.after else self.clean

    def accuracies(self) -> dict[str, float]:
        """Accuracy on clean images and after each attack, in order; an attack tries only images that are still right."""
        steps = {"clean": self.clean, **self.after}
        return {name: float(right.double().mean()) for name, right in steps.items()}


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Config):
    """The attacks of an ensemble, and their effort.

    Args:
        attacks: some of "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t" and "square". Default: AutoAttack's standard
            version: APGD on the cross-entropy, targeted APGD, targeted FAB and, without gradients, Square. Targeted APGD
            is left out for fewer than four classes, for which its loss is not defined.
        iterations: of APGD and FAB; AutoAttack's by default.
        queries: of Square, per image; AutoAttack's by default.
        batch_size: images per forward pass.
        seed: of random starts and of Square.
    """

    attacks: Annotated[Sequence[str] | str | None, ATTACKS_OR_STANDARD] = None
    iterations: Annotated[int, COUNT] = 100
    queries: Annotated[int, COUNT] = 5000
    batch_size: Annotated[int, COUNT] = 64
    seed: Annotated[int, SEED] = 0


def attack(
    classifier: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    threat: Threat,
    config: AttackConfig | None = None,
    **options: Any,
) -> Attacked:
    """Attacks a classifier with an ensemble; each attack tries the images that withstood the ones before it.

    The results of attacks are verified: an image counts as fooled if its change is within the bound, its pixels are in
    [0, 1], and the classifier errs on it.

    Args:
        classifier: from pixels in [0, 1] to logits, deterministic, in evaluation mode: :class:`PixelClassifier`.
        pixels: float32 (n, c, h, w) in [0, 1].
        labels: int64 (n,).
        threat: norm and bound.
        config: attacks and their effort.
        options: fields of :class:`AttackConfig`, which replace those of ``config``.

    Returns:
        :class:`Attacked`, with tensors on the CPU.

    Raises:
        ValueError: an attack is unknown or needs more classes, pixels are outside [0, 1], or a number is out of range.
        ImportError: pyautoattack is missing; the message names the extra.

    Examples:
        >>> from ctkernels.lab.robustness.attacks import PixelClassifier, Threat
        >>> classifier = PixelClassifier(model.eval(), (0.5,), (0.25,))
        >>> result = attack(classifier, pixels, labels, Threat("linf", 8 / 255), attacks=["apgd-ce"], iterations=2)
        >>> list(result.accuracies())
        ['clean', 'apgd-ce']

    Source: Croce and Hein 2020 (AutoAttack); Curvature Tuning paper, section 4.3. Unlike the paper's code, bounds are in
    pixels: normalisation happens inside the network.
    """
    if pixels.dim() != 4 or not pixels.is_floating_point() or not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError(
            f"pixels must be floating point (n, c, h, w) in [0, 1], got {pixels.dtype} of shape {tuple(pixels.shape)}"
            + (f" from {pixels.min():g} to {pixels.max():g}" if pixels.numel() else "")
        )
    config = configured(AttackConfig, config, options)
    if threat.norm == "l2" and "square" in (config.attacks or STANDARD) and min(pixels.shape[2:]) < 5:
        raise ValueError(f"attacks: square in l2 needs images of at least 5 x 5, got the shape {tuple(pixels.shape)}")
    device = next(classifier.parameters(), pixels).device
    with frozen(classifier), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        parts = []
        for x, y in zip(pixels.split(config.batch_size), labels.split(config.batch_size)):
            x, y = x.to(device, torch.float32), y.to(device)
            with torch.no_grad():
                classes = classifier(x).shape[1]
            ensemble = _ensemble(classifier, threat, classes, config, device)
            parts.append(_batch(classifier, ensemble, check_attacks(config.attacks, classes), x, y, threat))
    if not parts:
        raise ValueError("pixels must hold at least one image, got none")
    return Attacked(
        torch.cat([p.clean for p in parts]),
        {name: torch.cat([p.after[name] for p in parts]) for name in parts[0].after},
        torch.cat([p.adversarial for p in parts if p.adversarial is not None]),
    )


def check_attacks(attacks: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    """The attacks to run for this number of classes; None: the standard ones. ValueError for one that cannot run."""
    ATTACKS_OR_STANDARD.check("attacks", attacks)
    if attacks is None:
        return tuple(name for name in STANDARD if classes >= LEAST_CLASSES.get(name, 2))
    for name in attacks:
        if classes < LEAST_CLASSES.get(name, 2):
            raise ValueError(f"attacks: {name} needs at least {LEAST_CLASSES[name]} classes, got {classes}")
    return tuple(dict.fromkeys(attacks))


def _batch(
    classifier: nn.Module, ensemble: Any, names: Sequence[str], x: Tensor, y: Tensor, threat: Threat
) -> Attacked:
    with torch.no_grad():
        right = classifier(x).argmax(1) == y
    clean, adversarial, after = right.cpu(), x.clone(), {}
    for name in names:
        remaining = right.nonzero()[:, 0]
        if len(remaining):
            perturbed = _run(ensemble, name, x[remaining].clone(), y[remaining].clone()).detach()
            with torch.no_grad():
                fooled = threat.allows(x[remaining], perturbed) & (classifier(perturbed).argmax(1) != y[remaining])
            adversarial[remaining[fooled]] = perturbed[fooled]
            right = right.clone()
            right[remaining[fooled]] = False
        after[name] = right.cpu()
    return Attacked(clean, after, adversarial.cpu())


def _ensemble(classifier: nn.Module, threat: Threat, classes: int, config: AttackConfig, device: torch.device) -> Any:
    """The authors' standard version, with the configured iterations and queries, and targets for few classes."""
    package = require("pyautoattack", "lab", "adversarial attacks")
    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # it warns of every image without a gradient
    ensemble = package.AutoAttack(
        classifier, norm=NORMS[threat.norm], eps=threat.eps, seed=config.seed, version="standard", device=device
    )
    iterations = ensemble.fab.n_iter = config.iterations
    for apgd in (ensemble.apgd, ensemble.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = iterations
        # checkpoints at which the step may be halved, as shares of the iterations
        apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(f * iterations), 1) for f in (0.22, 0.06, 0.03))
    ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = min(TARGETS, classes - 1)
    ensemble.square.n_queries = config.queries
    return ensemble


def _run(ensemble: Any, name: str, x: Tensor, y: Tensor) -> Tensor:
    if name.startswith("apgd"):
        if name == "apgd-t":
            return ensemble.apgd_targeted.perturb(x, y)
        ensemble.apgd.loss = name.removeprefix("apgd-")
        return ensemble.apgd.perturb(x, y)
    if name == "square":
        with torch.no_grad():
            return ensemble.square.perturb(x, y)
    ensemble.fab.targeted = name == "fab-t"
    return ensemble.fab.perturb(x, y)
