"""The configuration of a transfer comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ...cli.option_types import COUNT, FRACTION, PIXELS, SIZE, WORKERS, choice
from ..config import ChoiceConfig, Config
from ..images.sets import Preprocess


@dataclass(frozen=True)
class ImageOptions(Config):
    """Settings for the preparation and splits of examples (images, texts or series); the paper's by default.

    Args:
        size: side of the square that the network sees, in pixels.
        resize: shorter side before the centre crop. Default: size * 256 / 224.
        normalise: "target": with the mean and deviation of up to 1000 training images, or of the training series;
            "imagenet": with ImageNet's.
        max_tokens: of a text; longer ones are truncated.
        val: fraction of the training examples for validation, if the data has no such split.
        test: fraction of the training examples for test, if the data has no such split.
        max_train: maximal number of training examples, before validation examples are cut off. Default: all.
        max_test: maximal number of test examples. Default: all.
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
    """The schedule of every method: Adam, with warm-up over the first epoch and a tenth of the rate after half of them.

    Args:
        epochs: number of epochs; the one with the best validation accuracy is kept.
        batch_size: examples per step, over all processes.

    Source: Curvature Tuning paper, appendix B. Unlike there, the linear probe also keeps its best epoch.
    """

    epochs: Annotated[int, COUNT] = 20
    batch_size: Annotated[int, COUNT] = 32

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """The factor of the learning rates at ``step``, counted from 0."""
        epoch = step // steps_per_epoch
        return min(1.0, (step + 1) / steps_per_epoch) * (0.1 if epoch >= max(1, self.epochs / 2) else 1.0)


@dataclass(frozen=True, kw_only=True)
class TransferConfig(ChoiceConfig):
    """Settings that all methods of a comparison share.

    Args:
        betas: of S-CT: START:STOP:STEP with both ends, or values, in [0, 1]; the plain network always takes part.
        activations, margin: as of :class:`ChoiceConfig`.
        folds: number of folds of training and validation examples; every run is trained on each, epochs and settings are
            chosen on all of them, and the weights of the first are kept. Default: one if there are 200 or more validation
            examples, or a validation split; else as many as validate on 200 examples, at most five.
        training: epochs and batch size.
        images: preparation and splits of examples.
        bn: statistics of batch normalisation. ``"eval"``: those of pretraining, for every method. ``"train"``: those of
            the new data: batch statistics in training, and for frozen networks the mean over the training examples, at
            every beta. ``"paper"``: as in its code, ``"eval"`` for frozen networks and ``"train"`` for the others.
        precision: accelerate's mixed precision; frozen features are always float32.
        cpu: run on the CPU, even if there is a GPU.
        workers: processes that decode images.
        memory_limit: bytes for prepared images, and the same again for features, kept at once.
        progress: show a progress bar on standard error.
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
