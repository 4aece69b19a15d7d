"""The configuration of a transfer comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..config import check_betas, check_least
from ..images.sets import Preprocess

NORMALISE = ("target", "imagenet")
BN_MODES = ("eval", "train", "paper")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class ImageOptions:
    """Settings for preparing and splitting images; the paper's by default.

    Args:
        size, resize: as of :class:`Preprocess`.
        normalise: "target": with the mean and deviation of the training images; "imagenet": with ImageNet's.
        val, test: fractions to cut off the training images where the data has no such split.
        max_train: the most images for training and for the validation that is cut off them.
        max_test: the most images for test.
    """

    size: int = 224
    resize: int | None = None
    normalise: str = "target"
    val: float = 0.2
    test: float = 0.2
    max_train: int | None = None
    max_test: int | None = None

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISE:
            raise ValueError(f"normalise must be one of {NORMALISE}, got {self.normalise!r}")
        Preprocess(self.size, self.resize)


@dataclass(frozen=True)
class TrainingConfig:
    """The schedule of every method: Adam, the rate rising over the first epoch and a tenth after half of the epochs.

    Args:
        epochs: the one with the best validation accuracy is kept.
        batch_size: images per step, over all processes.

    Source: Curvature Tuning paper, appendix B. Unlike there, the linear probe keeps its best epoch too.
    """

    epochs: int = 20
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_least(self, epochs=1, batch_size=1)

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """The factor of the learning rates at ``step``, counted from 0."""
        epoch = step // steps_per_epoch
        return min(1.0, (step + 1) / steps_per_epoch) * (0.1 if epoch >= max(1, self.epochs / 2) else 1.0)


@dataclass(frozen=True)
class TransferConfig:
    """Settings that are alike for all methods of a comparison.

    Args:
        betas: for S-CT; default 0.70 to 1.00 in steps of 0.01. The plain network always takes part.
        training: epochs and batch size.
        images: how images are made ready and split.
        bn: batch normalisation. ``"eval"``: the statistics of pretraining, for every method. ``"train"``: of the new
            data, for every method: batch statistics while a network is trained, and for frozen networks the mean over
            the training images, at every beta. ``"paper"``: as its code has it, ``"eval"`` for the frozen networks and
            ``"train"`` for the others.
        activations: kinds to treat; default :func:`ctkernels.steer`'s.
        precision: "no", "bf16" or "fp16", accelerate's mixed precision; frozen features are always float32.
        cpu: run on the CPU, even where there is a GPU.
        workers: processes that decode images.
        memory_limit: bytes for prepared images, and again for features, kept at once.
        progress: show a bar on standard error.

    Raises:
        ValueError: a value out of range.
    """

    betas: Iterable[float] | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    images: ImageOptions = field(default_factory=ImageOptions)
    bn: str = "eval"
    activations: Iterable[str] | None = None
    precision: str = "no"
    cpu: bool = False
    workers: int = 0
    memory_limit: int = 2 << 30
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", check_betas(self.betas))
        if self.activations is not None:
            object.__setattr__(self, "activations", tuple(self.activations))
        for name, known in (("bn", BN_MODES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        check_least(self, workers=0, memory_limit=1)

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """``activations``."""
        return None if self.activations is None else tuple(self.activations)

    @property
    def steering(self) -> dict[str, Any]:
        """Options of :func:`ctkernels.steer`."""
        return {} if self.activations is None else {"activations": self.activations}
