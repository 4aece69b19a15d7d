"""The protocol: for every method choose a setting on one seed's validation, train on every seed, test once."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from ..._extras import require
from .._distributed import Group, group
from .._progress import bar
from .._weights import damage, read_weights, save_weights
from .methods import METHODS, Attached, Method
from .result import Cell, MethodComparison, resumed
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
from .soundness import sound, title, weights_path
from .texts import Draw, Example, TextData, draw

if TYPE_CHECKING:
    from .training import Budget

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
    budget: Budget | None = None,
    answering: Answering | None = None,
    schedule: str = "exponential",
    choose_on: int = 1,
    out: str | os.PathLike[str] | None = None,
    name: str = "",
    device: torch.device | str | None = None,
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
        budget: epochs, patience, batch size, see ``training.Budget``.
        answering: how prompts become tokens and answers are found, see :class:`Answering`.
        schedule: of the penalty on JoLA's gates: "constant", "linear", "cyclic" or "exponential".
        choose_on: how many of the seeds choose settings, by the mean of their validation scores. Default 1, the first.
        out: folder for results. Default: nothing is kept.
        name: of the model, for the result.
        device: where to run; the model is moved there. Default: where it is.
        progress: show a bar on standard error.
        extra: more entries for the result file.

    Returns:
        :class:`MethodComparison`: every run, the table, the verdict.

    Raises:
        ValueError: before any long work: an unknown method, a grid that does not fit, no seeds, too few examples, a
            tokenizer without padding, or results of another set-up in ``out``.
        ImportError: transformers, peft, accelerate or tqdm is missing; the message names the extra.

    Example:
        >>> result = compare_methods(model, tokenizer, data, methods=["zero-shot", "lora", "jola"])  # doctest: +SKIP
        >>> print(result.table())  # doctest: +SKIP

    Source: JoLA paper, section 4 and appendix F. Unlike there, every method's rates are tuned alike.
    """
    for module in ("transformers", "peft", "accelerate"):
        require(module, "lab", "the JoLA recipe")
    from .training import Budget

    started = time.perf_counter()
    chosen = _check(methods, seeds, grids or {}, schedule, tokenizer)
    if not 1 <= choose_on <= len(dict.fromkeys(seeds)):
        raise ValueError(f"choose_on must be 1 to {len(dict.fromkeys(seeds))}, the number of seeds, got {choose_on}")
    how, budget = answering or Answering(), budget or Budget()
    draws = {seed: draw(data, seed, train=train, val=val, test=test) for seed in dict.fromkeys(seeds)}
    place = torch.device(device) if device is not None else next(model.parameters()).device
    us = group(place)
    setup: dict[str, Any] = {
        "data": {"source": data.source, "digest": data.digest()},
        "model": {"name": name, "class": type(model).__name__, "dtype": str(next(model.parameters()).dtype)},
        "sizes": {"train": train, "val": val, "test": len(draws[seeds[0]].test)},
        "seeds": list(draws),
        "methods": {m.name: {**m.grid, **(grids or {}).get(m.name, {})} for m, _ in chosen},
        "budget": asdict(budget),
        "answering": asdict(how),
        "schedule": schedule,
        "processes": us.size,
    }
    candidates = labels(draws[seeds[0]].train, how)
    # entries of a set-up that results from before they existed do not have, where they say what was done then
    setup |= {"zero-shot chooses among": list(candidates)} if candidates else {}
    setup |= {"choose_on": choose_on} if choose_on > 1 else {}
    primary = primary_metric(data.has_choices, how)
    folder = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with folder as own:
        path = us.share(own)
        file = Path(path) / "result.json"
        work = _Work(model.to(place).eval(), tokenizer, how, budget, schedule, us, Path(path), primary, progress)
        cells: list[Cell] = []
        if us.rank == 0:
            cells, setup = resumed(file, setup)
            cells, told = sound(cells, Path(path), setup["sizes"]["test"], primary, work.rank)
            for sentence in told:
                work.tell(sentence)
        cells, setup = us.share((cells, setup))
        result = MethodComparison(tuple(cells), setup, primary)

        def keep(cell: Cell) -> None:
            nonlocal result
            others = tuple(c for c in result.cells if not c.is_run(cell.method, cell.seed, cell.setting))
            result = replace(result, cells=(*others, cell), seconds=time.perf_counter() - started)
            if us.rank == 0:
                result.save(file, **(extra or {}))

        for method, settings in chosen:
            _run_method(work, method, settings, draws, choose_on, candidates, keep, lambda: result)
        us.meet()
    return result


def _check(
    methods: Sequence[str], seeds: Sequence[int], grids: Mapping[str, Any], schedule: str, tokenizer: Any
) -> list[tuple[Method, list[dict[str, float]]]]:
    for kind, names in (("methods", methods), ("grids", list(grids))):
        unknown = [name for name in names if name not in METHODS]
        if unknown or (kind == "methods" and not names):
            raise ValueError(f"{kind} must be among {list(METHODS)}, got {unknown or 'none'}")
    if not seeds:
        raise ValueError("seeds must be one or more numbers, got none")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer must have a padding token, got one without (set tokenizer.pad_token)")
    return [(METHODS[name], METHODS[name].settings(grids.get(name))) for name in dict.fromkeys(methods)]


def _run_method(
    work: _Work,
    method: Method,
    settings: list[dict[str, float]],
    draws: dict[int, Draw],
    choose_on: int,
    candidates: tuple[str, ...],
    keep: Callable[[Cell], None],
    now: Callable[[], MethodComparison],
) -> None:
    """Choose the setting on the first seeds, then train and test on every seed; runs that are there are not repeated."""
    seeds = list(draws)
    first = seeds[0]
    if method.attach is None:
        if not now().tested(method.name):
            scores = work.test(Attached(work.model, []), draws[first].test, method.name, candidates)
            keep(Cell(method.name, first, {}, 0, test=scores.metrics, each=list(scores.each)))
        return

    def run(seed: int, setting: dict[str, float], to_test: bool = False) -> Cell:
        found = next((c for c in now().cells if c.is_run(method.name, seed, setting)), None)
        if found is not None and to_test and found.test is None and (reason := work.lost(found)):
            work.tell(f"{title(found)}: {reason}; this run is done again")
            found = None
        if found is None:
            found = work.train(method, seed, setting, draws[seed])
            keep(found)
        return found

    tried = [[run(seed, setting) for seed in seeds[:choose_on]] for setting in settings]
    best = max(tried, key=work.rank_together)[0]
    for stray in now().tested(method.name):
        if stray.setting != best.setting:
            work.tell(f"{title(stray)}: validation chooses {title(best)}; its test does not count")
            keep(replace(stray, test=None, each=[]))
    for seed in seeds:
        cell = run(seed, best.setting, to_test=True)
        if cell.test is None:
            keep(work.tested(method, cell, draws[seed]))
    if work.us.rank == 0:
        for cell in itertools.chain(*tried):
            if cell.setting != best.setting:
                work.weights(cell).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Work:
    """One process's part of the runs."""

    model: Any
    tokenizer: Any
    how: Answering
    budget: Budget
    schedule: str
    us: Group
    folder: Path
    primary: str
    progress: bool

    def better_by(self) -> tuple[tuple[str, float], ...]:
        return ((self.primary, 1.0), ("loss", -1.0)) if self.primary == "accuracy" else (("loss", -1.0),)

    def rank(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(sign * metrics[name] for name, sign in self.better_by())

    def rank_together(self, cells: Sequence[Cell]) -> tuple[float, ...]:
        """The rank of one setting on several seeds."""
        return self.rank({name: mean(cell.validation[name] for cell in cells) for name in cells[0].validation})

    def weights(self, cell: Cell) -> Path:
        return weights_path(self.folder, cell)

    def lost(self, cell: Cell) -> str | None:
        """Why the run's weights cannot be tested; None if they can."""
        return self.us.share(damage(self.weights(cell), cell.weights) if self.us.rank == 0 else None)

    def tell(self, sentence: str) -> None:
        if self.us.rank == 0:
            warnings.warn(f"{self.folder / 'result.json'}: {sentence}", stacklevel=3)

    @contextmanager
    def attached(self, method: Method, seed: int, setting: Mapping[str, float]) -> Iterator[Attached]:
        assert method.attach is not None
        torch.manual_seed(seed)
        with method.attach(self.model, setting, self.schedule) as attached:
            yield attached

    def train(self, method: Method, seed: int, setting: dict[str, float], examples: Draw) -> Cell:
        """One training run, its weights saved."""
        from .training import train

        rows = [answer_row(e, self.tokenizer, self.how) for e in examples.train]
        started = time.perf_counter()
        text = " ".join([method.name, f"seed {seed}", *(f"{k} {v:g}" for k, v in setting.items())])
        with self.attached(method, seed, setting) as attached:
            parameters = sum(p.numel() for g in attached.groups for p in g["params"])
            steps = -(-len(rows) // self.budget.batch_size) * self.budget.epochs
            with bar(steps, text, self.progress and self.us.rank == 0) as advance:
                run = train(
                    attached,
                    rows,
                    self.tokenizer.pad_token_id,
                    self.budget,
                    seed,
                    lambda: self.validate(attached, examples.val),
                    self.better_by(),
                    [_steps(advance)],
                    next(self.model.parameters()).device,
                )
        cell = Cell(
            method.name, seed, setting, parameters, run.epochs, run.best, time.perf_counter() - started, run.gates
        )
        record = self.us.share(save_weights(self.weights(cell), run.state) if self.us.rank == 0 else None)
        return replace(cell, weights=record)

    def tested(self, method: Method, cell: Cell, examples: Draw) -> Cell:
        """The run with its test scores, from its saved weights."""
        with self.attached(method, cell.seed, cell.setting) as attached:
            attached.load(read_weights(self.weights(cell)))
            scores = self.test(attached, examples.test, cell.method)
        return replace(cell, test=scores.metrics, each=list(scores.each))

    def validate(self, attached: Attached, examples: Sequence[Example]) -> dict[str, float]:
        found = self._shared(examples, lambda own: score_choices(attached.model, self.tokenizer, own, self.how))
        right, losses = zip(*found)
        metrics = {"loss": sum(losses) / len(losses)}
        if self.primary == "accuracy":
            metrics["accuracy"] = 100 * sum(right) / len(right)
        return metrics

    def test(
        self, attached: Attached, examples: Sequence[Example], text: str, candidates: tuple[str, ...] = ()
    ) -> Scores:
        attached.model.eval()
        share = len(examples[self.us.rank :: self.us.size])
        with bar(share, f"{text}, test", self.progress and self.us.rank == 0) as advance:
            if self.primary == "accuracy":
                found = self._shared(
                    examples, lambda own: score_choices(attached.model, self.tokenizer, own, self.how, advance)
                )
                each = tuple(right for right, _ in found)
                return Scores({"accuracy": 100 * sum(each) / len(each)}, each)
            if candidates:
                model, tokenizer = attached.model, self.tokenizer
                chosen = self._shared(
                    examples, lambda own: choose_labels(model, tokenizer, own, candidates, self.how, advance)
                )
                return score_texts(chosen, examples, self.how)
            texts = self._shared(
                examples,
                lambda own: generate(attached.model, self.tokenizer, [e.prompt for e in own], self.how, advance),
            )
        return score_texts(texts, examples, self.how)

    def _shared(self, examples: Sequence[Example], score: Callable[[Sequence[Example]], list[Any]]) -> list[Any]:
        """``score`` of all examples, each process doing its share."""
        own = score(examples[self.us.rank :: self.us.size])
        if self.us.size == 1:
            return own
        boxes: list[Any] = [None] * self.us.size
        torch.distributed.all_gather_object(boxes, own)
        return [boxes[i % self.us.size][i // self.us.size] for i in range(len(examples))]


def _steps(advance: Callable[[int], object]) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            advance(1)

    return Steps()
