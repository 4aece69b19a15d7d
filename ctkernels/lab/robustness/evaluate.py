"""Robustness of a steered network: beta chosen on validation images, the test images seen once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import Steering, steer
from ..._extras import require
from ..._factories import check_takes
from .._progress import bar
from ..betas import check_betas, check_numbers, device_of
from ..images.features import Tap, find_tap, output_tensor
from ..images.probe import check_probe, fit_probe
from ..images.sets import ImageSet, check_classes
from ..search.reading import evaluation
from .attacks import ATTACKS, PixelClassifier, Threat, check_attacks
from .conditions import Images, Pixels, conditions_of, read_pixels
from .corruptions import CORRUPTIONS, LEAST_SIDE, check_corruptions
from .result import Outcome, Robustness, Trial

HEADS = ("probe", "own")
ROBUST_BETAS = tuple(round(0.5 + 0.05 * i, 2) for i in range(11))
LINF, L2 = Threat("linf", 8 / 255), Threat("l2", 0.5)


def check_conditions(threats: Sequence[Threat], corruptions: Sequence[str], severities: Sequence[int]) -> None:
    """Refuse conditions of which there are none, or that cannot be made here.

    Raises:
        ValueError: nothing to test, threats that are alike, corruptions or severities that are not known.
        ImportError: the package that attacks or corrupts is missing; the message names the extra.
    """
    check_corruptions(corruptions, severities)
    if not threats and not (corruptions and severities):
        raise ValueError("threats or corruptions must hold something to test, both are empty")
    if len({str(t) for t in threats}) < len(threats):
        raise ValueError(f"threats must differ, got {[str(t) for t in threats]}")
    if threats:
        require("pyautoattack", "lab", "adversarial attacks")
    if corruptions and severities:
        require("imagecorruptions", "lab", "common corruptions")


def robustness(
    model: nn.Module,
    train: Pixels | None,
    val: Pixels,
    test: Pixels,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    head: str = "probe",
    trained: Mapping[str, nn.Module] | None = None,
    betas: Iterable[float] | None = None,
    coeff: float = 0.5,
    activations: Iterable[str] | None = None,
    feature_layer: str | None = None,
    threats: Sequence[Threat] = (LINF, L2),
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    attacks: Sequence[str] | None = None,
    val_attacks: Sequence[str] | None = ("apgd-ce",),
    iterations: int = 100,
    queries: int = 5000,
    max_attacked: int | None = 1000,
    l2: float = 0.01,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
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
        mean, std: of each channel, subtracted and divided by inside the network. Default: those of ``train``'s (or
            ``val``'s) preprocessing for an :class:`ImageSet`, no normalisation for tensors.
        head: ``"probe"``: a linear probe is fitted on frozen features of ``train`` for every beta, as in S-CT.
            ``"own"``: the network's own output classifies; its classes are the labels.
        trained: further networks to test under every condition, by name, classifying by themselves: a network with
            learned curvature (T-CT), say, or LoRA. They take images normalised alike; one that was trained with another
            normalisation is given as a :class:`PixelClassifier`.
        betas: in [0, 1]. Default 0.50 to 1.00 in steps of 0.05. The plain network always takes part.
        coeff: the mixing coefficient c of the CT unit.
        activations: which kinds to steer; default :func:`ctkernels.steer`'s.
        feature_layer: as in :func:`search_beta`; only for ``head="probe"``.
        threats: norms and bounds, in pixels. Default: 8/255 in the maximum norm, 0.5 in the Euclidean. May be empty.
        corruptions, severities: which; default all fifteen, 1 to 5. Either may be empty: none then.
        attacks: for the test; default AutoAttack's standard ensemble, see :func:`attack`.
        val_attacks: for the choice of beta. Default: APGD on the cross-entropy, a tenth of the cost. None: as default
            of ``attacks``.
        iterations, queries: of the attacks.
        max_attacked: attack at most so many validation, and so many test, images, classes in proportion. The paper: 1000.
        l2: penalty of the logistic probe.
        seed: of samples, probes, attacks and corruptions.
        batch_size: images at once.
        device: where to run; the model is moved there. Default: where it is.
        progress: show a bar on standard error.

    Returns:
        :class:`Robustness`.

    Raises:
        ValueError: before any long work: an argument out of range, pixels outside [0, 1], images the network does not
            take, labels without an output, nothing to test.
        ImportError: pyautoattack, imagecorruptions-imaug or scikit-learn is missing; the message names the extra.

    Example:
        >>> result = robustness(model, train, val, test, betas=[0.8, 0.9, 1.0])  # doctest: +SKIP
        >>> print(result.table(), result.verdict(), sep="\\n")  # doctest: +SKIP

    Source: Curvature Tuning paper, section 4.3. Unlike its code: bounds and clamping are in pixels, beta is not chosen on
    the test images, and images are attacked at the size the network is used at.
    """
    started = time.perf_counter()
    grid = check_betas(ROBUST_BETAS if betas is None else betas)
    check_numbers(coeff=coeff, batch_size=batch_size, workers=0, memory_limit=1)
    check_conditions(threats, corruptions, severities)
    for chosen in (attacks, val_attacks):
        check_attacks(chosen, len(ATTACKS))  # the names; whether there are classes enough is checked below
    if head not in HEADS:
        raise ValueError(f"head must be one of {list(HEADS)}, got {head!r}")
    if (train is None) != (head == "own"):
        raise ValueError(f"train must be {'images' if head == 'probe' else 'None'} for head={head!r}")
    if head == "probe":
        check_probe("logistic", l2)
    if max_attacked is not None and max_attacked < 1:
        raise ValueError(f"max_attacked must be at least 1, got {max_attacked}")
    sets = {
        name: read_pixels(data, name)
        for name, data in (("train", train), ("val", val), ("test", test))
        if data is not None
    }
    if corruptions and severities and min(sets["test"].pixels.shape[2:]) < LEAST_SIDE:
        size = " x ".join(map(str, sets["test"].pixels.shape[2:]))
        raise ValueError(f"corruptions need images of at least {LEAST_SIDE} x {LEAST_SIDE} pixels, got {size}")
    if mean is None and isinstance(source := train if train is not None else val, ImageSet):
        mean, std = source.preprocess.mean, source.preprocess.std
    place = device_of(model, device)
    kinds = {} if activations is None else {"activations": tuple(activations)}
    seconds = dict.fromkeys(("validation", "test"), 0.0)
    others = {name: network.to(place) for name, network in (trained or {}).items()}
    with ExitStack() as stack:
        for network in (model.to(place), *others.values()):
            stack.enter_context(evaluation(network))
        classes = _classes(sets, head, model, mean, std, place)
        for chosen in (attacks, val_attacks):
            check_attacks(chosen, classes)
        conditions = conditions_of(
            threats, corruptions, severities, iterations, queries, batch_size, seed, max_attacked
        )
        with _knob(model, sets, head, mean, std, coeff, kinds, feature_layer, l2, seed, place, batch_size) as knob:
            candidates: list[float | None] = [*sorted(grid | {1.0})] if knob.plain_is_beta_1 else [None, *sorted(grid)]
            plain: float | None = 1.0 if knob.plain_is_beta_1 else None
            found: dict[str, list[Trial]] = {condition.name: [] for condition in conditions}
            heads: dict[float | None, nn.Module] = {}
            begun = time.perf_counter()
            with bar(len(candidates) * len(conditions), "validation", progress) as advance:
                for beta in candidates:
                    heads[beta] = knob.classifier(beta)
                    for condition in conditions:
                        outcome = condition.measure(heads[beta], sets["val"], val_attacks)
                        found[condition.name].append(Trial(beta, outcome.accuracy, outcome.clean))
                        advance(1)
            seconds["validation"] = time.perf_counter() - begun
            begun = time.perf_counter()
            tested: dict[str, dict[str, Outcome]] = {}
            choice = {name: _best(trials) for name, trials in found.items()}
            with bar(len(conditions) * (2 + len(others)), "test", progress) as advance:
                for condition in conditions:
                    knob.turn(plain)
                    rows = {"plain": condition.measure(heads[plain], sets["test"], attacks)}
                    beta = choice[condition.name].beta
                    if beta != plain:
                        knob.turn(beta)
                        rows["s-ct"] = condition.measure(heads[beta], sets["test"], attacks)
                    advance(2)
                    for name, network in others.items():
                        own = network if isinstance(network, PixelClassifier) else PixelClassifier(network, mean, std)
                        rows[name] = condition.measure(own, sets["test"], attacks)
                        advance(1)
                    tested[condition.name] = rows
            seconds["test"] = time.perf_counter() - begun
        sites, missed, plain_is_beta_1 = knob.sites, knob.missed, knob.plain_is_beta_1
    seconds["total"] = time.perf_counter() - started
    return Robustness(
        conditions=tuple(condition.describe() for condition in conditions),
        validation={name: tuple(trials) for name, trials in found.items()},
        chosen={name: trial.beta for name, trial in choice.items()},
        test=tested,
        plain_is_beta_1=plain_is_beta_1,
        sites=sites,
        missed=missed,
        sizes={**{name: len(data.labels) for name, data in sets.items()}, "classes": classes},
        arguments={
            "betas": sorted(grid),
            "coeff": coeff,
            "activations": None if activations is None else list(kinds["activations"]),
            "feature_layer": feature_layer,
            "head": head,
            "attacks": list(check_attacks(attacks, classes)),
            "val_attacks": list(check_attacks(val_attacks, classes)),
            "iterations": iterations,
            "queries": queries,
            "max_attacked": max_attacked,
            "mean": None if mean is None else list(mean),
            "std": None if std is None else list(std),
            "l2": l2,
            "seed": seed,
            "batch_size": batch_size,
            "device": str(place),
        },
        seconds=seconds,
    )


def _classes(
    sets: Mapping[str, Images],
    head: str,
    model: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    place: torch.device,
) -> int:
    """How many classes there are; ValueError unless the network takes the images and the labels fit."""
    example = sets["val"].pixels[:1].to(place)
    classifier = PixelClassifier(model, mean, std)
    outputs = check_takes(classifier, example, what="val: images", name=type(model).__name__).shape
    if head == "probe":
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
    """A steered network: ``turn`` sets beta, ``classifier`` sets it and gives a classifier of pixels at it."""

    turn: Callable[[float | None], None]
    classifier: Callable[[float | None], nn.Module]
    sites: tuple[str, ...]
    missed: tuple[str, ...]
    plain_is_beta_1: bool


@contextmanager
def _knob(
    model: nn.Module,
    sets: Mapping[str, Images],
    head: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    coeff: float,
    kinds: dict[str, Any],
    feature_layer: str | None,
    l2: float,
    seed: int,
    place: torch.device,
    batch_size: int,
) -> Iterator[_Knob]:
    pixels = PixelClassifier(model, mean, std)

    def normalised(images: Tensor) -> Tensor:
        images = images.to(place)
        images = images.expand(-1, pixels.channels, -1, -1) if pixels.channels and images.shape[1] == 1 else images
        return (images - pixels.mean) / pixels.std

    example = normalised(sets["val"].pixels[:1])
    tap: Tap | None = find_tap(model, example, feature_layer) if head == "probe" else None
    with torch.no_grad():
        as_is = output_tensor(model(example))
    with steer(model, 1.0, coeff=coeff, **kinds) as handle:
        with torch.no_grad():
            at_one = output_tensor(model(example))
        same = torch.allclose(at_one, as_is, rtol=1e-4, atol=1e-5 * float(as_is.abs().max()))

        def turn(beta: float | None) -> None:
            _turn(handle, beta, coeff)

        def classifier(beta: float | None) -> nn.Module:
            turn(beta)
            if tap is None:
                return pixels
            with tap.capture(model) as features:
                found = torch.cat(
                    [features(normalised(batch)).cpu() for batch in sets["train"].pixels.split(batch_size)]
                )
            probe = fit_probe(found, sets["train"].labels, "logistic", l2, seed)
            return PixelClassifier(model, mean, std, probe, tap)

        yield _Knob(
            turn,
            classifier,
            tuple(site.name for site in handle.sites),
            tuple(f"{miss.name} ({miss.activation}): {miss.reason}" for miss in handle.missed),
            same,
        )


def _turn(handle: Steering, beta: float | None, coeff: float) -> None:
    if beta is None:
        handle.neutralize()
    else:
        handle.coeff, handle.beta = coeff, beta
