"""Tasks one after the other: an adapter for each, beside one adapter that is trained on all of them in turn."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..._files import read_json
from .._distributed import Group, group
from .._weights import damage, read_weights, save_weights
from ..config import configured
from ..experiment import weights_path
from ..jola.compare import TextTask, compare_methods
from ..jola.config import MethodsConfig
from ..jola.methods import Attached, find_method
from ..jola.result import MethodComparison, RunResult
from ..jola.scoring import answer_row, collate, labels, primary_metric, tail_logits
from ..jola.texts import Split, TextData, draw
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
    """Learn tasks in the order in which they arrive, each with an adapter of its own.

    After every task a regression suite computes outputs of all tasks so far with their adapters, read from their files,
    and holds them bitwise against those right after training. Beside that, one adapter is trained on all tasks in turn,
    with the settings that were chosen for the tasks' own, and scored on every task so far. In the end a router, which
    knows the training prompts alone, chooses an adapter for each test prompt of any task.

    Args:
        model: a causal language model; it is left as it was.
        tokenizer: of the model, with a padding token.
        tasks: examples by the task's name, in the order of arrival.
        config: sizes, training and scoring, as for :func:`compare_methods`. Default: its defaults.
        method: how adapters are made, see :data:`METHODS`.
        seed: of examples, training and gates.
        suite: test examples of each task whose outputs are held against those right after training.
        grid: values to try, by setting; validation chooses. Default: the method's.
        out: folder for the result, each task's runs and weights, adapters as peft has them, and the router. Stopped, the
            same call goes on with the task where it was. Default: a temporary one.
        extra: further entries for the result file.
        options: fields of ``config``, by name.

    Raises:
        ValueError: no tasks, a name that is no folder's, a method that trains nothing, too few examples, several
            processes, or ``out`` has the result of another set-up.
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
        "model": {"name": config.name, "class": type(model).__name__, "dtype": str(next(model.parameters()).dtype)},
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
        work = _Stream(model.to(device).eval(), tokenizer, tasks, splits, config, method, seed, suite, grid, Path(path))
        known = _known(Path(path) / "result.json", setup)
        result = StreamResult((), setup)
        for number in range(len(tasks)):
            work.learn(number, known.get(work.names[number]))
            result = StreamResult(tuple(work.results), setup, time.perf_counter() - started)
            result.save(Path(path) / "result.json", **(extra or {}))
        work.route()
        result = StreamResult(tuple(work.results), setup, time.perf_counter() - started)
        result.save(Path(path) / "result.json", **(extra or {}))
    return result


def _known(file: Path, setup: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tasks in the result of an earlier call, by name; of a stream that began with the same tasks and settings."""
    if not file.exists():
        return {}
    saved = read_json(file)
    way_out = "delete it to start anew, or choose another folder"
    try:
        before = saved["setup"]
        rest = [key for key in setup.keys() | before.keys() if key != "tasks" and setup.get(key) != before.get(key)]
        both = list(zip(setup["tasks"].items(), before["tasks"].items()))
        if rest or any(now != then for now, then in both):
            raise ValueError(f"it is of another set-up (different: {', '.join(sorted(rest)) or 'tasks'})")
        return {task["name"]: task for task in saved["tasks"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} cannot be gone on from: {error}; {way_out}") from None


class _Stream:
    """A stream at work."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Mapping[str, TextData],
        splits: Mapping[str, Split],
        config: MethodsConfig,
        method: str,
        seed: int,
        suite: int,
        grid: Mapping[str, Sequence[float]] | None,
        folder: Path,
    ) -> None:
        self.model, self.tokenizer, self.config, self.seed, self.suite = model, tokenizer, config, seed, suite
        self.method, self.grids, self.folder = find_method(method), {method: dict(grid)} if grid else None, folder
        self.names, self.tasks, self.splits = list(tasks), tasks, splits
        self.router = Router(model, tokenizer, config.answering)
        self.results: list[TaskResult] = []
        self.runs: dict[str, RunResult] = {}
        self.digests: dict[str, list[str]] = {}

    def learn(self, number: int, known: Mapping[str, Any] | None) -> None:
        """Train an adapter for a task, run the suite over all so far, and train the other adapter on."""
        name = self.names[number]
        compared = compare_methods(
            self.model,
            self.tokenizer,
            self.tasks[name],
            self.config,
            methods=["zero-shot", self.method.name],
            seeds=[self.seed],
            grids=self.grids,
            out=self.folder / name,
        )
        (zero,), (own,) = compared.tested("zero-shot"), compared.tested(self.method.name)
        primary = compared.primary
        self.runs[name] = own
        self.results.append(
            TaskResult(
                name,
                primary,
                (zero.test or {})[primary],
                (own.test or {})[primary],
                sum(run.seconds for run in compared.runs),
                own.parameters,
                dict(own.setting),
                len(self._suite(name)),
            )
        )
        self.router.learn(name, [example.prompt for example in self.splits[name].train])
        self._check_outputs(number)
        self._train_on(number, known)

    def _check_outputs(self, number: int) -> None:
        """Hold the outputs of every task so far against those right after its training."""
        for result in self.results:
            digests = self._outputs(result.name, save=result is self.results[-1])
            before = self.digests.setdefault(result.name, digests)
            result.changed.append(sum(now != then for now, then in zip(digests, before)))

    def _outputs(self, name: str, save: bool) -> list[str]:
        """Digests of a task's logits with its adapter, one for each answer of the suite."""
        run = self.runs[name]
        state = read_weights(weights_path(self.folder / name, run))
        digests = []
        with self.task(name).attached(self.method, run) as attached:
            attached.load(state)
            attached.model.eval()
            for example in self._suite(name):
                row = answer_row(example, self.tokenizer, self.config.answering)
                digests.append(_digest(attached, collate([row], self.tokenizer.pad_token_id)))
            if save and hasattr(attached.model, "peft_config"):
                self._save(name, attached.model)
        return digests

    def _save(self, name: str, model: Any) -> None:
        """Save an adapter as peft does, and with one that edits heads, what a monitor of it holds inputs against."""
        from ...adapters import EditMonitor
        from ...adapters.jola.model import jola_layers
        from ..jola.training import training_inputs

        folder = self.folder / "adapters" / name
        model.save_pretrained(str(folder))
        if next(jola_layers(model), None) is None:
            return
        how, device = self.config.answering, next(model.parameters()).device
        rows = [answer_row(example, self.tokenizer, how) for example in self.splits[name].train]
        batches = training_inputs(model, rows, self.tokenizer.pad_token_id, how.batch_size)
        monitor = EditMonitor(model, window=max(1, min(64, len(rows) // 4)))
        monitor.calibrate({key: _to(value, device) for key, value in batch.items()} for batch in batches)
        monitor.save(folder)

    def _suite(self, name: str) -> Sequence[Any]:
        return self.splits[name].test[: self.suite]

    def _train_on(self, number: int, known: Mapping[str, Any] | None) -> None:
        """Train the one adapter on this task too, and score it on all so far."""
        name, run = self.names[number], self.runs[self.names[number]]
        path = self.folder / "sequence" / f"{name}.safetensors"
        record = known["weights"] if known else None
        if known and damage(path, record) is None and len(known["sequence"]) >= 1:
            state = read_weights(path)
        else:
            state = read_weights(weights_path(self.folder / name, run))  # of the first task, both are the same
            if number:
                start = read_weights(self.folder / "sequence" / f"{self.names[number - 1]}.safetensors")
                state = self.task(name).train(self.method, run, start).state
            record = save_weights(path, state)
        self.results[-1].weights = record
        for result in self.results:
            result.sequence.append(self._score(result.name, state, SEQUENCE))

    def _score(self, name: str, state: Mapping[str, Tensor], title: str) -> float:
        task = self.task(name)
        with task.attached(self.method, self.runs[name]) as attached:
            attached.load(state)
            return task.score(attached.model, self.splits[name].test, f"{name}, {title}").metrics[task.primary]

    def route(self) -> None:
        """Score every task with the adapters that the router chooses."""
        save_weights(self.folder / "router.safetensors", self.router.state())
        for result in self.results:
            examples, task = self.splits[result.name].test, self.task(result.name)
            chosen = self.router.route([example.prompt for example in examples])
            result.router = chosen.count(result.name) / len(chosen)
            each = list(self.runs[result.name].each)
            for other in dict.fromkeys(chosen):
                if other != result.name:
                    places = [i for i, name in enumerate(chosen) if name == other]
                    state = read_weights(weights_path(self.folder / other, self.runs[other]))
                    with task.attached(self.method, self.runs[other]) as attached:
                        attached.load(state)
                        scores = task.score(
                            attached.model, [examples[i] for i in places], f"{result.name}, routed"
                        ).each
                    for i, score in zip(places, scores):
                        each[i] = score
            result.routed = 100 * sum(each) / len(each)

    def task(self, name: str) -> TextTask:
        """The engine's part for one task."""
        split, data = self.splits[name], self.tasks[name]
        compared = MethodComparison((), {}, primary=primary_metric(data.has_choices, self.config.answering))
        candidates = labels(split.train, self.config.answering)
        return TextTask(
            self.model, self.model, self.tokenizer, {self.seed: split}, self.config, Group(), compared.primary,
            compared.better_by, candidates, self.folder / "logs",
        )  # fmt: skip


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@torch.inference_mode()
def _digest(attached: Attached, batch: Mapping[str, Any]) -> str:
    """The logits of an answer as a digest of their bytes."""
    device = next(attached.model.parameters()).device
    logits = tail_logits(
        attached.model, batch["input_ids"].to(device), batch["attention_mask"].to(device), batch["keep"]
    )
    return hashlib.sha256(logits.contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
