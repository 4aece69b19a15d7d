"""Robustness of a steered network, with beta chosen on validation images and one test."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._factories import check_takes
from .._progress import bar, timed
from .._restoring import evaluation
from ..config import configured
from ..images.backbone import Steered, steered
from ..images.features import find_hook_point, output_tensor
from ..images.inputs import device_of
from ..images.probe import fit_probe
from ..images.sets import ImageSet
from ..labelled import check_classes
from ..stats import best_beta
from .attacks import PixelClassifier, check_attacks
from .conditions import Condition, Pixels, PixelSet, conditions_of, read_pixels
from .config import RobustnessConfig
from .corruptions import LEAST_SIDE
from .result import Outcome, Robustness, ValidationScore


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
    """Accuracy under attack and under common corruptions, of the plain network, the best beta, and further networks.

    For every condition (each threat, and all corruptions together), the beta with the best accuracy *under that condition
    on the validation images* is chosen (the one nearest 1 among equals) if it beats the plain network by more than one
    standard error (``margin``). Then the plain network and the chosen beta are tested under it, once, on the same test
    images.

    Args:
        model: a network with ReLU-like activations that takes normalised images; unchanged afterwards.
        train: images for the linear probe, an :class:`ImageSet` or a pair of tensors, pixels (n, c, h, w) in [0, 1] and
            labels (n,). None with ``head="own"``.
        val, test: images of the same form.
        config: betas, threats, corruptions, attacks and so on.
        trained: further networks to test under every condition, by name, such as one with learned curvature (T-CT) or
            LoRA. They classify by themselves, and take images with the same normalisation; a :class:`PixelClassifier` has
            its own.
        device: where to run; the model is moved there. Default: the device of the model.
        progress: show a progress bar on standard error.
        options: fields of :class:`RobustnessConfig`, which replace those of ``config``.

    Returns:
        :class:`Robustness`.

    Raises:
        ValueError: raised before any long work: an argument is out of range, pixels are outside [0, 1], the network does
            not take the images, labels have no output, or there is nothing to test.
        ImportError: pyautoattack, imagecorruptions-imaug or scikit-learn is missing; the message names the extra.

    Examples:
        >>> from ctkernels.lab.robustness.attacks import Threat
        >>> quick = {"betas": [0.9, 1.0], "attacks": ["apgd-ce"], "iterations": 2, "corruptions": ["fog"], "severities": [1]}
        >>> result = robustness(model, train, val, test, threats=[Threat("linf", 8 / 255)], progress=False, **quick)
        >>> print(result.verdict())
        ℓ∞ 8/255...
        corruptions...

    Source: Curvature Tuning paper, section 4.3. Unlike in its code, bounds and clamping are in pixels, beta is not
    chosen on the test images, and images are attacked at the size of the network's input.
    """
    started = time.perf_counter()
    config = configured(RobustnessConfig, config, options)
    sets, config = _checked(train, val, test, config)
    device = device_of(model, device)
    others: dict[str, nn.Module] = {
        name: other if isinstance(other, PixelClassifier) else PixelClassifier(other, config.mean, config.std)
        for name, other in (trained or {}).items()
    }
    with ExitStack() as stack:
        for module in (model, *others.values()):
            stack.enter_context(evaluation(module.to(device)))
        classes = _classes(sets, config, model, device)
        attacks, val_attacks = (check_attacks(names, classes) for names in (config.attacks, config.val_attacks))
        network = stack.enter_context(_steered_classifier(model, sets, config, device))
        conditions, candidates = conditions_of(config), network.steered.candidates(config.grid)
        seconds: dict[str, float] = {}
        steps = len(candidates) * len(conditions)
        with timed(seconds, "validation"), bar(steps, "validation", progress) as advance:
            outcomes = _validate(network, conditions, candidates, sets["val"], val_attacks, advance)
        chosen = {
            name: best_beta({beta: o.right for beta, o in by_beta.items()}, network.steered.plain, config.margin)
            for name, by_beta in outcomes.items()
        }
        steps = len(conditions) * (2 + len(others))
        with timed(seconds, "test"), bar(steps, "test", progress) as advance:
            tested = _test(network, conditions, chosen, others, sets["test"], attacks, advance)
    seconds["total"] = time.perf_counter() - started
    return Robustness(
        conditions=tuple(condition.describe() for condition in conditions),
        validation={
            name: tuple(ValidationScore(beta, o.accuracy, o.clean) for beta, o in by_beta.items())
            for name, by_beta in outcomes.items()
        },
        chosen=chosen,
        test=tested,
        plain_is_beta_1=network.steered.plain_is_beta_1,
        sites=network.steered.sites,
        missed=network.steered.missed,
        sizes={**{name: len(data.labels) for name, data in sets.items()}, "classes": classes},
        arguments={
            **config.arguments(),
            "attacks": list(attacks),
            "val_attacks": list(val_attacks),
            "device": str(device),
        },
        seconds=seconds,
    )


def _checked(
    train: Pixels | None, val: Pixels, test: Pixels, config: RobustnessConfig
) -> tuple[dict[str, PixelSet], RobustnessConfig]:
    """The images by name, and the configuration with the normalisation of an :class:`ImageSet`."""
    if (train is None) != (config.head == "own"):
        raise ValueError(f"train must be {'images' if config.head == 'probe' else 'None'} for head={config.head!r}")
    parts = {"train": train, "val": val, "test": test}
    sets = {name: read_pixels(data, name) for name, data in parts.items() if data is not None}
    if config.corrupts and min(sets["test"].pixels.shape[2:]) < LEAST_SIDE:
        size = " x ".join(map(str, sets["test"].pixels.shape[2:]))
        raise ValueError(f"corruptions need images of at least {LEAST_SIDE} x {LEAST_SIDE} pixels, got {size}")
    if config.mean is None and isinstance(source := train if train is not None else val, ImageSet):
        config = replace(config, mean=source.preprocess.mean, std=source.preprocess.std)
    return sets, config


def _validate(
    network: _SteeredClassifier,
    conditions: Sequence[Condition],
    betas: Sequence[float | None],
    images: PixelSet,
    attacks: Sequence[str],
    advance: Callable[[int], object],
) -> dict[str, dict[float | None, Outcome]]:
    """The outcomes of all betas under all conditions, by condition."""
    outcomes: dict[str, dict[float | None, Outcome]] = {condition.name: {} for condition in conditions}
    for beta in betas:
        classifier = network.at(beta)
        for condition in conditions:
            outcomes[condition.name][beta] = condition.measure(classifier, images, attacks)
            advance(1)
    return outcomes


def _test(
    network: _SteeredClassifier,
    conditions: Sequence[Condition],
    chosen: Mapping[str, float | None],
    others: Mapping[str, nn.Module],
    images: PixelSet,
    attacks: Sequence[str],
    advance: Callable[[int], object],
) -> dict[str, dict[str, Outcome]]:
    """The outcomes of the plain network, the chosen beta and other classifiers, by condition and method."""
    outcomes: dict[str, dict[str, Outcome]] = {}
    plain = network.steered.plain
    for condition in conditions:
        beta = chosen[condition.name]
        by_method = {"plain": condition.measure(network.at(plain), images, attacks)}
        advance(1)
        if beta != plain:
            by_method["s-ct"] = condition.measure(network.at(beta), images, attacks)
        advance(1)
        for method, other in others.items():
            by_method[method] = condition.measure(other, images, attacks)
            advance(1)
        outcomes[condition.name] = by_method
    return outcomes


def _classes(sets: Mapping[str, PixelSet], config: RobustnessConfig, model: nn.Module, device: torch.device) -> int:
    """The number of classes. ValueError if the network does not take the images, or labels are out of range."""
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


# --- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SteeredClassifier:
    """A steered network. ``at`` sets beta and returns the classifier of pixels at it, whose probe is fitted once."""

    steered: Steered
    at: Callable[[float | None], nn.Module]


@contextmanager
def _steered_classifier(
    model: nn.Module, sets: Mapping[str, PixelSet], config: RobustnessConfig, device: torch.device
) -> Iterator[_SteeredClassifier]:
    pixels = PixelClassifier(model, config.mean, config.std)
    example = pixels.normalised(sets["val"].pixels[:1].to(device))
    point = find_hook_point(model, example, config.feature_layer) if config.head == "probe" else None

    def run() -> Tensor:
        with torch.no_grad():
            return output_tensor(model(example))

    with steered(model, run, config.coeff, config.steering) as network:

        @functools.cache
        def fitted(beta: float | None) -> nn.Module:
            if point is None:
                return pixels
            batches = sets["train"].pixels.split(config.batch_size)
            with point.capture(model) as features:
                values = torch.cat([features(pixels.normalised(batch.to(device))).cpu() for batch in batches])
            probe = fit_probe(values, sets["train"].labels, "logistic", config.l2, config.seed)
            return PixelClassifier(model, config.mean, config.std, probe, point)

        def at(beta: float | None) -> nn.Module:
            network.set_beta(beta)
            return fitted(beta)

        yield _SteeredClassifier(network, at)
