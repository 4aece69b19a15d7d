"""Robustness of a steered network: beta chosen on validation images, the test images seen once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..._extras import require
from ..._factories import check_takes
from .._progress import bar
from ..config import SteeringConfig, check_least, configured
from ..images.backbone import Steered, evaluation, steered
from ..images.features import find_hook_point, output_tensor
from ..images.inputs import device_of
from ..images.probe import fit_probe
from ..images.sets import ImageSet, check_classes
from .attacks import ATTACKS, PixelClassifier, Threat, check_attacks
from .conditions import AttackConfig, Images, Pixels, conditions_of, read_pixels
from .corruptions import CORRUPTIONS, LEAST_SIDE, check_corruptions
from .result import Outcome, Robustness, Trial

HEADS = ("probe", "own")
ROBUST_BETAS = tuple(round(0.5 + 0.05 * i, 2) for i in range(11))
LINF, L2 = Threat("linf", 8 / 255), Threat("l2", 0.5)


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(SteeringConfig):
    """The configuration of :func:`robustness`.

    Args:
        betas: in [0, 1]; the plain network always takes part. Default 0.50 to 1.00 in steps of 0.05.
        coeff, activations, feature_layer, l2, seed, batch_size: as of :class:`SteeringConfig`.
        head: ``"probe"``: a linear probe is fitted on frozen features of the training images for every beta, as in S-CT.
            ``"own"``: the network's own output classifies; its classes are the labels.
        mean, std: of each channel, subtracted and divided by inside the network. Default: those of the preprocessing for
            an :class:`ImageSet`, no normalisation for tensors.
        threats: norms and bounds, in pixels. Default: 8/255 in the maximum norm, 0.5 in the Euclidean. May be empty.
        corruptions, severities: which; default all fifteen, 1 to 5. Either may be empty: none then.
        attacks: for the test; default AutoAttack's standard ensemble, see :func:`attack`.
        val_attacks: for the choice of beta. Default: APGD on the cross-entropy, a tenth of the cost. None: as default
            of ``attacks``.
        iterations, queries: of the attacks.
        max_attacked: the most validation, and the most test, images to attack, classes in proportion. The paper: 1000.

    Raises:
        ValueError: a value out of range, nothing to test, threats that are alike.
        ImportError: pyautoattack, imagecorruptions-imaug or scikit-learn is missing; the message names the extra.
    """

    head: str = "probe"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    threats: Sequence[Threat] = (LINF, L2)
    corruptions: Sequence[str] = CORRUPTIONS
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    attacks: Sequence[str] | None = None
    val_attacks: Sequence[str] | None = ("apgd-ce",)
    iterations: int = 100
    queries: int = 5000
    max_attacked: int | None = 1000
    batch_size: int = 64

    DEFAULT_BETAS: ClassVar[tuple[float, ...]] = ROBUST_BETAS

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {list(HEADS)}, got {self.head!r}")
        super().__post_init__()
        check_corruptions(self.corruptions, self.severities)
        if not self.threats and not self.corrupts:
            raise ValueError("threats or corruptions must hold something to test, both are empty")
        if len({str(t) for t in self.threats}) < len(self.threats):
            raise ValueError(f"threats must differ, got {[str(t) for t in self.threats]}")
        if self.threats:
            require("pyautoattack", "lab", "adversarial attacks")
        if self.corrupts:
            require("imagecorruptions", "lab", "common corruptions")
        for attacks in (self.attacks, self.val_attacks):
            check_attacks(attacks, len(ATTACKS))  # the names; whether there are classes enough is checked later
        check_least(self, iterations=1, queries=1, max_attacked=1)

    def _probe(self) -> str | None:
        return "logistic" if self.head == "probe" else None

    @property
    def corrupts(self) -> bool:
        """True if there are corruptions to test under."""
        return bool(self.corruptions and self.severities)

    def arguments(self) -> dict[str, Any]:
        arguments = super().arguments()
        return {
            name: value for name, value in arguments.items() if name not in ("threats", "corruptions", "severities")
        }


def robustness(
    model: nn.Module,
    train: Pixels | None,
    val: Pixels,
    test: Pixels,
    config: RobustnessConfig | None = None,
    *,
    trained: Mapping[str, nn.Module] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
) -> Robustness:
    """Accuracy under attack and under common corruptions, of the plain network, of the best beta, and of others.

    For every condition (each threat, and all corruptions together) the beta with the best accuracy *under that
    condition on the validation images* is chosen, the one nearest 1 among equals; then the plain network and the chosen
    beta are tested under it, once, on the same test images. A beta that was no better in validation is the plain
    network, so a gain on the test images is one, and a loss shows.

    Args:
        model: a network with ReLU-like activations, taking normalised images. It is left as it was.
        train: images to fit the linear probe on, an :class:`ImageSet` or a pair of tensors, pixels (n, c, h, w) in
            [0, 1] and labels (n,). None with ``head="own"``.
        val, test: the same kind.
        config: betas, threats, corruptions, attacks and so on.
        trained: further networks to test under every condition, by name, classifying by themselves: a network with
            learned curvature (T-CT), say, or LoRA. They take images normalised alike; one that was trained with another
            normalisation is given as a :class:`PixelClassifier`.
        device: where to run; the model is moved there. Default: where it is.
        progress: show a bar on standard error.
        options: fields of :class:`RobustnessConfig`, in place of ``config``'s.

    Returns:
        :class:`Robustness`.

    Raises:
        ValueError: before any long work: an argument out of range, pixels outside [0, 1], images the network does not
            take, labels without an output, nothing to test.
        ImportError: pyautoattack, imagecorruptions-imaug or scikit-learn is missing; the message names the extra.

    Examples:
        >>> from ctkernels.lab.robustness.attacks import Threat
        >>> quick = {"betas": [0.9, 1.0], "attacks": ["apgd-ce"], "iterations": 2, "corruptions": ["fog"], "severities": [1]}
        >>> result = robustness(model, train, val, test, threats=[Threat("linf", 8 / 255)], progress=False, **quick)
        >>> print(result.verdict())
        ℓ∞ 8/255...
        corruptions...

    Source: Curvature Tuning paper, section 4.3. Unlike its code: bounds and clamping are in pixels, beta is not chosen on
    the test images, and images are attacked at the size the network is used at.
    """
    started = time.perf_counter()
    config = configured(RobustnessConfig, config, options)
    if (train is None) != (config.head == "own"):
        raise ValueError(f"train must be {'images' if config.head == 'probe' else 'None'} for head={config.head!r}")
    parts = {"train": train, "val": val, "test": test}
    sets = {name: read_pixels(data, name) for name, data in parts.items() if data is not None}
    if config.corrupts and min(sets["test"].pixels.shape[2:]) < LEAST_SIDE:
        size = " x ".join(map(str, sets["test"].pixels.shape[2:]))
        raise ValueError(f"corruptions need images of at least {LEAST_SIDE} x {LEAST_SIDE} pixels, got {size}")
    if config.mean is None and isinstance(source := train if train is not None else val, ImageSet):
        config = replace(config, mean=source.preprocess.mean, std=source.preprocess.std)
    where = device_of(model, device)
    others = {name: network.to(where) for name, network in (trained or {}).items()}
    with ExitStack() as stack:
        for network in (model.to(where), *others.values()):
            stack.enter_context(evaluation(network))
        classes = _classes(sets, config, model, where)
        attacks, val_attacks = (check_attacks(names, classes) for names in (config.attacks, config.val_attacks))
        limits = AttackConfig(config.iterations, config.queries, config.batch_size, config.seed, config.max_attacked)
        conditions = conditions_of(config.threats, config.corruptions, config.severities, limits)
        knob = stack.enter_context(_knob(model, sets, config, where))
        candidates, plain = knob.network.candidates(config.grid), knob.network.plain
        trials: dict[str, list[Trial]] = {condition.name: [] for condition in conditions}
        heads: dict[float | None, nn.Module] = {}
        seconds = {"validation": -time.perf_counter()}
        with bar(len(candidates) * len(conditions), "validation", progress) as advance:
            for beta in candidates:
                heads[beta] = knob.classifier(beta)
                for condition in conditions:
                    outcome = condition.measure(heads[beta], sets["val"], val_attacks)
                    trials[condition.name].append(Trial(beta, outcome.accuracy, outcome.clean))
                    advance(1)
        choice = {name: _best(found) for name, found in trials.items()}
        seconds["validation"] += time.perf_counter()
        seconds["test"] = -time.perf_counter()
        tested: dict[str, dict[str, Outcome]] = {}
        with bar(len(conditions) * (2 + len(others)), "test", progress) as advance:
            for condition in conditions:
                betas = {"plain": plain, "s-ct": choice[condition.name].beta}
                rows = tested[condition.name] = {}
                for method, beta in betas.items():
                    if method == "plain" or beta != plain:
                        knob.network.turn(beta)
                        rows[method] = condition.measure(heads[beta], sets["test"], attacks)
                    advance(1)
                for method, other in others.items():
                    if not isinstance(other, PixelClassifier):
                        other = PixelClassifier(other, config.mean, config.std)
                    rows[method] = condition.measure(other, sets["test"], attacks)
                    advance(1)
        seconds["test"] += time.perf_counter()
        network_sites, missed, plain_is_beta_1 = knob.network.sites, knob.network.missed, plain is not None
    seconds["total"] = time.perf_counter() - started
    return Robustness(
        conditions=tuple(condition.describe() for condition in conditions),
        validation={name: tuple(found) for name, found in trials.items()},
        chosen={name: trial.beta for name, trial in choice.items()},
        test=tested,
        plain_is_beta_1=plain_is_beta_1,
        sites=network_sites,
        missed=missed,
        sizes={**{name: len(data.labels) for name, data in sets.items()}, "classes": classes},
        arguments={
            **config.arguments(),
            "attacks": list(attacks),
            "val_attacks": list(val_attacks),
            "device": str(where),
        },
        seconds=seconds,
    )


def _classes(sets: Mapping[str, Images], config: RobustnessConfig, model: nn.Module, device: torch.device) -> int:
    """The number of classes; ValueError unless the network takes the images and the labels fit."""
    example = sets["val"].pixels[:1].to(device)
    classifier = PixelClassifier(model, config.mean, config.std)
    outputs = check_takes(classifier, example, what="val: images", name=type(model).__name__).shape
    if config.head == "probe":
        check_classes(sets["train"].labels, "train")
        known = sets["train"].labels.unique()
        if known.tolist() != list(range(len(known))):
            raise ValueError(f"train must have images of every class from 0, got the classes {known.tolist()}")
        classes = len(known)
    else:
        if len(outputs) != 2 or outputs[1] < 2:
            raise ValueError(f"head='own' needs a network with logits (n, classes), got the shape {tuple(outputs)}")
        classes = outputs[1]
    for name, data in sets.items():
        low, high = int(data.labels.min()), int(data.labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"{name}: labels must be in [0, {classes}), got values from {low} to {high}")
    return classes


def _best(trials: Sequence[Trial]) -> Trial:
    """The best accuracy under the condition; of equals the plain network, then the beta nearest 1."""
    return max(trials, key=lambda trial: (trial.accuracy, 2.0 if trial.beta is None else trial.beta))


# --- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Knob:
    """A steered network; ``classifier`` sets beta and gives a classifier of pixels at it."""

    network: Steered
    classifier: Callable[[float | None], nn.Module]


@contextmanager
def _knob(
    model: nn.Module, sets: Mapping[str, Images], config: RobustnessConfig, device: torch.device
) -> Iterator[_Knob]:
    pixels = PixelClassifier(model, config.mean, config.std)
    example = pixels.normalised(sets["val"].pixels[:1].to(device))
    point = find_hook_point(model, example, config.feature_layer) if config.head == "probe" else None

    def run() -> Tensor:
        with torch.no_grad():
            return output_tensor(model(example))

    with steered(model, run, config.coeff, config.steering) as network:

        def classifier(beta: float | None) -> nn.Module:
            network.turn(beta)
            if point is None:
                return pixels
            batches = sets["train"].pixels.split(config.batch_size)
            with point.capture(model) as features:
                values = torch.cat([features(pixels.normalised(batch.to(device))).cpu() for batch in batches])
            probe = fit_probe(values, sets["train"].labels, "logistic", config.l2, config.seed)
            return PixelClassifier(model, config.mean, config.std, probe, point)

        yield _Knob(network, classifier)
