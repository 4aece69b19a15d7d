"""The comparison on texts: every method on a few examples, run by the experiment engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._extras import require
from .._distributed import Group, group
from .._progress import bar
from ..experiment import BetterBy, Method, Study, TrainingLog, plan_of
from .methods import METHODS, Attached
from .result import MethodComparison, RunResult
from .scoring import (
    Answering,
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

if TYPE_CHECKING:
    from .training import TrainingConfig

DEFAULT_METHODS = ("zero-shot", "lora", "bitfit", "ia3", "lofit", "jola")
SCHEDULES = ("constant", "linear", "cyclic", "exponential")


def compare_methods(
    model: Any,
    tokenizer: Any,
    data: TextData,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    train: int = 200,
    val: int = 100,
    test: int | None = 300,
    grids: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    training: TrainingConfig | None = None,
    answering: Answering | None = None,
    schedule: str = "exponential",
    choose_on: int = 1,
    out: str | os.PathLike[str] | None = None,
    name: str = "",
    device: torch.device | str | None = None,
    report_to: Sequence[str] = (),
    progress: bool = True,
    extra: Mapping[str, Any] | None = None,
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
        model: a causal language model of transformers; it is left as it was.
        tokenizer: its tokenizer, with a padding token.
        data: prompts with answers. With choices, answers are chosen by their probability; else they are generated.
        methods: names in ``METHODS``.
        seeds: of the draws of examples, of initial values and of the order; the first also chooses settings.
        train, val, test: numbers of examples, see :func:`draw`.
        grids: values to try instead of a method's own: ``{"jola": {"lr": [0.01]}}``.
        training: epochs, patience, batch size, see :class:`TrainingConfig`.
        answering: how prompts become tokens and answers are found, see :class:`Answering`.
        schedule: of the penalty on JoLA's gates: "constant", "linear", "cyclic" or "exponential".
        choose_on: how many of the seeds choose settings, by the mean of their validation scores. Default 1, the first.
        out: folder for results. Default: nothing is kept.
        name: of the model, for the result.
        device: where to run; the model is moved there. Default: where it is.
        progress: show a bar on standard error.
        report_to: loggers of the Trainer, such as "tensorboard", which writes to ``out/logs``. Default: none.
        extra: more entries for the result file.

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
        method     ROUGE-L  exact match  trained  seeds  s/run  setting
        zero-shot ...

    Source: JoLA paper, section 4 and appendix F. Unlike there, every method's rates are tuned alike.
    """
    for module in ("transformers", "peft", "accelerate"):
        require(module, "lab", "comparing methods on texts")
    from .training import TrainingConfig, check_loggers

    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods must be among {list(METHODS)}, got {unknown or 'none'}")
    if not seeds:
        raise ValueError("seeds must be one or more numbers, got none")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer must have a padding token, got one without (set tokenizer.pad_token)")
    check_loggers(report_to)
    plan = plan_of([METHODS[name] for name in methods], grids)
    if not 1 <= choose_on <= len(dict.fromkeys(seeds)):
        raise ValueError(f"choose_on must be 1 to {len(dict.fromkeys(seeds))}, the number of seeds, got {choose_on}")
    how, training = answering or Answering(), training or TrainingConfig()
    splits = {seed: draw(data, seed, train=train, val=val, test=test) for seed in dict.fromkeys(seeds)}
    where = torch.device(device) if device is not None else next(model.parameters()).device
    processes = group(where)
    if training.batch_size % processes.size:
        raise ValueError(f"batch_size must be a multiple of the {processes.size} processes, got {training.batch_size}")
    setup: dict[str, Any] = {
        "data": {"source": data.source, "digest": data.digest()},
        "model": {"name": name, "class": type(model).__name__, "dtype": str(next(model.parameters()).dtype)},
        "sizes": {"train": train, "val": val, "test": len(splits[seeds[0]].test)},
        "seeds": list(splits),
        "methods": {m.name: {**m.grid, **(grids or {}).get(m.name, {})} for m, _ in plan},
        "budget": asdict(training),
        "answering": asdict(how),
        "schedule": schedule,
        "processes": processes.size,
    }
    candidates = labels(splits[seeds[0]].train, how)
    # entries of a set-up that results from before they existed do not have, where they say what was done then
    setup |= {"zero-shot chooses among": list(candidates)} if candidates else {}
    setup |= {"choose_on": choose_on} if choose_on > 1 else {}
    result = MethodComparison((), setup, primary=primary_metric(data.has_choices, how))
    model.to(where).eval()
    with Study.opened(result, out, processes, extra) as study:
        logs = (tuple(report_to), study.folder / "logs")
        task = TextTask(
            model,
            tokenizer,
            splits,
            how,
            training,
            schedule,
            processes,
            result.primary,
            result.better_by,
            candidates,
            logs,
            progress,
        )
        study.run(task, plan, list(splits), choose_on)
    return study.result


@dataclass(frozen=True)
class TextTask:
    """Runs of one language model on the splits of one data set."""

    model: Any
    tokenizer: Any
    splits: Mapping[int, Split]
    how: Answering
    training: TrainingConfig
    schedule: str
    group: Group
    primary: str
    better_by: BetterBy
    candidates: tuple[str, ...]
    logs: tuple[tuple[str, ...], Path]
    progress: bool

    def names(self) -> dict[str, Any]:
        return {}

    def train(self, method: Method, run: RunResult) -> TrainingLog:
        from .training import train

        split, (loggers, folder) = self.splits[run.seed], self.logs
        rows = [answer_row(e, self.tokenizer, self.how) for e in split.train]
        steps = -(-len(rows) // self.training.batch_size) * self.training.epochs
        with self._attached(method, run) as attached, self._bar(steps, run.title) as advance:
            log = train(
                attached,
                rows,
                self.tokenizer.pad_token_id,
                self.training,
                run.seed,
                lambda: self.validate(attached, split.val),
                self.better_by,
                [_steps(advance)],
                next(self.model.parameters()).device,
                loggers,
                folder / run.filename.removesuffix(".safetensors"),
            )
            log.details["parameters"] = sum(p.numel() for g in attached.groups for p in g["params"])
        return log

    def test(self, method: Method, run: RunResult, state: Mapping[str, Tensor]) -> dict[str, Any]:
        examples = self.splits[run.seed].test
        if method.attach is None:
            scores = self.score(self.model, examples, run.title, self.candidates)
        else:
            with self._attached(method, run) as attached:
                attached.load(state)
                scores = self.score(attached.model, examples, run.title)
        return {"test": scores.metrics, "each": list(scores.each)}

    def validate(self, attached: Attached, examples: Sequence[Example]) -> dict[str, float]:
        scored = self._shared(examples, lambda some: score_choices(attached.model, self.tokenizer, some, self.how))
        right, losses = zip(*scored)
        metrics = {"loss": sum(losses) / len(losses)}
        if self.primary == "accuracy":
            metrics["accuracy"] = 100 * sum(right) / len(right)
        return metrics

    def score(self, model: Any, examples: Sequence[Example], title: str, candidates: tuple[str, ...] = ()) -> Scores:
        """Test scores of a model; it chooses among ``candidates`` if there are any, where examples have no choices."""
        model.eval()
        how, tokenizer = self.how, self.tokenizer
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
        return bar(total, text, self.progress and self.group.rank == 0)

    @contextmanager
    def _attached(self, method: Method, run: RunResult) -> Iterator[Attached]:
        assert method.attach is not None
        torch.manual_seed(run.seed)
        with method.attach(self.model, run.setting, self.schedule) as attached:
            yield attached


def _steps(advance: Callable[[int], object]) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            advance(1)

    return Steps()
