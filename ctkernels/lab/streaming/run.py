"""Learns tasks one after the other: an adapter for each, and for comparison one adapter trained on all in sequence."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..._files import read_json
from .._distributed import Group, group
from .._weights import damage, read_weights, save_weights
from ..config import configured
from ..experiment import WAY_OUT, Method, different, weights_path
from ..jola.compare import TextTask, compare_methods, describe_model
from ..jola.config import MethodsConfig
from ..jola.methods import Attached, find_method
from ..jola.result import RunResult
from ..jola.scoring import answer_row, collate, tail_logits, training_inputs
from ..jola.texts import Example, Split, TextData, draw
from .result import StreamResult, TaskResult
from .router import Router

SEQUENCE = "in sequence"


def stream(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, TextData],
    config: MethodsConfig | None = None,
    *,
    method: str = "jola",
    seed: int = 0,
    suite: int = 20,
    grid: Mapping[str, Sequence[float]] | None = None,
    out: str | os.PathLike[str] | None = None,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> StreamResult:
    """Learns tasks in the order in which they arrive, each with an adapter of its own.

    After every task a regression suite computes outputs of all tasks so far with their adapters, read from their files,
    and compares them bitwise with those right after training. For comparison, one adapter is trained on all tasks in
    sequence, with the settings that were chosen for the adapters of the tasks, and scored on every task so far. At the
    end a router, which knows only the training prompts, chooses an adapter for each test prompt of all tasks.

    Args:
        model: a causal language model, unchanged afterwards.
        tokenizer: of the model, with a padding token.
        tasks: examples by name of the task, in the order of arrival.
        config: sizes, training and scoring, as for :func:`compare_methods`. Default: its defaults.
        method: of adaptation, see :data:`METHODS`.
        seed: of examples, training and gates.
        suite: number of test examples of each task in the regression suite.
        grid: values to try, by setting; validation chooses. Default: the method's.
        out: folder for the result, the runs and weights of each task, adapters in peft's format, and the router. A call
            that was interrupted resumes from there. Default: a temporary one.
        extra: further entries of the result file.
        options: fields of :class:`MethodsConfig`, which replace those of ``config``.

    Raises:
        ValueError: there are no tasks, a name cannot name a folder, the method trains nothing, a task has too few
            examples, there are several processes, or ``out`` has the result of another setup.
        ImportError: transformers, peft, accelerate or tqdm is missing; the message names the extra.

    Examples:
        >>> tasks = {"capitals": data, "again": data}
        >>> sizes = {"train": 8, "val": 4, "test": 4, "suite": 2}
        >>> result = stream(base, tokenizer, tasks, grid={"lr": [0.05], "gate_lr": [0.5]}, progress=False, **sizes)
        >>> [task.changed for task in result.tasks]
        [[0, 0], [0]]
    """
    config = configured(MethodsConfig, config, options)
    if not tasks or any(not re.fullmatch(r"\w[\w.-]*", name) for name in tasks):
        raise ValueError(
            f"tasks must be one or more, with names of letters, digits, '.', '_' and '-', got {list(tasks)}"
        )
    if find_method(method).attach is None:
        raise ValueError(f"method must be one that trains something, got {method!r}")
    if suite < 1:
        raise ValueError(f"suite must be at least 1, got {suite}")
    device = torch.device(config.device) if config.device is not None else next(model.parameters()).device
    if group(device).size > 1:
        raise ValueError("a stream of tasks runs in one process; leave out torchrun")
    splits = {
        name: draw(data, seed, train=config.train, val=config.val, test=config.test) for name, data in tasks.items()
    }
    setup = {
        "tasks": {name: {"source": data.source, "digest": data.digest()} for name, data in tasks.items()},
        "model": describe_model(config.name, model),
        "method": method,
        "seed": seed,
        "suite": suite,
        "grid": {name: list(values) for name, values in (grid or {}).items()},
        "sizes": {"train": config.train, "val": config.val, "test": config.test},
        "budget": asdict(config.training),
        "answering": asdict(config.answering),
        "schedule": config.schedule,
    }
    started = time.perf_counter()
    with TemporaryDirectory() if out is None else nullcontext(str(out)) as path:
        folder = Path(path)
        finished = _finished(folder / "result.json", setup)
        learner = _Stream(model.to(device).eval(), tokenizer, tasks, splits, config, setup, folder)

        def save() -> StreamResult:
            result = StreamResult(tuple(learner.results), setup, time.perf_counter() - started)
            result.save(folder / "result.json", **(extra or {}))
            return result

        for number, name in enumerate(tasks):
            learner.learn(number, finished.get(name))
            save()
        learner.route()
        return save()


def _finished(file: Path, setup: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks in the result of an earlier call, by name. It must have begun with the same tasks and settings."""
    if not file.exists():
        return {}
    saved = read_json(file)
    try:
        differ = different(setup, saved["setup"], except_for=["tasks"])
        pairs = list(zip(setup["tasks"].items(), saved["setup"]["tasks"].items()))
        if differ or any(task != saved_task for task, saved_task in pairs):
            raise ValueError(f"it is of another set-up (different: {', '.join(differ) or 'tasks'})")
        return {task["name"]: task for task in saved["tasks"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} cannot be gone on from: {error}; {WAY_OUT}") from None


@dataclass
class _Stream:
    """A running stream.

    Attributes:
        setup: of the result.
        results: of the tasks so far.
        runs: of the adapters so far, by task.
        digests: of the outputs of the regression suite right after training, by task.
    """

    model: Any
    tokenizer: Any
    tasks: Mapping[str, TextData]
    splits: Mapping[str, Split]
    config: MethodsConfig
    setup: Mapping[str, Any]
    folder: Path
    results: list[TaskResult] = field(default_factory=list)
    runs: dict[str, RunResult] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = list(self.tasks)
        self.router = Router(self.model, self.tokenizer, self.config.answering)

    @property
    def method(self) -> Method:
        return find_method(self.setup["method"])

    def learn(self, number: int, finished: Mapping[str, Any] | None) -> None:
        """Trains an adapter for a task, runs the suite on all so far, and continues the adapter in sequence."""
        name, grid = self.names[number], self.setup["grid"]
        compared = compare_methods(
            self.model,
            self.tokenizer,
            self.tasks[name],
            self.config,
            methods=["zero-shot", self.method.name],
            seeds=[self.setup["seed"]],
            grids={self.method.name: grid} if grid else None,
            out=self.folder / name,
        )
        (zero_shot,), (adapted,) = compared.tested("zero-shot"), compared.tested(self.method.name)
        primary = compared.primary
        self.runs[name] = adapted
        self.results.append(
            TaskResult(
                name,
                primary,
                (zero_shot.test or {})[primary],
                (adapted.test or {})[primary],
                sum(run.seconds for run in compared.runs),
                adapted.parameters,
                dict(adapted.setting),
                len(self._suite(name)),
            )
        )
        self.router.learn(name, [example.prompt for example in self.splits[name].train])
        self._check_outputs()
        self._continue_sequence(number, finished)

    def _check_outputs(self) -> None:
        """Compares the outputs of every task so far with those right after its training."""
        for result in self.results:
            digests = self._outputs(result.name, save=result is self.results[-1])
            trained = self.digests.setdefault(result.name, digests)
            result.changed.append(sum(a != b for a, b in zip(digests, trained)))

    def _outputs(self, name: str, save: bool) -> list[str]:
        """Digests of the logits of a task with its adapter, one per answer of the suite."""
        with self._adapter(name, name) as attached:
            rows = [answer_row(example, self.tokenizer, self.config.answering) for example in self._suite(name)]
            digests = [_digest(attached, collate([row], self.tokenizer.pad_token_id)) for row in rows]
            if save and hasattr(attached.model, "peft_config"):
                self._save(name, attached.model)
        return digests

    def _save(self, name: str, model: Any) -> None:
        """Saves an adapter in peft's format and, if it edits heads, the reference of an :class:`EditMonitor`."""
        from ...adapters import EditMonitor
        from ...adapters.jola.model import jola_layers

        folder = self.folder / "adapters" / name
        model.save_pretrained(str(folder))
        if next(jola_layers(model), None) is None:
            return
        answering, device = self.config.answering, next(model.parameters()).device
        rows = [answer_row(example, self.tokenizer, answering) for example in self.splits[name].train]
        batches = training_inputs(model, rows, self.tokenizer.pad_token_id, answering.batch_size)
        monitor = EditMonitor(model, window=max(1, min(64, len(rows) // 4)))
        monitor.calibrate(
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches
        )
        monitor.save(folder)

    def _suite(self, name: str) -> Sequence[Example]:
        return self.splits[name].test[: self.setup["suite"]]

    def _continue_sequence(self, number: int, finished: Mapping[str, Any] | None) -> None:
        """Trains the adapter in sequence on this task too, and scores it on all tasks so far."""
        name, run = self.names[number], self.runs[self.names[number]]
        path = self.folder / "sequence" / f"{name}.safetensors"
        record = finished["weights"] if finished else None
        if finished and damage(path, record) is None and len(finished["sequence"]) >= 1:
            state = read_weights(path)
        else:
            state = read_weights(weights_path(self.folder / name, run))  # on the first task, both adapters are the same
            if number:
                start = read_weights(self.folder / "sequence" / f"{self.names[number - 1]}.safetensors")
                state = self.task(name).train(self.method, run, start).state
            record = save_weights(path, state)
        self.results[-1].weights = record
        for result in self.results:
            task = self.task(result.name)
            with task.attached(self.method, self.runs[result.name], state) as attached:
                examples, title = self.splits[result.name].test, f"{result.name}, {SEQUENCE}"
                result.sequence.append(task.score(attached.model, examples, title).metrics[task.primary])

    def route(self) -> None:
        """Scores every task with the adapters that the router chooses."""
        save_weights(self.folder / "router.safetensors", self.router.state())
        for result in self.results:
            examples, task = self.splits[result.name].test, self.task(result.name)
            routed = self.router.route([example.prompt for example in examples])
            result.router = routed.count(result.name) / len(routed)
            scores = list(self.runs[result.name].each)
            for other in dict.fromkeys(routed):
                if other != result.name:
                    numbers = [i for i, name in enumerate(routed) if name == other]
                    with self._adapter(result.name, other) as attached:
                        others = [examples[i] for i in numbers]
                        each = task.score(attached.model, others, f"{result.name}, routed").each
                    for i, score in zip(numbers, each):
                        scores[i] = score
            result.routed = 100 * sum(scores) / len(scores)

    def _adapter(self, name: str, other: str) -> AbstractContextManager[Attached]:
        """The model for the task ``name`` with the adapter of the task ``other``, read from its file."""
        run = self.runs[other]
        return self.task(name).attached(self.method, run, read_weights(weights_path(self.folder / other, run)))

    def task(self, name: str) -> TextTask:
        splits = {self.setup["seed"]: self.splits[name]}
        return TextTask(self.model, self.model, self.tokenizer, splits, self.config, Group(), self.folder / "logs")


@torch.inference_mode()
def _digest(attached: Attached, batch: Mapping[str, Any]) -> str:
    """A hash of the logits of an answer."""
    device = next(attached.model.parameters()).device
    logits = tail_logits(
        attached.model, batch["input_ids"].to(device), batch["attention_mask"].to(device), batch["keep"]
    )
    return hashlib.sha256(logits.contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
