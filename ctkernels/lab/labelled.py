"""Sets of labelled examples of any kind, and their stratified, seeded splits."""

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
    """Settings for the preparation of examples, see :class:`ctkernels.lab.transfer.ImageOptions`."""

    @property
    def size(self) -> int: ...
    @property
    def resize(self) -> int | None: ...
    @property
    def normalise(self) -> str: ...
    @property
    def max_tokens(self) -> int: ...


class Preparation(Protocol):
    """Converts one example to the network's input, a tensor without the batch dimension."""

    def __call__(self, raw: Any, /) -> Tensor: ...

    def blank(self) -> Tensor:
        """A batch of one blank example."""
        ...

    def entries(self) -> dict[str, Any]:
        """Plain values from which it can be reconstructed."""
        ...


class LabelledSet(Dataset[Item]):
    """Labelled examples; item ``i`` is the example after ``preprocess``, and its label.

    Each kind of examples is a subclass, a frozen dataclass; code for splitting, training and scoring sees only tensors and
    labels.

    Attributes:
        labels: int64 (n,), each an index into ``classes``.
        classes: names of the classes.
        preprocess: the :class:`Preparation`.
    """

    KIND: ClassVar[str]
    EXAMPLES: ClassVar[str]  # the field that holds the examples
    labels: Tensor
    classes: tuple[str, ...]
    preprocess: Any

    def preparation(self, options: InputOptions, network: nn.Module, fitted: bool = True) -> Preparation:
        """The preparation of examples for a network. ``fitted``: to this set, if it depends on data.

        Raises:
            ValueError: an option does not suit this kind of examples, or the network does not take it.
        """
        raise NotImplementedError

    def check(self) -> None:
        """ValueError for NaN or infinity in examples that are in memory."""

    def fingerprint(self, index: int) -> bytes:
        """The stored content of an example."""
        return self.raw(index).contiguous().numpy().tobytes()

    def collate(self, items: Sequence[Item]) -> Any:
        """Joins examples to a batch, and their labels to int64 (b,)."""
        return default_collate(list(items))

    def __len__(self) -> int:
        return len(self.labels)

    def raw(self, index: int) -> Any:
        """The stored example, before preparation."""
        return getattr(self, self.EXAMPLES)[index]

    def __getitem__(self, index: int) -> Item:
        return self.preprocess(self.raw(index)), int(self.labels[index])

    def take(self: S, indices: Tensor) -> S:
        """The subset at ``indices``, int64, in their order."""
        stored: Any = getattr(self, self.EXAMPLES)  # a list, or an object that can be indexed with a tensor
        taken = [stored[i] for i in indices.tolist()] if isinstance(stored, (list, tuple)) else stored[indices]
        return dataclasses.replace(self, **{self.EXAMPLES: taken, "labels": self.labels[indices]})  # type: ignore[type-var]

    def sample(self: S, limit: int | None, seed: int) -> S:
        """A stratified sample of at most ``limit`` examples; None: all."""
        if limit is None or limit >= len(self):
            return self
        return self.take(stratified_order(self.labels, seed)[:limit].sort().values)

    def prepared(self: S, preprocess: Any) -> S:
        """The same examples with another preparation."""
        return dataclasses.replace(self, preprocess=preprocess)  # type: ignore[type-var]


def collate_of(data: Any) -> Callable[[Sequence[Item]], Any]:
    """The ``collate`` method of a data set, also of one inside a subset or a concatenation; torch's default without one."""
    if isinstance(data, Subset):
        return collate_of(data.dataset)
    if isinstance(data, ConcatDataset):
        return collate_of(data.datasets[0])
    collate: Callable[[Sequence[Item]], Any] = getattr(data, "collate", default_collate)  # type: ignore[arg-type]
    return collate


def batches(data: Dataset[Any], size: int, workers: int = 0, **options: Any) -> DataLoader[Any]:
    """A loader of batches of ``size`` examples and their labels."""
    return DataLoader(data, size, num_workers=workers, collate_fn=collate_of(data), **options)


@dataclass(frozen=True)
class Splits:
    """The training, validation and test examples of a data set (None for a split that it does not have), and its source."""

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
        """Training, validation and test examples; missing splits are cut off the training examples, class by class.

        Args:
            val, test: fractions to cut off, for missing splits.
            seed: of cuts and samples.
            test_seed: of the cut and sample of test examples. Default: ``seed``.
            max_train: maximal number of training examples, before validation examples are cut off.
            max_test: maximal number of test examples.

        Raises:
            ValueError: a fraction or limit is out of range, or a class has too few examples.
        """
        for name, limit in (("max_train", max_train), ("max_test", max_test)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        train, test_set = self.train, self.test
        test_seed = seed if test_seed is None else test_seed
        if test_set is None:
            kept, cut = stratified_split(train.labels, [test], test_seed, "test")
            train, test_set = train.take(kept), train.take(cut)
        train, test_set = train.sample(max_train, seed), test_set.sample(max_test, test_seed)
        if self.val is not None:
            return train, self.val, test_set
        kept, cut = stratified_split(train.labels, [val], seed, "val")
        return train.take(kept), train.take(cut), test_set


def labels_of(dataset: Any, name: str) -> Tensor:
    """The labels of a data set, int64 (n,): its ``labels`` or ``targets`` if it has them, else read from its items."""
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
    """ValueError for examples (n, ...) with NaN or infinity; the message starts with ``what``."""
    count = int((~values.flatten(1).isfinite().all(1)).sum())
    if count:
        raise ValueError(f"{what} must be finite, {count} of {len(values)} have NaN or infinity")


def check_classes(labels: Tensor, name: str) -> None:
    """ValueError unless ``labels`` has at least two classes."""
    classes = labels.unique()
    if len(classes) < 2:
        detail = f"{len(labels)} images, all of class {classes[0].item()}" if len(classes) else "no images"
        raise ValueError(f"{name}: expected at least two classes, got {detail}")


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int, name: str = "data") -> list[Tensor]:
    """Cuts the indices of ``labels`` into one part per fraction and the rest, class by class.

    Args:
        labels: int64 (n,).
        fractions: of all indices, each in (0, 1), with a sum below 1. Every part has at least one image of each class.
        seed: the same seed gives the same parts.

    Returns:
        int64 index tensors, ascending: the rest first, then one per fraction.

    Raises:
        ValueError: a fraction is out of range, or a class has too few images for all parts.

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
        for part, part_members in zip(parts, members.split([len(members) - sum(counts), *counts])):
            part.append(part_members)
    return [torch.cat(part).sort().values for part in parts]


def validation_folds(train: Tensor, val: Tensor, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Folds for cross-validation on the training and validation images.

    The first fold is the given split. Each other validates on a stratified sample of the training images, as large as
    ``val``; the validation parts are disjoint.

    Args:
        train, val: labels, int64 (n,) and (m,).
        count: of folds, at most ``(n + m) // m``.
        seed: of the samples.

    Returns:
        for each fold, indices of its training and of its validation part, int64, into the training images followed by the
        validation images.

    Raises:
        ValueError: ``count`` is out of range.

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
    indices = torch.arange(n + m)
    order = stratified_order(train, seed)
    parts = [indices[n:], *(order[i * m : (i + 1) * m].sort().values for i in range(count - 1))]
    return [(indices[~torch.isin(indices, part)], part) for part in parts]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random order of the indices of ``labels`` in which every contiguous run is stratified.

    The first n are a stratified sample, and the next n another one, disjoint from the first.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero()[:, 0]
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[position.argsort(stable=True)]
