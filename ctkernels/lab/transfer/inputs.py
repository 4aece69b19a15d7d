"""The networks and data sets of a comparison: checked before any long work, described for the result, made ready."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from ... import steer
from ..._factories import check_takes
from ...steering.activations import RELU_FAMILY
from .._restoring import evaluation
from .._weights import digest_of
from ..images.features import output_tensor
from ..images.inputs import check_labels
from ..labelled import Item, LabelledSet, Splits, validation_folds
from ..stats import folds_for
from .config import ImageOptions, TransferConfig
from .heads import with_head
from .methods import Method

Models = Mapping[str, nn.Module | Callable[[], nn.Module]]


@dataclass(frozen=True)
class Split:
    """One seed's examples, ready for the network, and their labels. The test examples are every seed's."""

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


def draw(splits: Splits, options: ImageOptions, seed: int, memory: int, network: nn.Module) -> Split:
    """Split and prepare; examples are kept prepared if all take at most ``memory`` bytes, else made when read."""
    parts = split(splits, options, seed)
    preprocess = parts["train"].preparation(options, network)
    ready = {name: part.prepared(preprocess) for name, part in parts.items()}
    labels = {name: part.labels for name, part in parts.items()}
    keep = sum(map(len, parts.values())) * preprocess.blank().nbytes <= memory
    return Split(**{name: _Kept(part) if keep else part for name, part in ready.items()}, labels=labels)


def split(splits: Splits, options: ImageOptions, seed: int) -> dict[str, LabelledSet]:
    o = options
    parts = splits.complete(val=o.val, test=o.test, seed=seed, max_train=o.max_train, max_test=o.max_test, test_seed=0)
    return dict(zip(("train", "val", "test"), parts))


class _Kept(Dataset[Item]):
    """The prepared examples of a set, in memory."""

    def __init__(self, examples: LabelledSet) -> None:
        self.items, self.collate = [examples[i] for i in range(len(examples))], examples.collate

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


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
        ValueError: too few examples of a class to split, one class only, a class to predict that was not learnt, NaN.
    """
    try:
        for part in (splits.train, splits.val, splits.test):
            if part is not None:
                part.check()
        digest, sizes = hashlib.sha256(), {}
        for seed in seeds:
            parts = split(splits, config.images, seed)
            check_labels(parts)
            if seed == seeds[0]:  # more seeds may be added later
                sizes = {part: len(images) for part, images in parts.items()}
                for images in parts.values():
                    digest.update(images.labels.numpy().tobytes())
                    digest.update(images.fingerprint(0))
        folds = folds_of(splits, config, sizes)
    except ValueError as error:
        raise ValueError(f"data {name}: {error}") from error
    classes = list(splits.train.classes)
    about = {"source": splits.source, "classes": classes, "sizes": sizes, "folds": folds}
    return {**about, "digest": digest.hexdigest()[:16]}


def check_model(
    name: str, model: nn.Module, methods: Sequence[Method], data: Mapping[str, Splits], config: TransferConfig
) -> dict[str, Any]:
    """Describe a network for the result.

    Raises:
        ValueError: it does not take the examples of a data set, a method needs an activation to treat and it has none, or a
            layer for LoRA.
    """
    try:
        with evaluation(model):
            tried: set[Any] = set()
            for splits in data.values():
                example = splits.train.preparation(config.images, model, fitted=False).blank()
                kind = splits.train.KIND, example.shape
                if kind not in tried:
                    _try(model, methods, splits.train.KIND, example, config)
                    tried.add(kind)
    except ValueError as error:
        raise ValueError(f"model {name}: {error}") from error
    return {"class": type(model).__name__, "digest": digest_of(model)}


def _try(model: nn.Module, methods: Sequence[Method], kind: str, example: Tensor, config: TransferConfig) -> None:
    """Put every method on the network once, with a blank example; nothing is trained."""
    activations = config.activations
    example = example.to(next((p.device for p in model.parameters()), torch.device("cpu")))
    output_tensor(check_takes(model, example, what=kind))
    if any(m.coeff is not None for m in methods):
        with steer(model, 1.0, activations=RELU_FAMILY if activations is None else activations):
            pass
    for method in methods:
        if method.attach is not None:
            network, head = with_head(model, example, classes=2)
            method.attach(network, head, method.settings()[0], activations, example)
