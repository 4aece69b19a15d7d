"""Robustness of a steered network: beta chosen on validation images, the test images seen once."""

from __future__ import annotations

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
from ..stats import preferred
from .attacks import PixelClassifier, check_attacks
from .conditions import Images, Pixels, conditions_of, read_pixels
from .config import RobustnessConfig
from .corruptions import LEAST_SIDE
from .result import Outcome, Robustness, Trial


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
    condition on the validation images* is chosen, the one nearest 1 among equals, if it is better than the plain network
    by more than one standard error (``margin``); then the plain network and the chosen beta are tested under it, once, on
    the same test images.

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
        conditions = conditions_of(config)
        network = stack.enter_context(_steered_classifier(model, sets, config, device))
        candidates, plain = network.steered.candidates(config.grid), network.steered.plain
        trials: dict[str, list[Trial]] = {condition.name: [] for condition in conditions}
        validated: dict[str, list[Sequence[float]]] = {condition.name: [] for condition in conditions}
        heads: dict[float | None, nn.Module] = {}
        seconds: dict[str, float] = {}
        steps = len(candidates) * len(conditions)
        with timed(seconds, "validation"), bar(steps, "validation", progress) as advance:
            for beta in candidates:
                heads[beta] = network.at(beta)
                for condition in conditions:
                    outcome = condition.measure(heads[beta], sets["val"], val_attacks)
                    trials[condition.name].append(Trial(beta, outcome.accuracy, outcome.clean))
                    validated[condition.name].append(outcome.right)
                    advance(1)
        choice = {name: _choice(tried, validated[name], plain, config.margin) for name, tried in trials.items()}
        tested: dict[str, dict[str, Outcome]] = {}
        steps = len(conditions) * (2 + len(others))
        with timed(seconds, "test"), bar(steps, "test", progress) as advance:
            for condition in conditions:
                betas = {"plain": plain, "s-ct": choice[condition.name].beta}
                rows = tested[condition.name] = {}
                for method, beta in betas.items():
                    if method == "plain" or beta != plain:
                        network.steered.set_beta(beta)
                        rows[method] = condition.measure(heads[beta], sets["test"], attacks)
                    advance(1)
                for method, other in others.items():
                    rows[method] = condition.measure(other, sets["test"], attacks)
                    advance(1)
    seconds["total"] = time.perf_counter() - started
    return Robustness(
        conditions=tuple(condition.describe() for condition in conditions),
        validation={name: tuple(tried) for name, tried in trials.items()},
        chosen={name: trial.beta for name, trial in choice.items()},
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


def _choice(trials: Sequence[Trial], right: Sequence[Sequence[float]], plain: float | None, margin: float) -> Trial:
    """The best accuracy under the condition, of equals the beta nearest 1; the plain network if that is within the margin."""
    numbers = range(len(trials))
    best = max(numbers, key=lambda i: (trials[i].accuracy, 2.0 if trials[i].beta is None else trials[i].beta))
    pair = next(i for i in numbers if trials[i].beta == plain), best
    return trials[pair[preferred([right[i] for i in pair], margin)]]


# --- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SteeredClassifier:
    """A steered network; ``at`` sets beta and returns the classifier of pixels that the network then is."""

    steered: Steered
    at: Callable[[float | None], nn.Module]


@contextmanager
def _steered_classifier(
    model: nn.Module, sets: Mapping[str, Images], config: RobustnessConfig, device: torch.device
) -> Iterator[_SteeredClassifier]:
    pixels = PixelClassifier(model, config.mean, config.std)
    example = pixels.normalised(sets["val"].pixels[:1].to(device))
    point = find_hook_point(model, example, config.feature_layer) if config.head == "probe" else None

    def run() -> Tensor:
        with torch.no_grad():
            return output_tensor(model(example))

    with steered(model, run, config.coeff, config.steering) as network:

        def at(beta: float | None) -> nn.Module:
            network.set_beta(beta)
            if point is None:
                return pixels
            batches = sets["train"].pixels.split(config.batch_size)
            with point.capture(model) as features:
                values = torch.cat([features(pixels.normalised(batch.to(device))).cpu() for batch in batches])
            probe = fit_probe(values, sets["train"].labels, "logistic", config.l2, config.seed)
            return PixelClassifier(model, config.mean, config.std, probe, point)

        yield _SteeredClassifier(network, at)
