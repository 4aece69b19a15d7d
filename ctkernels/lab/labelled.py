"""Sets of labelled examples of any kind, and how they are split: by class, with a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate

S = TypeVar("S", bound="LabelledSet")
Item = tuple[Tensor, int]


class InputOptions(Protocol):
    """What sets need to know to make examples ready, see :class:`ctkernels.lab.transfer.ImageOptions`."""

    @property
    def size(self) -> int: ...
    @property
    def resize(self) -> int | None: ...
    @property
    def normalise(self) -> str: ...
    @property
    def max_tokens(self) -> int: ...


class Preparation(Protocol):
    """Makes one example ready for a network: a tensor without the batch dimension."""

    def __call__(self, raw: Any, /) -> Tensor: ...

    def blank(self) -> Tensor:
        """A batch of one example that holds nothing in particular."""
        ...

    def entries(self) -> dict[str, Any]:
        """What it takes to make it again, as plain values."""
        ...


class LabelledSet(Dataset[Item]):
    """Labelled examples; item ``i`` is the example made ready by ``preprocess``, and its label.

    A kind of examples is a subclass, a frozen dataclass that says how they are made ready; everything that splits, trains
    and scores sees tensors and labels only.

    Attributes:
        labels: int64 (n,), each an index into ``classes``.
        classes: the names.
        preprocess: the :class:`Preparation`.
    """

    KIND: ClassVar[str]
    EXAMPLES: ClassVar[str]  # the field that holds the examples
    labels: Tensor
    classes: tuple[str, ...]
    preprocess: Any

    def preparation(self, options: InputOptions, network: nn.Module, fitted: bool = True) -> Preparation:
        """What makes examples ready for a network; ``fitted`` to these, where it depends on data.

        Raises:
            ValueError: options that do not fit, or a network that does not take this kind.
        """
        raise NotImplementedError

    def check(self) -> None:
        """ValueError for examples that hold NaN or infinity, as far as that can be seen without reading them."""

    def fingerprint(self, index: int) -> bytes:
        """The content of an example as stored."""
        return self.raw(index).contiguous().numpy().tobytes()

    def collate(self, items: Sequence[Item]) -> Any:
        """A batch of examples and their labels, int64."""
        return default_collate(list(items))

    def __len__(self) -> int:
        return len(self.labels)

    def raw(self, index: int) -> Any:
        """The example as stored."""
        return getattr(self, self.EXAMPLES)[index]

    def __getitem__(self, index: int) -> Item:
        return self.preprocess(self.raw(index)), int(self.labels[index])

    def take(self: S, indices: Tensor) -> S:
        """The examples at ``indices``, int64, in that order."""
        values: Any = getattr(self, self.EXAMPLES)  # a list, or something that takes a tensor of indices
        values = [values[i] for i in indices.tolist()] if isinstance(values, (list, tuple)) else values[indices]
        return dataclasses.replace(self, **{self.EXAMPLES: values, "labels": self.labels[indices]})  # type: ignore[type-var]

    def sample(self: S, limit: int | None, seed: int) -> S:
        """Take at most ``limit`` of the examples, classes in proportion; all of them for None."""
        if limit is None or limit >= len(self):
            return self
        return self.take(stratified_order(self.labels, seed)[:limit].sort().values)

    def prepared(self: S, preprocess: Any) -> S:
        """The same examples with another preparation."""
        return dataclasses.replace(self, preprocess=preprocess)  # type: ignore[type-var]


def collate_of(data: Any) -> Callable[[Sequence[Item]], Any]:
    """How items of a data set become a batch: as its ``collate`` says, also behind subsets and joined sets."""
    if isinstance(data, Subset):
        return collate_of(data.dataset)
    if isinstance(data, ConcatDataset):
        return collate_of(data.datasets[0])
    collate: Callable[[Sequence[Item]], Any] = getattr(data, "collate", default_collate)  # type: ignore[arg-type]
    return collate


def batches(data: Dataset[Any], size: int, workers: int = 0, **options: Any) -> DataLoader[Any]:
    """Batches of ``size`` examples and their labels."""
    return DataLoader(data, size, num_workers=workers, collate_fn=collate_of(data), **options)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples as a data set ships them, ``None`` where it does not, and its ``source``."""

    train: Any  # a LabelledSet; all three of one kind
    val: Any
    test: Any
    source: str

    def complete(
        self,
        *,
        val: float,
        test: float,
        seed: int,
        max_train: int | None = None,
        max_test: int | None = None,
        test_seed: int | None = None,
    ) -> tuple[Any, Any, Any]:
        """Training, validation and test examples; what the data lacks is cut off the training examples, class by class.

        Args:
            val, test: fractions to cut, used only where there is no such split.
            seed: of the cuts and samples.
            test_seed: of those of the test examples. Default: ``seed``.
            max_train: the most examples for training and for the validation that is cut off them.
            max_test: the most examples for test.

        Raises:
            ValueError: a fraction or limit out of range, or too few examples of a class.
        """
        for name, limit in (("max_train", max_train), ("max_test", max_test)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        train, tested = self.train, self.test
        test_seed = seed if test_seed is None else test_seed
        if tested is None:
            rest, part = stratified_split(train.labels, [test], test_seed, "test")
            train, tested = train.take(rest), train.take(part)
        train, tested = train.sample(max_train, seed), tested.sample(max_test, test_seed)
        if self.val is not None:
            return train, self.val, tested
        rest, part = stratified_split(train.labels, [val], seed, "val")
        return train.take(rest), train.take(part), tested


def labels_of(dataset: Any, name: str) -> Tensor:
    """The labels of a data set, int64 (n,): its ``labels`` or ``targets`` if it has them, else item by item."""
    if isinstance(dataset, TensorDataset):
        values: Any = dataset.tensors[1]
    elif isinstance(dataset, Subset):
        return labels_of(dataset.dataset, name)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    else:
        values = next((v for a in ("labels", "targets") if (v := getattr(dataset, a, None)) is not None), None)
        if values is None:
            values = [int(dataset[i][1]) for i in range(len(dataset))]
    labels = torch.as_tensor(values)
    if labels.dim() != 1 or len(labels) != len(dataset) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name}: labels must be {len(dataset)} integers, one per image, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return labels.to(torch.int64)


def check_finite(values: Tensor, what: str) -> None:
    """ValueError for examples (n, ...) with NaN or infinity; ``what`` they are."""
    bad = int((~values.flatten(1).isfinite().all(1)).sum())
    if bad:
        raise ValueError(f"{what} must be finite, {bad} of {len(values)} have NaN or infinity")


def check_classes(labels: Tensor, name: str) -> None:
    """ValueError unless ``labels`` is not empty and has at least two classes."""
    classes = labels.unique()
    if len(classes) < 2:
        detail = f"{len(labels)} images, all of class {classes[0].item()}" if len(classes) else "no images"
        raise ValueError(f"{name}: expected at least two classes, got {detail}")


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int, name: str = "data") -> list[Tensor]:
    """Cut the indices of ``labels`` into a rest and one part per fraction, class by class.

    Args:
        labels: int64 (n,).
        fractions: of the whole, each in (0, 1), with a sum below 1. Every part gets at least one image of each class.
        seed: the same seed gives the same parts.

    Returns:
        int64 index tensors, ascending: the rest first, then one per fraction.

    Raises:
        ValueError: a fraction out of range, or a class too small to give every part an image.

    Examples:
        >>> rest, val = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), [0.25], seed=0)
        >>> len(rest), len(val)
        (6, 2)
    """
    if any(not 0 < f < 1 for f in fractions) or sum(fractions) >= 1:
        raise ValueError(f"{name}: fractions to split off must be in (0, 1) with a sum below 1, got {list(fractions)}")
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        counts = [max(1, round(f * len(members))) for f in fractions]
        if sum(counts) >= len(members):
            raise ValueError(
                f"{name}: class {label.item()} has {len(members)} images, too few to split into {len(parts)} parts "
                f"(fractions {list(fractions)}); expected at least {len(parts)}"
            )
        for part, piece in zip(parts, members.split([len(members) - sum(counts), *counts])):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


def validation_folds(train: Tensor, val: Tensor, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Cut training and validation images into training and validation parts again, in ``count`` ways.

    The first way is the one given. The validation part of each other is a stretch of the training images as large as
    ``val``, classes in proportion; no image is in two of them.

    Args:
        train, val: labels, int64 (n,) and (m,).
        count: at most ``(n + m) // m``.
        seed: of the order of the training images.

    Returns:
        pairs of int64 indices into the training images followed by the validation images.

    Raises:
        ValueError: a count out of range.

    Examples:
        >>> first, second = validation_folds(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), 2, seed=0)
        >>> first[0].tolist(), first[1].tolist(), len(second[0])
        ([0, 1, 2, 3], [4, 5], 4)
    """
    n, m = len(train), len(val)
    if not 1 <= count <= max(1, (n + m) // m):
        raise ValueError(
            f"folds must be from 1 to {max(1, (n + m) // m)} for {n} training and {m} validation, got {count}"
        )
    everything = torch.arange(n + m)
    order = stratified_order(train, seed)
    parts = [everything[n:], *(order[i * m : (i + 1) * m].sort().values for i in range(count - 1))]
    return [(everything[~torch.isin(everything, part)], part) for part in parts]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A seeded order of the indices of ``labels`` in which every stretch has the classes in proportion.

    So the first n are a fair sample of n, and the next n another one that shares no image with it.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero()[:, 0]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[position.argsort(stable=True)]
