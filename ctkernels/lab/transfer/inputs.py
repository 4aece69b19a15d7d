"""The networks and data sets of a comparison: checks before any long work, their description, and prepared splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class PreparedSplit:
    """The examples of a seed, prepared for the network, and their labels. The test examples are the same for all seeds."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    labels: dict[str, Tensor]

    def cuts(self, folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """The indices of the training and validation examples of every fold, see :func:`validation_folds`."""
        return validation_folds(self.labels["train"], self.labels["val"], folds, seed)

    def parts(self, cuts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Dataset[Any], Dataset[Any]]]:
        """The training and validation examples of every fold; the first fold's are the data sets themselves."""
        joined: Dataset[Any] = ConcatDataset([self.train, self.val])
        return [
            (self.train, self.val),
            *((Subset(joined, t.tolist()), Subset(joined, v.tolist())) for t, v in cuts[1:]),
        ]


def prepare_split(splits: Splits, options: ImageOptions, seed: int, memory: int, network: nn.Module) -> PreparedSplit:
    """Splits and prepares examples: in advance if they fit into ``memory`` bytes, else whenever they are read."""
    parts = split(splits, options, seed)
    preprocess = parts["train"].preparation(options, network)
    prepared = {name: part.prepared(preprocess) for name, part in parts.items()}
    labels = {name: part.labels for name, part in parts.items()}
    fits = sum(map(len, parts.values())) * preprocess.blank().nbytes <= memory
    return PreparedSplit(**{n: _InMemory(part) if fits else part for n, part in prepared.items()}, labels=labels)


def split(splits: Splits, options: ImageOptions, seed: int) -> dict[str, LabelledSet]:
    """The "train", "val" and "test" examples of a seed; the test examples are the same for all seeds."""
    limits = {"max_train": options.max_train, "max_test": options.max_test}
    parts = splits.complete(val=options.val, test=options.test, seed=seed, test_seed=0, **limits)
    return dict(zip(("train", "val", "test"), parts))


class _InMemory(Dataset[Item]):
    """The prepared examples of a set, in memory."""

    def __init__(self, examples: LabelledSet) -> None:
        self.items, self.collate = [examples[i] for i in range(len(examples))], examples.collate

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def folds_of(splits: Splits, config: TransferConfig, sizes: Mapping[str, int]) -> int:
    """The number of folds: the configured one, else by the number of validation examples.

    Raises:
        ValueError: there are too few examples for so many folds.
    """
    most = (sizes["train"] + sizes["val"]) // sizes["val"]
    if config.folds is None:
        return 1 if splits.val is not None else folds_for(sizes["val"], sizes["train"])
    if config.folds > max(1, most):
        counts = f"{sizes['val']} validation and {sizes['train']} training images"
        raise ValueError(f"folds must be at most {most} for {counts}, got {config.folds}")
    return config.folds


def check_data(name: str, splits: Splits, config: TransferConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Checks a data set and describes it for the result.

    Raises:
        ValueError: a class has too few examples to split, there is only one class, validation or test examples have a
            class without training examples, or examples have NaN.
    """
    try:
        for examples in (splits.train, splits.val, splits.test):
            if examples is not None:
                examples.check()
        digest, sizes = hashlib.sha256(), {}
        for seed in seeds:
            parts = split(splits, config.images, seed)
            check_labels(parts)
            if seed == seeds[0]:  # more seeds may be added later
                sizes = {name: len(part) for name, part in parts.items()}
                for part in parts.values():
                    digest.update(part.labels.numpy().tobytes())
                    digest.update(part.fingerprint(0))
        folds = folds_of(splits, config, sizes)
    except ValueError as error:
        raise ValueError(f"data {name}: {error}") from error
    described = {"source": splits.source, "classes": list(splits.train.classes), "sizes": sizes, "folds": folds}
    return {**described, "digest": digest.hexdigest()[:16]}


def check_model(
    name: str, model: nn.Module, methods: Sequence[Method], data: Mapping[str, Splits], config: TransferConfig
) -> dict[str, Any]:
    """Checks a network and describes it for the result.

    Raises:
        ValueError: the network does not take the examples of a data set, or lacks an activation, or a layer for LoRA, that
            a method needs.
    """
    try:
        with evaluation(model):
            checked: set[Any] = set()
            for splits in data.values():
                example = splits.train.preparation(config.images, model, fitted=False).blank()
                kind = splits.train.KIND, example.shape
                if kind not in checked:
                    _check_methods(model, methods, splits.train.KIND, example, config)
                    checked.add(kind)
    except ValueError as error:
        raise ValueError(f"model {name}: {error}") from error
    return {"class": type(model).__name__, "digest": digest_of(model)}


def _check_methods(
    model: nn.Module, methods: Sequence[Method], kind: str, example: Tensor, config: TransferConfig
) -> None:
    """Attaches every method to the network once, without training."""
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
