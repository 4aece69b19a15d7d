"""The comparison on prompts with answers: every method on a few examples, run by the experiment engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._extras import require
from .._distributed import Group, group, launched_device
from .._progress import bar
from .._weights import check_same, digest_of
from ..config import configured
from ..executor import Executor
from ..experiment import Method, Plan, Study, TrainingLog, build, plan_of
from .config import MethodsConfig
from .methods import METHODS, Attached
from .result import MethodComparison, RunResult, better_by
from .scoring import (
    Scores,
    answer_row,
    choose_labels,
    generate,
    labels,
    primary_metric,
    score_choices,
    score_texts,
)
from .texts import Example, Split, TextData, draw

# Values of training fields that are left out of the setup: older results, from before the fields, used them.
_FORMER_TRAINING = {"clip": 1.0, "average": 0.0}
DEFAULT_METHODS = ("zero-shot", "lora", "bitfit", "ia3", "lofit", "jola")


def compare_methods(
    model: Any,
    tokenizer: Any,
    data: TextData,
    config: MethodsConfig | None = None,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    grids: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    out: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> MethodComparison:
    """Compares JoLA with other methods of adapting a language model, on the same few examples and with the same budget.

    Each setting of a method's grid is trained on the examples of the first seed (or of several, see ``choose_on``), and
    the one with the best validation score is used for all seeds. Every run validates after each epoch, stops early, and
    keeps its best epoch. The test examples, the same for all, are scored once per method and seed. If examples have no
    choices but their answers repeat, the untrained model chooses among the answers of the training examples: it cannot
    know otherwise which words are expected, and every method would look good beside it.

    With ``out``, every finished run is written to ``out/result.json`` and its weights to ``out/weights``; a call that was
    interrupted resumes from there, and methods and seeds can be added. Under ``torchrun`` the processes share each batch
    and the scoring; all of them need access to ``out``.

    Args:
        model: a causal language model of transformers, unchanged afterwards, or a function that loads one.
        tokenizer: its tokenizer, with a padding token.
        data: prompts with answers. With choices, the most probable one is the answer; else answers are generated.
        config: numbers of examples, epochs, scoring and so on: settings that all methods share.
        methods: names in ``METHODS``.
        seeds: of the choice of examples, of initial values and of the order; the first also chooses settings.
        grids: values to try instead of a method's own: ``{"jola": {"lr": [0.01]}}``.
        out: folder for results. Default: a temporary one.
        executor: of training and scoring. Default: this process. A :class:`RayExecutor` uses the machines of a cluster; a
            model is sent there, a function that loads one is called there.
        extra: further entries of the result file.
        options: fields of :class:`MethodsConfig`, which replace those of ``config``.

    Returns:
        :class:`MethodComparison`: all runs, a table, a verdict.

    Raises:
        ValueError: raised before any long work: a method is unknown, a grid does not fit its method, there are no seeds or
            too few examples, the tokenizer has no padding token, or ``out`` has results of another setup.
        ImportError: transformers, peft, accelerate or tqdm is missing; the message names the extra.

    Examples:
        >>> sizes = {"train": 8, "val": 4, "test": 4}
        >>> result = compare_methods(model, tokenizer, data, methods=["zero-shot", "jola"], seeds=[0], progress=False, **sizes)
        >>> print(result.table())
        method     ROUGE-L  exact match  trained  seeds  time per run  chosen setting
        zero-shot ...

    Source: JoLA paper, section 4 and appendix F. Unlike there, the rates of all methods are tuned in the same way.
    """
    for module in ("transformers", "peft", "accelerate"):
        require(module, "lab", "comparing methods on texts")
    from .training import check_loggers

    config = configured(MethodsConfig, config, options)
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods must be among {list(METHODS)}, got {unknown or 'none'}")
    if not seeds:
        raise ValueError("seeds must be one or more numbers, got none")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer must have a padding token, got one without (set tokenizer.pad_token)")
    check_loggers(config.report_to)
    plan = plan_of([METHODS[name] for name in methods], grids)
    seeds = list(dict.fromkeys(seeds))
    if config.choose_on > len(seeds):
        raise ValueError(f"choose_on must be 1 to {len(seeds)}, the number of seeds, got {config.choose_on}")
    source, model = model, build(model)
    splits = {seed: draw(data, seed, train=config.train, val=config.val, test=config.test) for seed in seeds}
    device = torch.device(config.device) if config.device is not None else next(model.parameters()).device
    processes = group(device)
    processes.check_batch_size(config.training.batch_size)
    task = TextTask(source, model, tokenizer, splits, config, processes)
    result = MethodComparison((), _setup(task, data, plan, grids or {}), primary=task.primary)
    model.to(device).eval()
    with Study.opened(result, out, processes, executor, extra) as study:
        study.run([replace(task, logs=study.folder / "logs")], plan, seeds, config.choose_on)
    return study.result


def _setup(
    task: TextTask, data: TextData, plan: Plan, grids: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, Any]:
    """Everything that determines the numbers."""
    config, training = task.config, asdict(task.config.training)
    setup = {
        "data": {"source": data.source, "digest": data.digest()},
        "model": describe_model(config.name, task.model),
        "sizes": {"train": config.train, "val": config.val, "test": len(task.first.test)},
        "seeds": list(task.splits),
        "methods": {m.name: {**m.grid, **grids.get(m.name, {})} for m, _ in plan},
        "budget": {k: v for k, v in training.items() if (k, v) not in _FORMER_TRAINING.items()},
        "answering": asdict(config.answering),
        "schedule": config.schedule,
        "processes": task.group.size,
    }
    # older results lack these entries
    setup |= {"zero-shot chooses among": list(task.candidates)} if task.candidates else {}
    setup |= {"choose_on": config.choose_on} if config.choose_on > 1 else {}
    return setup


def describe_model(name: str, model: Any) -> dict[str, str]:
    """The entry of a setup about a model."""
    return {"name": name, "class": type(model).__name__, "dtype": str(next(model.parameters()).dtype)}


@dataclass(frozen=True)
class TextTask:
    """The runs of one language model on the splits of one data set.

    Attributes:
        source: the model, or a function that loads it.
        splits: examples by seed.
        logs: folder for loggers that write files.
    """

    source: Any
    model: Any
    tokenizer: Any
    splits: Mapping[int, Split]
    config: MethodsConfig
    group: Group
    logs: Path | None = None

    @property
    def gpu(self) -> bool:
        return self.config.device is None or torch.device(self.config.device).type == "cuda"

    @property
    def first(self) -> Split:
        """The split of the first seed."""
        return next(iter(self.splits.values()))

    @property
    def primary(self) -> str:
        """The metric that chooses settings."""
        return primary_metric(self.first.train[0].choices is not None, self.config.answering)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The answers that the untrained model chooses among; empty for examples with choices and for free text."""
        return labels(self.first.train, self.config.answering)

    def factory(self) -> Callable[[], TextTask]:
        return partial(_construct, replace(self, model=None), digest_of(self.model))

    def names(self) -> dict[str, Any]:
        return {}

    def train(self, method: Method, run: RunResult, start: Mapping[str, Tensor] | None = None) -> TrainingLog:
        """Trains from initial values, or from the state ``start`` of an earlier training."""
        from .training import Logs, train

        split, training = self.splits[run.seed], self.config.training
        rows = [answer_row(e, self.tokenizer, self.config.answering) for e in split.train]
        steps = -(-len(rows) // training.batch_size) * training.epochs
        logs = Logs(self.config.report_to, self.logs and self.logs / run.filename.removesuffix(".safetensors"))
        with self.attached(method, run) as attached, self._bar(steps, run.title) as advance:
            if start is not None:
                attached.load(start)
            log = train(
                attached,
                rows,
                self.tokenizer.pad_token_id,
                training,
                run.seed,
                lambda: self.validate(attached, split.val),
                better_by(self.primary),
                advance,
                logs,
            )
            log.details["parameters"] = sum(p.numel() for g in attached.groups for p in g["params"])
        return log

    def test(self, method: Method, run: RunResult, state: Mapping[str, Tensor]) -> dict[str, Any]:
        examples = self.splits[run.seed].test
        if method.attach is None:
            scores = self.score(self.model, examples, run.title, self.candidates)
        else:
            with self.attached(method, run, state) as attached:
                scores = self.score(attached.model, examples, run.title)
        return {"test": scores.metrics, "each": list(scores.each)}

    def validate(self, attached: Attached, examples: Sequence[Example]) -> dict[str, float]:
        model, tokenizer, answering = attached.model, self.tokenizer, self.config.answering
        scored = self._shared(examples, lambda share: score_choices(model, tokenizer, share, answering))
        right, losses = zip(*scored)
        metrics = {"loss": sum(losses) / len(losses)}
        if self.primary == "accuracy":
            metrics["accuracy"] = 100 * sum(right) / len(right)
        return metrics

    def score(self, model: Any, examples: Sequence[Example], title: str, candidates: tuple[str, ...] = ()) -> Scores:
        """The test scores of a model. For examples without choices, it chooses among ``candidates`` or generates."""
        model.eval()
        tokenizer, answering = self.tokenizer, self.config.answering
        with self._bar(len(examples[self.group.rank :: self.group.size]), f"{title}, test") as advance:
            if self.primary == "accuracy":
                scored = self._shared(
                    examples, lambda share: score_choices(model, tokenizer, share, answering, advance)
                )
                each = tuple(right for right, _ in scored)
                return Scores({"accuracy": 100 * sum(each) / len(each)}, each)

            def answers(share: Sequence[Example]) -> list[str]:
                if candidates:
                    return choose_labels(model, tokenizer, share, candidates, answering, advance)
                return generate(model, tokenizer, [example.prompt for example in share], answering, advance)

            texts = self._shared(examples, answers)
        return score_texts(texts, examples, answering)

    def _shared(self, examples: Sequence[Example], score: Callable[[Sequence[Example]], list[Any]]) -> list[Any]:
        """The results of ``score`` for all examples; each process computes its share."""
        return self.group.interleave(score(examples[self.group.rank :: self.group.size]), len(examples))

    def _bar(self, total: int, text: str) -> Any:
        return bar(total, text, self.config.progress and self.group.rank == 0)

    @contextmanager
    def attached(self, method: Method, run: RunResult, state: Mapping[str, Tensor] | None = None) -> Iterator[Attached]:
        """The model with the method attached, with initial values, or a trained ``state`` in evaluation mode."""
        assert method.attach is not None
        torch.manual_seed(run.seed)
        with method.attach(self.model, run.setting, self.config.schedule) as attached:
            if state is not None:
                attached.load(state)
                attached.model.eval()
            yield attached


def _construct(task: TextTask, digest: str) -> TextTask:
    """Constructs the task in another process, without a progress bar. ValueError if the model loaded there differs."""
    model, config = build(task.source), replace(task.config, progress=False)
    check_same("model", digest, digest_of(model))
    device = launched_device() if config.device is None else config.device
    return replace(task, model=model.to(device).eval(), config=config, group=group(torch.device(device)))
