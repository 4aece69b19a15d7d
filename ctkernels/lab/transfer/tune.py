"""One network, one data set: the best fixed knob first, then learned ones from there, saved as an adapter."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._extras import require
from ..._files import read_json
from ...steering import steer
from .._weights import read_weights, save_weights
from ..config import configured
from ..experiment import Setting, weights_path
from ..images.sets import Preprocess, Splits, normalised_like
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
HEAD, STATISTICS = "head.safetensors", "statistics.safetensors"


def tune_curvature(
    model: nn.Module | Callable[[], nn.Module],
    data: Splits,
    out: str | PathLike[str],
    config: TransferConfig | None = None,
    *,
    name: str = "model",
    data_name: str = "data",
    seed: int = 42,
    lr: Sequence[float] = (0.1,),
    head_lr: Sequence[float] = (1e-3,),
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> TransferComparison:
    """Learn a network's curvature on new data (T-CT), starting at the fixed beta that suits it best (S-CT).

    First a linear probe and S-CT, as in :func:`compare_transfer`. Then a beta and a coefficient per channel are learned
    together with a new head, from the beta that validation chose; from :class:`CurvatureConfig`'s default where it chose
    the plain network. The stage with the best validation accuracy is kept, of equals the simplest: as a PEFT adapter in
    ``out/adapter`` if that is T-CT, else as a head in ``out/head.safetensors``. :func:`load_tuned` puts it on the network
    again. A T-CT below the linear probe on validation is warned of.

    Args:
        model: the pretrained network, or a function that builds it.
        data: labelled images.
        out: folder for ``result.json``, ``weights`` and what is kept. A call that was cut short goes on from there.
        name, data_name: what they are called in the result.
        seed: of the splits, initial weights and order.
        lr: rates of the curvature to try.
        head_lr: rates of the head to try, for all three stages.
        config: betas, epochs, how images are made ready and so on.
        extra: more entries for the result file.
        options: fields of :class:`TransferConfig`, in place of ``config``'s.

    Raises:
        ValueError, ImportError: as :func:`compare_transfer`.

    Examples:
        >>> options = {"images": ImageOptions(16, 16), "training": TrainingConfig(epochs=1), "progress": False}
        >>> result = tune_curvature(model, load_data("photos/"), "out/tune", betas=[0.9, 1.0], **options)
        >>> network, preprocess, classes = load_tuned(model, "out/tune")

    Source: Curvature Tuning paper, sections 3.3 and 4.1.
    """
    config, folder = configured(TransferConfig, config, options), Path(out)
    head = {"head_lr": list(head_lr)}
    common: dict[str, Any] = {"config": config, "seeds": (seed,), "out": out}
    sources, sets = {name: model}, {data_name: data}
    method("tct").settings({"lr": list(lr), **head})  # refuse bad rates before the first stage
    fixed = compare_transfer(
        sources, sets, methods=("linear", "sct"), grids={"linear": head, "sct": head}, extra=extra, **common
    )
    chosen = fixed.tested(name, data_name, "sct")[0].detail["beta"]
    start = {} if chosen is None or chosen == 1.0 else {"beta": [min(chosen, HIGHEST)]}
    grids = {"linear": head, "sct": head, "tct": {"lr": list(lr), **head, **start}}
    result = compare_transfer(
        sources, sets, methods=("linear", "sct", "tct"), grids=grids, extra={**(extra or {}), "kind": "tune"}, **common
    )
    runs = _by_stage(result)
    kept = kept_stage(result)
    below = runs["linear"].validation["accuracy"] - runs["tct"].validation["accuracy"]
    if below > 0:
        warnings.warn(
            f"T-CT ended {100 * below:.1f} points below the linear probe on validation; {display(kept)} is kept. A lower "
            f"rate (lr, now {runs['tct'].setting['lr']:g}) or more epochs may help",
            stacklevel=2,
        )
    images = config.images
    train = split(data, images, seed)["train"]
    preprocess = Preprocess(images.size, images.resize)
    if images.normalise == "target":
        preprocess = normalised_like(preprocess, train)
    from accelerate import PartialState

    from ...adapters import save_adapter

    if PartialState().is_main_process:
        built = (model if isinstance(model, nn.Module) else model()).cpu()
        run, classes = runs[kept], len(train.classes)
        state = read_weights(weights_path(folder, run))
        for stale in (folder / HEAD, folder / STATISTICS):
            stale.unlink(missing_ok=True)
        if kept == "tct":
            network = _network(built, classes, run.setting, images.size, config)
            load_state(network, state)
            save_adapter(network, folder / "adapter")
            if config.bn != "eval":
                save_weights(folder / "adapter" / STATISTICS, _statistics(network))
        else:
            shutil.rmtree(folder / "adapter", ignore_errors=True)  # of an earlier call, which chose among fewer runs
            save_weights(folder / HEAD, state)
            if config.bn == "train":
                network, _ = with_head(built.eval(), _example(built, images.size), classes)
                _steer(network, run, config.kinds)
                batch = config.training.batch_size
                with torch.no_grad(), recalibrated(network, draw(data, images, seed, 0).train, network, batch, 0):
                    save_weights(folder / STATISTICS, _statistics(network))
        tuned = {
            "kept": kept,
            **({"adapter": "adapter"} if kept == "tct" else {"head": HEAD}),
            "classes": list(train.classes),
            "size": preprocess.size,
            "resize": preprocess.resize,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
        }
        result.save(folder / "result.json", **(extra or {}), kind="tune", tuned=tuned)
    return result


def load_tuned(model: nn.Module, folder: str | PathLike[str]) -> tuple[nn.Module, Preprocess, tuple[str, ...]]:
    """Put what :func:`tune_curvature` kept in a folder, T-CT, S-CT or a plain head, on a copy of the pretrained network.

    Args:
        model: the network as it was before.
        folder: ``out`` of :func:`tune_curvature`.

    Returns:
        the network in evaluation mode, from (n, 3, size, size) to logits (n, classes); what makes an image ready for
        it; the classes.

    Raises:
        ValueError: the folder has no such result, or the network is another one.
    """
    peft = require("peft", "adapters", "loading an adapter")
    from ...adapters import CurvatureConfig  # noqa: F401  (peft knows the method once it is imported)

    path = Path(folder)
    try:
        values = read_json(path / "result.json")
        tuned = values["tuned"]
        if values["schema"] != TransferComparison.SCHEMA:
            raise ValueError(f"schema {values['schema']}")
        classes, kept = tuple(tuned["classes"]), tuned.get("kept", "tct")
        preprocess = Preprocess(tuned["size"], tuned["resize"], tuple(tuned["mean"]), tuple(tuned["std"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold what tune_curvature left, got {error!r}") from None
    network, head = with_head(model.eval(), _example(model, preprocess.size), len(classes))
    statistics = path / STATISTICS
    if kept == "tct":
        adapter = path / tuned["adapter"]
        if not (adapter / "adapter_model.safetensors").is_file():  # else peft asks the hub for it
            raise ValueError(f"{adapter}: expected adapter_model.safetensors, found none")
        read_weights(adapter / "adapter_model.safetensors")
        try:
            network = peft.PeftModel.from_pretrained(network, str(adapter))
        except RuntimeError as error:
            raise ValueError(f"the adapter in {path} does not fit {type(model).__name__}: {error}") from error
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
    """The stage with the best validation accuracy: ``linear``, ``sct`` or ``tct``; of equals the simplest."""
    runs = _by_stage(result)
    return max(STAGES, key=lambda name: runs[name].validation["accuracy"])


def stages(result: TransferComparison) -> str:
    """Each stage's scores as text, and which one is kept."""
    lines = []
    for name, run in _by_stage(result).items():
        how = f", beta = {run.detail['beta']:g}" if run.detail.get("beta") is not None else ""
        lines.append(
            f"{display(name)}{how}: validation {100 * run.validation['accuracy']:.1f} %, "
            f"test {100 * (run.test or 0):.1f} %, {run.parameters:,} numbers learned besides the head"
        )
    return "\n".join([*lines, f"validation prefers: {display(kept_stage(result))}, which is kept"])


def _by_stage(result: TransferComparison) -> dict[str, RunResult]:
    (model,), (data,) = result.models, list(result.setup["data"])
    return {name: result.tested(model, data, name)[0] for name in STAGES}


def _steer(network: nn.Module, run: RunResult, activations: Sequence[str] | None) -> None:
    """Steer as a frozen stage did; nothing for the plain network."""
    beta, coeff = run.detail.get("beta"), run.detail.get("coeff")
    if beta is not None and coeff is not None:
        options: dict[str, Any] = {} if activations is None else {"activations": tuple(activations)}
        steer(network, beta, coeff=coeff, **options)


def _network(model: nn.Module, classes: int, setting: Setting, size: int, config: TransferConfig) -> nn.Module:
    network, head = with_head(model.eval(), _example(model, size), classes)
    attach = method("tct").attach
    assert attach is not None
    return attach(network, head, setting, config.kinds, size).network


def _example(model: nn.Module, size: int) -> torch.Tensor:
    return torch.zeros(1, 3, size, size, device=next(model.parameters()).device)


def _statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of batch normalisation by name."""
    names = {id(b): name for name, b in network.named_buffers()}
    return {names[id(b)]: b for module in batch_norms(network) for b in module.buffers()}
