"""One training run on transformers' Trainer: validation after every epoch, early stopping, the best epoch kept.

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
from torch.utils.data import Dataset
from transformers.integrations import get_available_reporting_integrations

from ..experiment import BetterBy, TrainingLog
from .config import TrainingConfig
from .methods import Attached
from .scoring import Row, answer_loss, collate, padded, tail_inputs

MEASURED = 64  # examples on which units are measured


class Logs(NamedTuple):
    """Loggers of the Trainer, such as "tensorboard", which get the loss of every step and the validation; and the folder for
    those that write files."""

    loggers: Sequence[str] = ()
    folder: Path | None = None


class _Rows(Dataset[Row]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class _Trainer(transformers.Trainer):
    """The loss on answers only, and our own validation."""

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


class _Steps(transformers.TrainerCallback):
    """Tells of every step."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)


class _Average(transformers.TrainerCallback):
    """The mean of the weights over the last ``share`` of an epoch's ``steps``."""

    def __init__(self, attached: Attached, share: float, steps: int) -> None:
        self.attached, self.steps, self.first = attached, steps, steps - round(share * steps)
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step - 1) % self.steps >= self.first:
            weights = {name: value.double() for name, value in self.attached.state().items()}
            self.sums = {name: value + self.sums.get(name, 0) for name, value in weights.items()}
            self.count += 1

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The model with the epoch's mean, if there is one; afterwards with its own weights, and the next mean begins."""
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
    """Keeps the weights of the best epoch, and stops when there was none better for some epochs."""

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
    """The gates of a JoLA adapter as plain values for JSON; None for another model or frozen gates."""
    if not any(".jola_log_alpha_" in name and p.requires_grad for name, p in model.named_parameters()):
        return None
    from ...adapters import gate_map

    return {"step": step, **gate_map(model).to_dict()}


def check_loggers(names: Sequence[str]) -> None:
    """ValueError for a logger that the Trainer does not know, or whose package is not installed."""
    installed = sorted(get_available_reporting_integrations())
    if missing := [name for name in names if name not in installed]:
        raise ValueError(f"report_to must be some of the loggers that are installed, {installed}, got {missing}")


def train(
    attached: Attached,
    rows: Sequence[Row],
    pad: int,
    budget: TrainingConfig,
    seed: int,
    validate: Callable[[], dict[str, float]],
    better_by: BetterBy,
    advance: Callable[[int], object],
    logs: Logs,
) -> TrainingLog:
    """Train what ``attached`` says on ``rows``; the model ends with the weights of the best epoch.

    Args:
        attached: a model with a method on it.
        rows: prompts and answers as tokens.
        pad: the padding token.
        budget: epochs, batch size and so on.
        seed: of the order of examples, and of gates.
        validate: gives metrics, called after every epoch in evaluation mode.
        better_by: what makes one epoch better than another.
        advance: told of every step.
        logs: loggers, and their folder.

    Returns:
        the log; its details are the gates over training.

    Raises:
        ValueError: the batch size is no multiple of the number of processes.
    """
    if attached.measure is not None:
        attached.measure(training_inputs(attached.model, rows[:MEASURED], pad, budget.batch_size))
    for group in attached.groups:
        group.setdefault("weight_decay", budget.weight_decay)
    optimizer = torch.optim.AdamW(attached.groups, eps=1e-6)
    best = _BestEpoch(attached, budget.patience, better_by)
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if budget.batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {budget.batch_size}")
    steps = -(-len(rows) // budget.batch_size)
    average = _Average(attached, budget.average, steps)
    on_cpu = next(attached.model.parameters()).device.type == "cpu"
    # TensorBoard's files go to runs/ in the Trainer's output folder
    writes = logs.folder is not None and logs.loggers
    with nullcontext(str(logs.folder)) if writes else tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=budget.epochs,
            per_device_train_batch_size=budget.batch_size // processes,
            lr_scheduler_type="cosine",
            warmup_steps=round(budget.warmup * steps * budget.epochs),
            max_grad_norm=budget.clip,
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
            use_cpu=on_cpu,
            ddp_find_unused_parameters=False,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # several GPUs take part through torchrun, not by torch.nn.DataParallel
        trainer = _Trainer(
            attached.model,
            arguments,
            train_dataset=_Rows(rows),
            eval_dataset=_Rows(rows[:1]),  # the Trainer wants one; `evaluate` has its own
            data_collator=lambda some: collate(some, pad),
            callbacks=[*attached.callbacks, _Steps(advance), average, best],
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.validate, trainer.average = validate, average
        trainer.train()
    attached.load(best.log.state)
    attached.model.eval()
    best.log.details["gates"] = best.gates
    return best.log


def training_inputs(model: Any, rows: Sequence[Row], pad: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """The inputs of the model on rows, prompts with their answers, in batches on the CPU."""
    for start in range(0, len(rows), batch_size):
        ids, mask = padded([before + after for before, after in rows[start : start + batch_size]], pad)
        yield tail_inputs(model, ids, mask, 1)
