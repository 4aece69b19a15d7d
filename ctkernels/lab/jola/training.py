"""One training run with transformers' Trainer: validation after every epoch, early stopping, the best epoch kept.

Importing this module needs transformers and accelerate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.integrations import get_available_reporting_integrations

from .._distributed import Group, group
from ..experiment import BetterBy, TrainingLog
from .config import TrainingConfig
from .methods import Attached
from .scoring import Row, answer_loss, collate, training_inputs

MEASURED = 64  # examples for measuring units


class Logs(NamedTuple):
    """Loggers of the Trainer, such as "tensorboard", and the folder for those that write files.

    They get the loss of every step and the validation metrics.
    """

    loggers: Sequence[str] = ()
    folder: Path | None = None


class _Trainer(transformers.Trainer):
    """A Trainer with the loss on answers only, validated by ``validate``."""

    validate: Callable[[], dict[str, float]]
    average: _Average

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = answer_loss(model, inputs)
        return (loss, None) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        model: Any = self.model
        model.eval()
        with self.average.loaded():
            metrics = {f"eval_{name}": value for name, value in self.validate().items()}
            model.train()
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Average(transformers.TrainerCallback):
    """Averages the weights over the last ``share`` of the ``steps`` of each epoch; calls ``advance`` after every step."""

    def __init__(self, attached: Attached, share: float, steps: int, advance: Callable[[int], object]) -> None:
        self.attached, self.steps, self.first = attached, steps, steps - round(share * steps)
        self.advance = advance
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
        if (state.global_step - 1) % self.steps >= self.first:
            weights = {name: value.double() for name, value in self.attached.state().items()}
            self.sums = {name: value + self.sums.get(name, 0) for name, value in weights.items()}
            self.count += 1

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Loads the mean of the epoch, if there is one; restores the weights afterwards, and starts the next mean."""
        if not self.count:
            yield
            return
        weights = self.attached.state()
        self.attached.load({name: (value / self.count).to(weights[name].dtype) for name, value in self.sums.items()})
        self.sums, self.count = {}, 0
        try:
            yield
        finally:
            self.attached.load(weights)


class _BestEpoch(transformers.TrainerCallback):
    """Keeps the weights of the best epoch, and stops after ``patience`` epochs without a better one."""

    def __init__(self, attached: Attached, patience: int, better_by: BetterBy) -> None:
        self.attached, self.patience, self.log = attached, patience, TrainingLog(better_by)
        self.gates = [frame] if (frame := gate_frame(attached.model, 0)) else []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        values = {k.removeprefix("eval_"): v for k, v in metrics.items() if isinstance(v, float)}
        if frame := gate_frame(self.attached.model, state.global_step):
            self.gates.append(frame)
        self.log.add(values, self.attached.state)
        if len(self.log.epochs) - self.log.best >= self.patience:
            control.should_training_stop = True


def gate_frame(model: Any, step: int) -> dict[str, Any] | None:
    """The gates of a JoLA adapter as plain values for JSON; None for other models, and for frozen gates."""
    if not any(".jola_log_alpha_" in name and p.requires_grad for name, p in model.named_parameters()):
        return None
    from ...adapters import gate_map

    return {"step": step, **gate_map(model).to_dict()}


def check_loggers(names: Sequence[str]) -> None:
    """ValueError for a logger that is unknown to the Trainer, or whose package is not installed."""
    installed = sorted(get_available_reporting_integrations())
    if missing := [name for name in names if name not in installed]:
        raise ValueError(f"report_to must be some of the loggers that are installed, {installed}, got {missing}")


def train(
    attached: Attached,
    rows: Sequence[Row],
    pad: int,
    config: TrainingConfig,
    seed: int,
    validate: Callable[[], dict[str, float]],
    better_by: BetterBy,
    advance: Callable[[int], object],
    logs: Logs,
) -> TrainingLog:
    """Trains the parameters of ``attached`` on ``rows``; the model ends with the weights of the best epoch.

    Args:
        pad: the padding token.
        seed: of the order of examples, and of gates.
        validate: returns metrics; called after every epoch in evaluation mode.
        advance: called after every step.

    Returns:
        the log; its details are the gates over training.
    """
    device = next(attached.model.parameters()).device
    processes = group(device)
    processes.check_batch_size(config.batch_size)
    if attached.measure is not None:
        attached.measure(training_inputs(attached.model, rows[:MEASURED], pad, config.batch_size))
    for parameters in attached.groups:
        parameters.setdefault("weight_decay", config.weight_decay)
    optimizer = torch.optim.AdamW(attached.groups, eps=1e-6)
    best = _BestEpoch(attached, config.patience, better_by)
    examples: Any = list(rows)  # all that the Trainer needs of a data set
    steps = -(-len(rows) // config.batch_size)
    average = _Average(attached, config.average, steps, advance)
    writes = logs.folder is not None and logs.loggers
    with nullcontext(str(logs.folder)) if writes else tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(config, logs, folder, steps, seed, device, processes)
        trainer = _Trainer(
            attached.model,
            arguments,
            train_dataset=examples,
            eval_dataset=examples[:1],  # required by the Trainer; `validate` has its own examples
            data_collator=lambda batch: collate(batch, pad),
            callbacks=[*attached.callbacks, average, best],
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.validate, trainer.average = validate, average
        trainer.train()
    attached.load(best.log.state)
    attached.model.eval()
    best.log.details["gates"] = best.gates
    return best.log


def _arguments(
    config: TrainingConfig, logs: Logs, folder: str, steps: int, seed: int, device: torch.device, processes: Group
) -> transformers.TrainingArguments:
    arguments = transformers.TrainingArguments(
        output_dir=folder,  # of TensorBoard's files too, in runs/
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // processes.size,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * steps * config.epochs),
        max_grad_norm=config.clip,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="steps" if logs.loggers else "no",
        logging_steps=1,
        report_to=list(logs.loggers),
        run_name=None if logs.folder is None else logs.folder.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are used with torchrun, not with torch.nn.DataParallel
    return arguments
