"""The comparison on texts: every method on a few examples, run by the experiment engine."""

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
from ..experiment import BetterBy, Method, Study, TrainingLog, plan_of
from .config import MethodsConfig
from .methods import METHODS, Attached
from .result import MethodComparison, RunResult
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

# Fields of a training that results from before they existed do not have: what was done then.
_BEFORE = {"clip": 1.0, "average": 0.0}
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
    """Compare JoLA with other ways to adapt a language model, on the same few examples and the same budget.

    For every method, each setting of its grid is trained on the first seed's examples (or on those of several, see
    ``choose_on``), and the one with the best validation score is kept for all seeds. Every run validates after each
    epoch, stops early, and keeps its best epoch. The test examples, the same for all, are scored once per method and
    seed. Where there are no choices but answers repeat, the untrained model chooses among the training answers: it
    cannot know otherwise which words are wanted, and every method would look good beside it.

    With ``out``, every finished run is kept in ``out/result.json`` and its weights in ``out/weights``; a call that was
    cut short goes on from there, and more methods and seeds can be added. Under ``torchrun`` each step's examples are
    dealt to the processes, and so is scoring; all processes must see one ``out``.

    Args:
        model: a causal language model of transformers, which is left as it was, or a function that loads one.
        tokenizer: its tokenizer, with a padding token.
        data: prompts with answers. With choices, answers are chosen by their probability; else they are generated.
        config: numbers of examples, epochs, how answers are found and so on: all that is alike for the methods.
        methods: names in ``METHODS``.
        seeds: of the draws of examples, of initial values and of the order; the first also chooses settings.
        grids: values to try instead of a method's own: ``{"jola": {"lr": [0.01]}}``.
        out: folder for results. Default: nothing is kept.
        executor: where training and scoring are done. Default: in this process. A :class:`RayExecutor`: on the machines
            of a cluster, to which a model is sent; a function that loads one is called there.
        extra: more entries for the result file.
        options: fields of :class:`MethodsConfig`, in place of ``config``'s.

    Returns:
        :class:`MethodComparison`: every run, the table, the verdict.

    Raises:
        ValueError: before any long work: an unknown method, a grid that does not fit, no seeds, too few examples, a
            tokenizer without padding, or results of another set-up in ``out``.
        ImportError: transformers, peft, accelerate or tqdm is missing; the message names the extra.

    Examples:
        >>> sizes = {"train": 8, "val": 4, "test": 4}
        >>> result = compare_methods(model, tokenizer, data, methods=["zero-shot", "jola"], seeds=[0], progress=False, **sizes)
        >>> print(result.table())
        method     ROUGE-L  exact match  trained  seeds  time per run  chosen setting
        zero-shot ...

    Source: JoLA paper, section 4 and appendix F. Unlike there, every method's rates are tuned alike.
    """
    for module in ("transformers", "peft", "accelerate"):
        require(module, "lab", "comparing methods on texts")
    from .training import check_loggers

    config = configured(MethodsConfig, config, options)
    training, how = config.training, config.answering
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
    source, model = model, _built(model)
    splits = {seed: draw(data, seed, train=config.train, val=config.val, test=config.test) for seed in seeds}
    device = torch.device(config.device) if config.device is not None else next(model.parameters()).device
    processes = group(device)
    if training.batch_size % processes.size:
        raise ValueError(f"batch_size must be a multiple of the {processes.size} processes, got {training.batch_size}")
    setup: dict[str, Any] = {
        "data": {"source": data.source, "digest": data.digest()},
        "model": {"name": config.name, "class": type(model).__name__, "dtype": str(next(model.parameters()).dtype)},
        "sizes": {"train": config.train, "val": config.val, "test": len(splits[seeds[0]].test)},
        "seeds": seeds,
        "methods": {m.name: {**m.grid, **(grids or {}).get(m.name, {})} for m, _ in plan},
        "budget": {k: v for k, v in asdict(training).items() if (k, v) not in _BEFORE.items()},
        "answering": asdict(how),
        "schedule": config.schedule,
        "processes": processes.size,
    }
    candidates = labels(splits[seeds[0]].train, how)
    # entries of a set-up that results from before they existed do not have, where they say what was done then
    setup |= {"zero-shot chooses among": list(candidates)} if candidates else {}
    setup |= {"choose_on": config.choose_on} if config.choose_on > 1 else {}
    result = MethodComparison((), setup, primary=primary_metric(data.has_choices, how))
    model.to(device).eval()
    with Study.opened(result, out, processes, executor, extra) as study:
        logs = study.folder / "logs"
        task = TextTask(
            source, model, tokenizer, splits, config, processes, result.primary, result.better_by, candidates, logs
        )
        study.run([task], plan, seeds, config.choose_on)
    return study.result


def _built(source: Any) -> Any:
    return source if isinstance(source, torch.nn.Module) else source()


@dataclass(frozen=True)
class TextTask:
    """Runs of one language model on the splits of one data set."""

    source: Any
    model: Any
    tokenizer: Any
    splits: Mapping[int, Split]
    config: MethodsConfig
    group: Group
    primary: str
    better_by: BetterBy
    candidates: tuple[str, ...]
    logs: Path

    @property
    def gpu(self) -> bool:
        return self.config.device is None or torch.device(self.config.device).type == "cuda"

    def elsewhere(self) -> Callable[[], TextTask]:
        return partial(_task_elsewhere, replace(self, model=None), digest_of(self.model))

    def names(self) -> dict[str, Any]:
        return {}

    def train(self, method: Method, run: RunResult, start: Mapping[str, Tensor] | None = None) -> TrainingLog:
        """Train from the beginning, or from what an earlier training left."""
        from .training import Logs, train

        split, training = self.splits[run.seed], self.config.training
        rows = [answer_row(e, self.tokenizer, self.config.answering) for e in split.train]
        steps = -(-len(rows) // training.batch_size) * training.epochs
        logs = Logs(self.config.report_to, self.logs / run.filename.removesuffix(".safetensors"))
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
                self.better_by,
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
            with self.attached(method, run) as attached:
                attached.load(state)
                scores = self.score(attached.model, examples, run.title)
        return {"test": scores.metrics, "each": list(scores.each)}

    def validate(self, attached: Attached, examples: Sequence[Example]) -> dict[str, float]:
        how = self.config.answering
        scored = self._shared(examples, lambda some: score_choices(attached.model, self.tokenizer, some, how))
        right, losses = zip(*scored)
        metrics = {"loss": sum(losses) / len(losses)}
        if self.primary == "accuracy":
            metrics["accuracy"] = 100 * sum(right) / len(right)
        return metrics

    def score(self, model: Any, examples: Sequence[Example], title: str, candidates: tuple[str, ...] = ()) -> Scores:
        """Test scores of a model; it chooses among ``candidates`` if there are any, where examples have no choices."""
        model.eval()
        how, tokenizer = self.config.answering, self.tokenizer
        with self._bar(len(examples[self.group.rank :: self.group.size]), f"{title}, test") as advance:
            if self.primary == "accuracy":
                scored = self._shared(examples, lambda some: score_choices(model, tokenizer, some, how, advance))
                each = tuple(right for right, _ in scored)
                return Scores({"accuracy": 100 * sum(each) / len(each)}, each)
            if candidates:
                texts = self._shared(
                    examples, lambda some: choose_labels(model, tokenizer, some, candidates, how, advance)
                )
                return score_texts(texts, examples, how)
            texts = self._shared(
                examples, lambda some: generate(model, tokenizer, [e.prompt for e in some], how, advance)
            )
        return score_texts(texts, examples, how)

    def _shared(self, examples: Sequence[Example], score: Callable[[Sequence[Example]], list[Any]]) -> list[Any]:
        """``score`` of all examples, each process doing its share."""
        return self.group.interleave(score(examples[self.group.rank :: self.group.size]), len(examples))

    def _bar(self, total: int, text: str) -> Any:
        return bar(total, text, self.config.progress and self.group.rank == 0)

    @contextmanager
    def attached(self, method: Method, run: RunResult) -> Iterator[Attached]:
        """The model with the method on it, as it is before training."""
        assert method.attach is not None
        torch.manual_seed(run.seed)
        with method.attach(self.model, run.setting, self.config.schedule) as attached:
            yield attached


def _task_elsewhere(task: TextTask, digest: str) -> TextTask:
    """The task in another process, without a progress bar. ValueError if it loads another model there."""
    model, config = _built(task.source), replace(task.config, progress=False)
    check_same("model", digest, digest_of(model))
    device = launched_device() if config.device is None else config.device
    return replace(task, model=model.to(device).eval(), config=config, group=group(torch.device(device)))
