"""The configuration of a transfer comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...cli.option_types import COUNT, FRACTION, PIXELS, SIZE, WORKERS, choice
from ..config import ChoiceConfig, Config
from ..images.sets import Preprocess


@dataclass(frozen=True)
class ImageOptions(Config):
    """Settings for preparing and splitting examples; the paper's by default. Texts and series are split alike.

    Args:
        size: side of the square that the network sees, in pixels.
        resize: shorter side before the centre crop. Default: size * 256 / 224.
        normalise: "target": with the mean and deviation of up to 1000 training images, or of the training series;
            "imagenet": with ImageNet's.
        max_tokens: of a text; what comes after them is not read.
        val: fraction of the training images for validation, where the data has no such split.
        test: fraction of the training images for test, where the data has no such split.
        max_train: the most images for training and for the validation that is cut off them. Default: all.
        max_test: the most images for test. Default: all.
    """

    size: Annotated[int, PIXELS] = 224
    resize: Annotated[int | None, PIXELS] = None
    normalise: Annotated[str, choice("target", "imagenet")] = "target"
    max_tokens: Annotated[int, COUNT] = 128
    val: Annotated[float, FRACTION] = 0.2
    test: Annotated[float, FRACTION] = 0.2
    max_train: Annotated[int | None, COUNT] = None
    max_test: Annotated[int | None, COUNT] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Preprocess(self.size, self.resize)


@dataclass(frozen=True)
class TrainingConfig(Config):
    """The schedule of every method: Adam, the rate rising over the first epoch and a tenth after half of the epochs.

    Args:
        epochs: how many; the one with the best validation accuracy is kept.
        batch_size: images per step, over all processes.

    Source: Curvature Tuning paper, appendix B. Unlike there, the linear probe keeps its best epoch too.
    """

    epochs: Annotated[int, COUNT] = 20
    batch_size: Annotated[int, COUNT] = 32

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """The factor of the learning rates at ``step``, counted from 0."""
        epoch = step // steps_per_epoch
        return min(1.0, (step + 1) / steps_per_epoch) * (0.1 if epoch >= max(1, self.epochs / 2) else 1.0)


@dataclass(frozen=True, kw_only=True)
class TransferConfig(ChoiceConfig):
    """Settings that are alike for all methods of a comparison.

    Args:
        betas: of S-CT: START:STOP:STEP with both ends, or values, in [0, 1]; the plain network always takes part.
        activations, margin: as of :class:`ChoiceConfig`.
        folds: ways to cut training and validation images; every run is trained once on each, its epoch and what
            validation chooses go by all of them, and the first one's weights are kept. Default: one from 200 validation
            images on and for a validation set of the data's own; else as many as validate on 200 images, at most five.
        training: epochs and batch size.
        images: how images are made ready and split.
        bn: batch normalisation. ``"eval"``: the statistics of pretraining, for every method. ``"train"``: of the new
            data, for every method: batch statistics while a network is trained, and for frozen networks the mean over
            the training images, at every beta. ``"paper"``: as its code has it, ``"eval"`` for the frozen networks and
            ``"train"`` for the others.
        precision: accelerate's mixed precision; frozen features are always float32.
        cpu: run on the CPU, even where there is a GPU.
        workers: processes that decode images.
        memory_limit: bytes for prepared images, and again for features, kept at once.
        progress: show a bar on standard error.
    """

    folds: Annotated[int | None, COUNT] = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    images: ImageOptions = field(default_factory=ImageOptions)
    bn: Annotated[str, choice("eval", "train", "paper")] = "eval"
    precision: Annotated[str, choice("no", "bf16", "fp16")] = "no"
    cpu: bool = False
    workers: Annotated[int, WORKERS] = 0
    memory_limit: Annotated[int, SIZE] = 2 << 30
    progress: bool = True
