"""The networks and data sets of a comparison: checked before any long work, described for the result, made ready."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from ... import steer
from ..._factories import check_takes
from ...steering.activations import RELU_FAMILY
from .._restoring import evaluation
from .._weights import digest_of
from ..images.features import output_tensor
from ..images.inputs import check_labels
from ..images.sets import ImageSet, Preprocess, Splits, normalised_like, validation_folds
from ..stats import folds_for
from .config import ImageOptions, TransferConfig
from .heads import with_head
from .methods import Method

Models = Mapping[str, nn.Module | Callable[[], nn.Module]]


@dataclass(frozen=True)
class Split:
    """One seed's images, ready for the network, and their labels. The test images are every seed's."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    labels: dict[str, Tensor]

    def cuts(self, folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Numbers of the training and of the validation images of every fold, see :func:`validation_folds`."""
        return validation_folds(self.labels["train"], self.labels["val"], folds, seed)

    def parts(self, cuts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Dataset[Any], Dataset[Any]]]:
        """Training and validation images of every fold; those of the first are the data sets themselves."""
        everything: Dataset[Any] = ConcatDataset([self.train, self.val])
        others = [tuple(Subset(everything, part.tolist()) for part in cut) for cut in cuts[1:]]
        return [(self.train, self.val), *((train, val) for train, val in others)]


def draw(splits: Splits, options: ImageOptions, seed: int, memory: int) -> Split:
    """Split and prepare; images are kept prepared if all take at most ``memory`` bytes, else made when read."""
    parts = split(splits, options, seed)
    preprocess = Preprocess(options.size, options.resize)
    if options.normalise == "target":
        preprocess = normalised_like(preprocess, parts["train"])
    ready = {name: part.prepared(preprocess) for name, part in parts.items()}
    labels = {name: part.labels for name, part in parts.items()}
    keep = sum(map(len, parts.values())) * 3 * 4 * options.size**2 <= memory
    images = {name: _kept(part) if keep else part for name, part in ready.items()}
    return Split(**images, labels=labels)


def split(splits: Splits, options: ImageOptions, seed: int) -> dict[str, ImageSet]:
    o = options
    parts = splits.complete(val=o.val, test=o.test, seed=seed, max_train=o.max_train, max_test=o.max_test, test_seed=0)
    return dict(zip(("train", "val", "test"), parts))


def _kept(images: ImageSet) -> TensorDataset:
    return TensorDataset(torch.stack([images[i][0] for i in range(len(images))]), images.labels)


def folds_of(splits: Splits, config: TransferConfig, sizes: Mapping[str, int]) -> int:
    """How many folds to validate on: what was asked for, else by the number of validation images.

    Raises:
        ValueError: more than there are images for.
    """
    most = (sizes["train"] + sizes["val"]) // sizes["val"]
    if config.folds is None:
        return 1 if splits.val is not None else folds_for(sizes["val"], sizes["train"])
    if config.folds > max(1, most):
        counts = f"{sizes['val']} validation and {sizes['train']} training images"
        raise ValueError(f"folds must be at most {most} for {counts}, got {config.folds}")
    return config.folds


def check_data(name: str, splits: Splits, config: TransferConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Describe a data set for the result.

    Raises:
        ValueError: too few images of a class to split, one class only, a class to predict that was not learnt, NaN.
    """
    try:
        for part in (splits.train, splits.val, splits.test):
            images = None if part is None else part.images
            if isinstance(images, Tensor) and images.is_floating_point():
                bad = int((~images.flatten(1).isfinite().all(1)).sum())
                if bad:
                    raise ValueError(f"images must be finite, {bad} of {len(images)} have NaN or infinity")
        digest, sizes = hashlib.sha256(), {}
        for seed in seeds:
            parts = split(splits, config.images, seed)
            check_labels(parts)
            if seed == seeds[0]:  # more seeds may be added later
                sizes = {part: len(images) for part, images in parts.items()}
                for images in parts.values():
                    digest.update(images.labels.numpy().tobytes())
                    digest.update(images.raw(0).contiguous().numpy().tobytes())
        folds = folds_of(splits, config, sizes)
    except ValueError as error:
        raise ValueError(f"data {name}: {error}") from error
    classes = list(splits.train.classes)
    about = {"source": splits.source, "classes": classes, "sizes": sizes, "folds": folds}
    return {**about, "digest": digest.hexdigest()[:16]}


def check_model(
    name: str, model: nn.Module, methods: Sequence[Method], size: int, activations: Sequence[str] | None
) -> dict[str, Any]:
    """Describe a network for the result.

    Raises:
        ValueError: it takes no images of this size, a method needs an activation to treat and it has none, or a layer
            for LoRA.
    """
    try:
        with evaluation(model):
            _try(model, methods, size, activations)
    except ValueError as error:
        raise ValueError(f"model {name}: {error}") from error
    return {"class": type(model).__name__, "digest": digest_of(model)}


def _try(model: nn.Module, methods: Sequence[Method], size: int, activations: Sequence[str] | None) -> None:
    """Put every method on the network once, with a blank image; nothing is trained."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = torch.zeros(1, 3, size, size, device=device)
    output_tensor(check_takes(model, example, what="images"))
    if any(m.coeff is not None for m in methods):
        with steer(model, 1.0, activations=RELU_FAMILY if activations is None else activations):
            pass
    for method in methods:
        if method.attach is not None:
            network, head = with_head(model, example, classes=2)
            method.attach(network, head, method.settings()[0], activations, size)
