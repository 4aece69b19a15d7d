"""The configuration of a comparison on texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch

from ...cli.option_types import COUNT, MARGIN, PATTERN, SHARE, choice
from ..config import Config

SCHEDULES = ("constant", "linear", "cyclic", "exponential")


@dataclass(frozen=True)
class TrainingConfig(Config):
    """The schedule of every method.

    Args:
        epochs: maximal number of epochs.
        patience: epochs without a better validation score after which training stops.
        batch_size: examples per step, over all processes.
        warmup: part of the steps in which the rate rises; afterwards it falls along a cosine.
        weight_decay: of trained parameters except gates.
        clip: maximal norm of the gradients of a step; 0: no clipping.
        average: part of the steps of each epoch, at its end, over which weights are averaged for validation and for the
            result; training continues with the weights themselves. 0: no averaging.
    """

    epochs: Annotated[int, COUNT] = 10
    patience: Annotated[int, COUNT] = 2
    batch_size: Annotated[int, COUNT] = 10
    warmup: Annotated[float, SHARE] = 0.1
    weight_decay: float = 0.0
    clip: Annotated[float, MARGIN] = 1.0
    average: Annotated[float, SHARE] = 0.0


@dataclass(frozen=True)
class Answering(Config):
    """Settings for tokenisation and scoring of answers.

    Args:
        separator: put between prompt and answer, unless the one ends or the other begins with white space.
        max_length: tokens of a prompt with its answer; longer prompts lose their beginning. As in JoLA by default.
        max_new_tokens: maximal number of generated tokens, without choices. As in JoLA by default (64 for long answers).
        beams: of beam search; 1 is greedy. The released JoLA code takes 4.
        extract: regular expression that finds the answer in generated text, see :func:`metrics.extracted`. Default: all
            of the text.
        batch_size: prompts per forward pass when scoring.
        bertscore_model, bertscore_layer: for BERTScore, see :func:`metrics.bert_scores`. Default: no BERTScore.
    """

    separator: str = " "
    max_length: Annotated[int, COUNT] = 400
    max_new_tokens: Annotated[int, COUNT] = 16
    beams: Annotated[int, COUNT] = 1
    extract: Annotated[str | None, PATTERN] = None
    batch_size: Annotated[int, COUNT] = 16
    bertscore_model: str | None = None
    bertscore_layer: Annotated[int | None, COUNT] = None


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(Config):
    """Settings that all methods of a comparison on texts share.

    Args:
        train: training examples, see :func:`draw`.
        val: validation examples.
        test: the most test examples. None: all, where the data has its own.
        training: epochs, patience, batch size.
        answering: tokenisation and scoring of answers.
        schedule: of the penalty on JoLA's gates.
        choose_on: number of seeds on which settings are chosen, by the mean of their validation scores.
        name: of the model, for the result.
        device: where to run; the model is moved there. Default: where it is.
        report_to: loggers of the Trainer, such as "tensorboard", which writes to ``out/logs``. Default: none.
        progress: show a bar on standard error.
    """

    train: Annotated[int, COUNT] = 200
    val: Annotated[int, COUNT] = 100
    test: Annotated[int | None, COUNT] = 300
    training: TrainingConfig = field(default_factory=TrainingConfig)
    answering: Answering = field(default_factory=Answering)
    schedule: Annotated[str, choice(*SCHEDULES)] = "exponential"
    choose_on: Annotated[int, COUNT] = 1
    name: str = ""
    device: torch.device | str | None = None
    report_to: Sequence[str] = ()
    progress: bool = True
