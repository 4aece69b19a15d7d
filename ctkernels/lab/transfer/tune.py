"""One network, one data set: the best fixed knob first, then learned ones from there, saved as an adapter."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
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
from ..experiment import weights_path
from ..images.sets import Preprocess
from ..labelled import Splits
from ..series import Standardise
from ..stats import preferred, share_error
from ..texts import Tokens
from .compare import compare_transfer
from .config import TransferConfig
from .frozen import recalibrated
from .heads import with_head
from .inputs import draw, split
from .methods import method
from .result import RunResult, TransferComparison, display
from .state import batch_norms, load_state

HIGHEST = 0.99  # the rate of change of a learned beta dies as 1 - beta, so it cannot start nearer to 1
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
        data_name: of the images, in the result.
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
    model: nn.Module | Callable[[], nn.Module],
    data: Splits,
    out: str | PathLike[str],
    config: TuneConfig | None = None,
    *,
    executor: Executor | None = None,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> TransferComparison:
    """Learn a network's curvature on new data (T-CT), starting at the fixed beta that suits it best (S-CT).

    First a linear probe and S-CT, as in :func:`compare_transfer`. Then a beta and a coefficient per channel are learned
    together with a new head, from the beta that validation chose; from :class:`CurvatureConfig`'s default where it chose
    the plain network. The stage with the best validation accuracy is kept, if it beats the simpler ones by more than one
    standard error (``margin``), else the simplest that it does not: as a PEFT adapter in ``out/adapter`` if that is T-CT,
    else as a head in ``out/head.safetensors``. :func:`load_tuned` puts it on the network again. A T-CT below the linear
    probe on validation is warned of.

    Args:
        model: the pretrained network, or a function that builds it.
        data: labelled images.
        out: folder for ``result.json``, ``weights`` and what is kept. A call that was cut short goes on from there.
        config: betas, rates to try, epochs, how images are made ready and so on.
        executor: where training and scoring are done. Default: in this process.
        extra: more entries for the result file.
        options: fields of :class:`TuneConfig`, in place of ``config``'s.

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
        sources, sets = {config.name: model}, {config.data_name: data}
        common: dict[str, Any] = {"methods": tuple(grids), "grids": grids, "seeds": (config.seed,), "out": out}
        common["executor"] = executor
        return compare_transfer(sources, sets, config, extra={**(extra or {}), **entries}, **common)

    sct = compare().tested(config.name, config.data_name, "sct")[0].detail
    plain = sct["beta"] is None or sct["beta"] == 1.0
    start = {} if plain else {"beta": [min(sct["beta"], HIGHEST)], "coeff": [sct["coeff"]]}
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
        built = (model if isinstance(model, nn.Module) else model()).cpu()
        _save_kept(built, data, runs[kept], folder, config)
        train = split(data, config.images, config.seed)["train"]
        preprocess = train.preparation(config.images, built)
        kept_in = {"adapter": "adapter"} if kept == "tct" else {"head": HEAD}
        tuned = {"kept": kept, **kept_in, "classes": list(train.classes), "kind": train.KIND, **preprocess.entries()}
        result.save(folder / "result.json", **(extra or {}), kind="tune", tuned=tuned)
    return result


def _save_kept(model: nn.Module, data: Splits, run: RunResult, folder: Path, config: TuneConfig) -> None:
    """Write what a stage trained on ``model``, in place of what an earlier call kept."""
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
            save_weights(folder / "adapter" / STATISTICS, _statistics(network))
        return
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # of an earlier call, which chose among fewer runs
    save_weights(folder / HEAD, state)
    if config.bn == "train":
        _steer(network, run, config.activations)
        train = draw(data, config.images, config.seed, 0, model).train
        with torch.no_grad(), recalibrated(network, train, network, config.training.batch_size, 0):
            save_weights(folder / STATISTICS, _statistics(network))


def load_tuned(model: nn.Module, folder: str | PathLike[str]) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Put what :func:`tune_curvature` kept in a folder, T-CT, S-CT or a plain head, on a copy of the pretrained network.

    Args:
        model: the network as it was before.
        folder: ``out`` of :func:`tune_curvature`.

    Returns:
        the network in evaluation mode, from a batch of examples to logits (n, classes); what makes an example ready for
        it, such as :class:`~.images.sets.Preprocess`; the classes.

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
    network, head = with_head(model.eval(), preprocess.blank().to(_device(model)), len(classes))
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
    """The stage that is kept: the simplest that no other beats beyond the margin, ``linear``, ``sct`` or ``tct``."""
    runs = _by_stage(result)
    return STAGES[preferred([list(map(int, runs[name].validated)) for name in STAGES], result.setup["margin"])]


def stages(result: TransferComparison) -> str:
    """Each stage's scores as text, and which one is kept."""
    lines = []
    for name, run in _by_stage(result).items():
        how = f", beta = {run.detail['beta']:g}" if run.detail.get("beta") is not None else ""
        lines.append(
            f"{display(name)}{how}: validation {_accuracy(run.validated)} %, test {_accuracy(run.right)} %, "
            f"{run.parameters:,} numbers learned besides the head"
        )
    return "\n".join([*lines, f"validation prefers: {display(kept_stage(result))}, which is kept"])


def _accuracy(right: str) -> str:
    """Percent with a standard error, from a "1" or "0" for every example."""
    share = right.count("1") / len(right)
    return f"{100 * share:.1f} ± {100 * share_error(share, len(right)):.1f}"


def _by_stage(result: TransferComparison) -> dict[str, RunResult]:
    (model,), (data,) = result.models, list(result.setup["data"])
    return {name: result.tested(model, data, name)[0] for name in STAGES}


def _steer(network: nn.Module, run: RunResult, activations: Sequence[str] | None) -> None:
    """Steer as a frozen stage did; nothing for the plain network."""
    beta, coeff = run.detail.get("beta"), run.detail.get("coeff")
    if beta is not None and coeff is not None:
        options: dict[str, Any] = {} if activations is None else {"activations": tuple(activations)}
        steer(network, beta, coeff=coeff, **options)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of batch normalisation by name."""
    names = {id(b): name for name, b in network.named_buffers()}
    return {names[id(b)]: b for module in batch_norms(network) for b in module.buffers()}
