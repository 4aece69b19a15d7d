"""Learns the curvature of one network on one data set: a fixed beta first, then learned ones, saved as an adapter."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from ..._files import read_json
from ...cli.option_types import RATES, SEED
from ...steering import steer
from .._weights import load_adapter, read_weights, save_weights
from ..config import configured
from ..executor import Executor
from ..experiment import Source, build, weights_path
from ..images.sets import Preprocess
from ..labelled import Splits
from ..series import Standardise
from ..stats import accuracy, preferred, scores_of, share_error
from ..texts import Tokens
from .compare import compare_transfer
from .config import TransferConfig
from .frozen import recalibrated
from .heads import with_head
from .inputs import prepare_split, split
from .methods import method
from .result import RunResult, TransferComparison, display
from .state import load_state, statistics_of

HIGHEST = 0.99  # a learned beta starts no higher, as its gradient vanishes with 1 - beta
STAGES = ("linear", "sct", "tct")
PREPARATIONS: dict[str, Any] = {"images": Preprocess, "series": Standardise, "texts": Tokens}
HEAD, STATISTICS = "head.safetensors", "statistics.safetensors"


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TransferConfig):
    """The configuration of :func:`tune_curvature`.

    Args:
        betas, activations, margin, folds, training, images, bn, precision, cpu, workers, memory_limit, progress: as of
            :class:`TransferConfig`.
        name: of the network, in the result.
        data_name: of the data, in the result.
        seed: of splits, initial weights and order.
        lr: rates of beta and coeff, to try.
        head_lr: rates of the head, to try, for all three stages.
    """

    name: str = "model"
    data_name: str = "data"
    seed: Annotated[int, SEED] = 42
    lr: Annotated[Sequence[float] | str, RATES] = (0.1,)
    head_lr: Annotated[Sequence[float] | str, RATES] = (1e-3,)


def tune_curvature(
    model: Source,
    data: Splits,
    out: str | PathLike[str],
    config: TuneConfig | None = None,
    *,
    executor: Executor | None = None,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> TransferComparison:
    """Learns a network's curvature on new data (T-CT), starting at the best fixed beta (S-CT).

    A linear probe and S-CT come first, as in :func:`compare_transfer`. Then a beta and a coefficient per channel are learned
    together with a new head, starting at the beta that validation chose, or at the default of :class:`CurvatureConfig` if
    it chose the plain network. The simplest stage that no other beats in validation by more than one standard error
    (``margin``) is kept: T-CT as a PEFT adapter in ``out/adapter``, the others as a head in ``out/head.safetensors``.
    :func:`load_tuned` loads it. A warning is given if T-CT is below the linear probe in validation.

    Args:
        model: the pretrained network, or a function that builds it.
        data: labelled examples.
        out: folder for ``result.json``, ``weights`` and the kept stage. A call that was interrupted resumes from there.
        config: betas, rates to try, epochs, preparation of examples and so on.
        executor: of training and testing. Default: this process.
        extra: further entries of the result file.
        options: fields of :class:`TuneConfig`, which replace those of ``config``.

    Raises:
        ValueError, ImportError: as :func:`compare_transfer`.

    Examples:
        >>> options = {"images": ImageOptions(16, 16), "training": TrainingConfig(epochs=1), "progress": False}
        >>> result = tune_curvature(model, load_data("photos/"), "out/tune", betas=[0.9, 1.0], **options)
        >>> network, preprocess, classes = load_tuned(model, "out/tune")

    Source: Curvature Tuning paper, sections 3.3 and 4.1.
    """
    config, folder = configured(TuneConfig, config, options), Path(out)
    head = {"head_lr": list(config.head_lr)}
    grids: dict[str, Any] = {"linear": head, "sct": head}

    def compare(**entries: Any) -> TransferComparison:
        return compare_transfer(
            {config.name: model},
            {config.data_name: data},
            config,
            methods=tuple(grids),
            grids=grids,
            seeds=(config.seed,),
            out=out,
            executor=executor,
            extra={**(extra or {}), **entries},
        )

    sct = compare().tested(config.name, config.data_name, "sct")[0].detail
    kept_plain = sct["beta"] is None or sct["beta"] == 1.0
    start = {} if kept_plain else {"beta": [min(sct["beta"], HIGHEST)], "coeff": [sct["coeff"]]}
    grids["tct"] = {"lr": list(config.lr), **head, **start}
    result = compare(kind="tune")
    runs, kept = _by_stage(result), kept_stage(result)
    below = runs["linear"].validation["accuracy"] - runs["tct"].validation["accuracy"]
    if below > 0:
        warnings.warn(
            f"T-CT ended {100 * below:.1f} points below the linear probe on validation; {display(kept)} is kept. A lower "
            f"rate (lr, now {runs['tct'].setting['lr']:g}) or more epochs may help",
            stacklevel=2,
        )
    from accelerate import PartialState

    if PartialState().is_main_process:
        network = build(model).cpu()
        _save_kept(network, data, runs[kept], folder, config)
        train = split(data, config.images, config.seed)["train"]
        preprocess = train.preparation(config.images, network)
        files = {"adapter": "adapter"} if kept == "tct" else {"head": HEAD}
        tuned = {"kept": kept, **files, "classes": list(train.classes), "kind": train.KIND, **preprocess.entries()}
        result.save(folder / "result.json", **(extra or {}), kind="tune", tuned=tuned)
    return result


def _save_kept(model: nn.Module, data: Splits, run: RunResult, folder: Path, config: TuneConfig) -> None:
    """Saves the trained state of the kept stage, and deletes that of an earlier call."""
    state, classes = read_weights(weights_path(folder, run)), len(data.train.classes)
    example = data.train.preparation(config.images, model, fitted=False).blank()
    for stale in (folder / HEAD, folder / STATISTICS):
        stale.unlink(missing_ok=True)
    network, head = with_head(model.eval(), example, classes)
    if run.method == "tct":
        from ... import adapters

        attach = method("tct").attach
        assert attach is not None
        network = attach(network, head, run.setting, config.activations, example).network
        load_state(network, state)
        adapters.save_adapter(network, folder / "adapter")
        if config.bn != "eval":
            save_weights(folder / "adapter" / STATISTICS, statistics_of(network))
        return
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    save_weights(folder / HEAD, state)
    if config.bn == "train":
        _steer(network, run, config.activations)
        train = prepare_split(data, config.images, config.seed, 0, model).train
        with torch.no_grad(), recalibrated(network, train, network, config.training.batch_size, 0):
            save_weights(folder / STATISTICS, statistics_of(network))


def load_tuned(model: nn.Module, folder: str | PathLike[str]) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Loads the stage that :func:`tune_curvature` kept (T-CT, S-CT or a plain head) into a copy of the pretrained network.

    Args:
        model: the pretrained network.
        folder: ``out`` of :func:`tune_curvature`.

    Returns:
        the network in evaluation mode, which maps a batch of examples to logits (n, classes); the preparation of its
        examples, such as :class:`~.images.sets.Preprocess`; the classes.

    Raises:
        ValueError: the folder has no such result, or the network is another one.
    """
    path = Path(folder)
    try:
        values = read_json(path / "result.json")
        tuned = values["tuned"]
        if values["schema"] != TransferComparison.SCHEMA:
            raise ValueError(f"schema {values['schema']}")
        classes, kept = tuple(tuned["classes"]), tuned.get("kept", "tct")
        preprocess = PREPARATIONS[tuned.get("kind", "images")].restored(tuned, model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold what tune_curvature left, got {error!r}") from None
    device = next(model.parameters()).device
    network, head = with_head(model.eval(), preprocess.blank().to(device), len(classes))
    statistics = path / STATISTICS
    if kept == "tct":
        adapter = path / tuned["adapter"]
        network = load_adapter(network, adapter, str(path))
        statistics = adapter / STATISTICS
    else:
        result = TransferComparison.read(path / "result.json")
        _steer(network, _by_stage(result)[kept], result.setup["activations"])
        try:
            network.get_submodule(head).load_state_dict(read_weights(path / tuned["head"]))
        except RuntimeError as error:
            raise ValueError(f"the head in {path} does not fit {type(model).__name__}: {error}") from error
    if statistics.is_file():
        load_state(network, read_weights(statistics))
    return network.eval(), preprocess, classes


def kept_stage(result: TransferComparison) -> str:
    """The kept stage (``linear``, ``sct`` or ``tct``): the simplest that no other beats beyond the margin."""
    runs = _by_stage(result)
    return STAGES[preferred([scores_of(runs[name].validated) for name in STAGES], result.setup["margin"])]


def stages(result: TransferComparison) -> str:
    """The scores of each stage, and the kept one, as text."""
    lines = []
    for name, run in _by_stage(result).items():
        beta = f", beta = {run.detail['beta']:g}" if run.detail.get("beta") is not None else ""
        lines.append(
            f"{display(name)}{beta}: validation {_accuracy(run.validated)} %, test {_accuracy(run.right)} %, "
            f"{run.parameters:,} numbers learned besides the head"
        )
    return "\n".join([*lines, f"validation prefers: {display(kept_stage(result))}, which is kept"])


def _accuracy(marks: str) -> str:
    """The accuracy in percent, with its standard error."""
    share = accuracy(marks)
    return f"{100 * share:.1f} ± {100 * share_error(share, len(marks)):.1f}"


def _by_stage(result: TransferComparison) -> dict[str, RunResult]:
    (model,), (data,) = result.models, list(result.setup["data"])
    return {name: result.tested(model, data, name)[0] for name in STAGES}


def _steer(network: nn.Module, run: RunResult, activations: Sequence[str] | None) -> None:
    """Steers the network as in a frozen stage."""
    beta, coeff = run.detail.get("beta"), run.detail.get("coeff")
    if beta is not None and coeff is not None:
        options: dict[str, Any] = {} if activations is None else {"activations": tuple(activations)}
        steer(network, beta, coeff=coeff, **options)
