"""The experiment engine: methods x settings x seeds; validation chooses a setting, every seed trains it and tests it once.

An experiment brings a :class:`Task`, which splits the data, trains and tests, and the classes of its runs and results.
An executor carries out the trials, in this process or on other machines.
Every finished run is written at once, its weights beside it, so a comparison that was killed goes on where it was,
after checking that each run is what it says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from .._files import read_json
from ._distributed import Group
from ._weights import damage, read_weights, save_weights
from .executor import Executor, LocalExecutor, Task, Trial
from .result import Result, describe

Setting = Mapping[str, float]
Metrics = Mapping[str, float]
BetterBy = Sequence[
    tuple[str, float]
]  # names of metrics with 1 (larger is better) or -1; the first that differs decides
BY_ACCURACY: BetterBy = (("accuracy", 1.0), ("loss", -1.0))
LARGE = 1e9  # stands for a metric that is not finite: JSON has no infinity, and NaN is never worse than another


def rank(metrics: Metrics, better_by: BetterBy = BY_ACCURACY) -> tuple[float, ...]:
    """The key by which epochs and settings are compared; larger is better."""
    return tuple(sign * metrics[name] for name, sign in better_by)


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Attributes:
        name: as in tables and on the command line.
        summary: one line about it.
        grid: values to try, by name; every combination is one setting. A method without any trains nothing.
        attach: puts the method on a model, in the way of the experiment. None: the model is left alone.
        optional: further settings it understands.
        nonnegative: settings that may be zero; all others have to be positive.
    """

    name: str
    summary: str
    grid: Mapping[str, Sequence[float]]
    attach: Callable[..., Any] | None = None
    optional: tuple[str, ...] = ()
    nonnegative: tuple[str, ...] = ()

    def settings(self, grid: Mapping[str, Sequence[float]] | None = None) -> list[dict[str, float]]:
        """Combine the grid's values in all ways, with ``grid``'s in place of or besides the method's own.

        Raises:
            ValueError: a name this method does not have, no values for a name, or one out of range.
        """
        known = [*self.grid, *self.optional]
        if unknown := [name for name in grid or {} if name not in known]:
            raise ValueError(f"grids: {self.name} has the settings {known}, got {unknown}")
        merged = {**self.grid, **(grid or {})}
        for name, values in merged.items():
            if not len(values) or not all(v > 0 or (v == 0 and name in self.nonnegative) for v in values):
                raise ValueError(f"grids: {self.name}.{name} must be one or more positive numbers, got {list(values)}")
        return [dict(zip(merged, values)) for values in itertools.product(*merged.values())]


Plan = list[tuple[Method, list[dict[str, float]]]]


def plan_of(methods: Iterable[Method], grids: Mapping[str, Mapping[str, Sequence[float]]] | None) -> Plan:
    """Each method with the settings to try.

    Raises:
        ValueError: grids of a method that does not take part, or that do not fit it (see :meth:`Method.settings`).
    """
    chosen = {method.name: method for method in methods}
    if unknown := sorted(set(grids or {}) - set(chosen)):
        raise ValueError(f"grids must be of methods that take part, {list(chosen)}, got {unknown}")
    return [(method, method.settings((grids or {}).get(name))) for name, method in chosen.items()]


# --- runs and results -------------------------------------------------------------------------------------------------


@dataclass
class TrainingLog:
    """Validation metrics after every epoch, and what was trained at the best one.

    Attributes:
        better_by: metrics by which epochs are compared.
        epochs: metrics, all of them finite.
        best: number of the best epoch, from 1; of equals the first.
        state: copies of what was trained, at the best epoch.
        details: further fields of the :class:`RunResult`.
        seconds: time that training took, in the process that trained.
    """

    better_by: BetterBy = BY_ACCURACY
    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, metrics: Metrics, state: Callable[[], dict[str, Tensor]]) -> None:
        """Note an epoch; ``state`` is called if it is the best so far."""
        self.epochs.append({name: value if math.isfinite(value) else LARGE for name, value in metrics.items()})
        if not self.best or rank(self.epochs[-1], self.better_by) > rank(self.validation, self.better_by):
            self.best, self.state = len(self.epochs), state()

    @property
    def validation(self) -> dict[str, float]:
        return self.epochs[self.best - 1]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run: a method with a setting, trained on the examples of one seed.

    Attributes:
        method, seed, setting: what ran.
        parameters: how many numbers were trained.
        epochs: validation metrics after each epoch.
        best: the epoch that was kept, from 1; 0 for a model that is not trained.
        seconds: time to train.
        test: score on the test examples; None for a run that only served to choose the setting.
        weights: size and digest of the file of what was trained; None where nothing was, and in results that are older
            than this entry.
    """

    method: str
    seed: int
    setting: dict[str, float]
    parameters: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0
    test: Any = None
    weights: dict[str, Any] | None = None

    @property
    def validation(self) -> dict[str, float]:
        """Metrics of the epoch that was kept."""
        return self.epochs[self.best - 1] if self.best else {}

    @property
    def where(self) -> tuple[str, ...]:
        """Names of what was compared; runs that share them differ in seed or setting."""
        return (self.method,)

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies a run within a result."""
        return (*self.where, self.seed, tuple(sorted(self.setting.items())))

    @property
    def title(self) -> str:
        """The run in words: ``"resnet18, flowers, tct, seed 42, lr 0.1"``."""
        return ", ".join([*self.where, f"seed {self.seed}", *([describe(self.setting)] if self.setting else [])])

    @property
    def filename(self) -> str:
        name = re.sub(r"[^\w.+-]+", "-", "_".join(map(str, (*self.where, self.seed))))
        return f"{name}_{hashlib.sha256(repr(self.key).encode()).hexdigest()[:8]}.safetensors"

    def untested(self: R) -> R:
        """The same run without its test."""
        return replace(self, test=None)


R = TypeVar("R", bound=RunResult)
C = TypeVar("C", bound="ComparisonResult[Any]")


def weights_path(folder: str | os.PathLike[str], run: RunResult) -> Path:
    """The file in which a comparison in ``folder`` keeps what a run trained."""
    return Path(folder) / "weights" / run.filename


@dataclass(frozen=True)
class ComparisonResult(Result, Generic[R]):
    """The runs of a comparison.

    Attributes:
        runs: those so far, those that only chose settings included.
        setup: everything that decides the numbers.
        seconds: time of the last call.
    """

    runs: tuple[R, ...]
    setup: dict[str, Any]
    seconds: float = 0.0

    RUN: ClassVar[type[Any]]
    GROWS: ClassVar[tuple[str, ...]] = ("methods",)  # entries of the set-up that may get more names in a later call
    FIELDS: ClassVar[tuple[str, ...]] = ()  # further entries of the file that are fields

    @property
    def better_by(self) -> BetterBy:
        """Metrics by which validations are compared."""
        return BY_ACCURACY

    def tested(self, *where: str) -> list[R]:
        """The tested runs of a method (see :attr:`RunResult.where`), by seed."""
        return sorted((r for r in self.runs if r.where == where and r.test is not None), key=lambda r: r.seed)

    def tried(self, *where: str) -> list[R]:
        """The runs among which validation chose a setting: those on the first seed, or on the first ``choose_on``."""
        seeds = self.setup["seeds"][: self.setup.get("choose_on", 1)]
        return [r for r in self.runs if r.where == where and r.seed in seeds]

    def contradiction(self, run: R) -> str | None:
        """A sentence about what in a run does not agree with the rest of it; None if all does."""
        try:
            ranks = [rank(epoch, self.better_by) for epoch in run.epochs]
            if bool(ranks) != bool(run.setting) or not all(math.isfinite(value) for r in ranks for value in r):
                return f"its {len(ranks)} epochs are not numbers of validation"
            best = ranks.index(max(ranks)) + 1 if ranks else 0
            if run.best != best:
                return f"it names epoch {run.best} as its best, which is epoch {best}"
            return self.wrong_scores(run)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            return f"it is damaged ({error!r})"

    def wrong_scores(self, run: R) -> str | None:
        """A sentence about scores of a run that do not add up; None if they do. May raise for damaged values."""
        raise NotImplementedError

    def entries(self) -> dict[str, Any]:
        return {"setup": self.setup, "cells": [asdict(run) for run in self.runs], "seconds": self.seconds}

    @classmethod
    def read(cls: type[C], path: str | os.PathLike[str]) -> C:
        """A result from a file.

        Raises:
            ValueError: the file has no result of this kind.
        """
        values = read_json(path)
        try:
            if values["schema"] != cls.SCHEMA:
                raise ValueError(f"expected the schema {cls.SCHEMA}, got {values['schema']}")
            runs = tuple(cls.RUN(**run) for run in values["cells"])
            more = {name: values[name] for name in cls.FIELDS}
            return cls(runs, dict(values["setup"]), float(values["seconds"]), **more)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of this kind: {error!r}") from None

    def resume(self: C, path: str | os.PathLike[str]) -> C:
        """This result, which has no runs yet, with those of a file, if there is one, and what its set-up has besides.

        Seeds, and names in the entries ``GROWS``, may be added; whatever is there must be what it was.

        Raises:
            ValueError: the file is of another set-up, or is no result; the message names what differs.
        """
        if not Path(path).exists():
            return self
        way_out = "delete it to start anew, or choose another folder"
        try:
            saved = type(self).read(path)
        except ValueError as error:
            raise ValueError(f"{error}; {way_out}") from error
        now, before = json.loads(json.dumps(self.setup)), saved.setup
        free = (*self.GROWS, "seeds")
        differ = sorted(k for k in now.keys() | before.keys() if k not in free and now.get(k) != before.get(k))
        try:
            for entry in self.GROWS:
                both = now[entry].keys() & before[entry].keys()
                differ += [f"{entry}: {name}" for name in sorted(both) if now[entry][name] != before[entry][name]]
            if now["seeds"][0] != before["seeds"][0]:
                differ.append("the first seed")
            merged = {**now, **{entry: {**before[entry], **now[entry]} for entry in self.GROWS}}
            merged["seeds"] = [*now["seeds"], *(s for s in before["seeds"] if s not in now["seeds"])]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a result of this kind: {error!r}; {way_out}") from None
        if differ:
            raise ValueError(f"{path} is the result of another set-up (different: {', '.join(differ)}); {way_out}")
        return replace(self, runs=saved.runs, setup=merged)


# --- the engine -------------------------------------------------------------------------------------------------------


class Study(Generic[C]):
    """A comparison at work: its result so far, the folder where runs are kept, and what carries out its trials.

    Choosing and writing is done in this process alone, whoever trains, and runs stand in the order of the plan, whichever
    ends first.
    """

    def __init__(
        self,
        result: C,
        folder: Path,
        group: Group,
        executor: Executor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.result, self.folder, self.group = result, folder, group
        self.executor, self.extra = executor or LocalExecutor(), extra or {}
        self.file = folder / "result.json"
        self._started = time.perf_counter()
        self._order: dict[tuple[Any, ...], int] = {}

    @classmethod
    @contextmanager
    def opened(
        cls,
        result: C,
        out: str | os.PathLike[str] | None,
        group: Group,
        executor: Executor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Iterator[Study[C]]:
        """Resume what is in the folder ``out``; None: a temporary one. ``extra`` goes into the result file.

        Runs that are not what they say are left out, with a warning; they will be done again.

        Raises:
            ValueError: an executor for other machines under ``torchrun``.
        """
        if group.size > 1 and not isinstance(executor, LocalExecutor | None):
            raise ValueError(f"executor must be a LocalExecutor under torchrun, got a {type(executor).__name__}")
        with tempfile.TemporaryDirectory() if out is None else nullcontext(str(out)) as path:
            study = cls(result, Path(group.share(path)).absolute(), group, executor, extra)
            study.result, damaged = group.share(study._resumed() if group.rank == 0 else (result, []))
            for sentence in damaged:
                study._warn(sentence)
            yield study
            group.meet()

    def _resumed(self) -> tuple[C, list[str]]:
        """Read the result and check its runs. A tested run needs the weights that it left; of the others only the chosen."""
        result = self.result.resume(self.file)
        sound, damaged = [], []
        for run in result.runs:
            reason = result.contradiction(run)
            if reason is None and run.test is not None and run.setting:
                reason = damage(weights_path(self.folder, run), run.weights)
            if reason is None:
                sound.append(run)
            else:
                damaged.append(f"{run.title}: {reason}; this run is done again")
        return replace(result, runs=tuple(sound)), damaged

    def run(self, tasks: Iterable[Task], plan: Plan, seeds: Sequence[int], choose_on: int = 1) -> None:
        """Run what is missing of the plan on every task; the first ``choose_on`` seeds choose between settings."""
        self.executor.run(
            self._compared(task, method, settings, seeds, choose_on) for task in tasks for method, settings in plan
        )

    async def _compared(
        self, task: Task, method: Method, settings: Sequence[Setting], seeds: Sequence[int], choose_on: int
    ) -> None:
        """Choose a method's setting, and test it."""
        for setting, seed in itertools.product(settings, seeds):
            self._order.setdefault(self._blank(task, method, setting, seed).key, len(self._order))
        choosing = itertools.product(settings, seeds[:choose_on])
        runs = await self.executor.together(self._trained(task, method, *trial) for trial in choosing)
        tried = [runs[i : i + choose_on] for i in range(0, len(runs), choose_on)]
        best = (max(tried, key=self._rank) if tried[1:] else tried[0])[0]
        for run in self.result.tested(*best.where):
            if run.setting != best.setting:
                self._warn(f"{run.title}: validation chooses {describe(best.setting)}; its test does not count")
                self._keep(run.untested())
        last = seeds if best.setting else seeds[:1]
        await self.executor.together(self._tested(task, method, best.setting, seed) for seed in last)
        if self.group.rank == 0:
            for run in runs:
                if run.setting != best.setting:
                    weights_path(self.folder, run).unlink(missing_ok=True)

    def _rank(self, runs: Sequence[RunResult]) -> tuple[float, ...]:
        """The rank of one setting, by the means of its validation metrics over seeds."""
        means = {name: mean(run.validation[name] for run in runs) for name, _ in self.result.better_by}
        return rank(means, self.result.better_by)

    def _blank(self, task: Task, method: Method, setting: Setting, seed: int) -> Any:
        """A run before it is trained."""
        return self.result.RUN(**task.names(), method=method.name, seed=seed, setting=dict(setting))

    async def _trained(self, task: Task, method: Method, setting: Setting, seed: int, to_test: bool = False) -> Any:
        blank = self._blank(task, method, setting, seed)
        known = next((run for run in self.result.runs if run.key == blank.key), None)
        if known is not None and to_test and known.test is None and setting:
            path = weights_path(self.folder, known)
            if reason := self.group.share(damage(path, known.weights) if self.group.rank == 0 else None):
                self._warn(f"{known.title}: {reason}; this run is done again")
                known = None
        if known is not None or not setting:
            return known or blank
        log = await self.executor.carry_out(Trial(task, method, blank))
        path = weights_path(self.folder, blank)
        record = self.group.share(save_weights(path, log.state) if self.group.rank == 0 else None)
        run = replace(blank, epochs=log.epochs, best=log.best, seconds=log.seconds, weights=record, **log.details)
        self._keep(run)
        return run

    async def _tested(self, task: Task, method: Method, setting: Setting, seed: int) -> None:
        run = await self._trained(task, method, setting, seed, to_test=True)
        if run.test is None:
            state = read_weights(weights_path(self.folder, run)) if run.setting else {}
            scores = await self.executor.carry_out(Trial(task, method, run, state))
            self._keep(replace(run, **scores))

    def _keep(self, run: Any) -> None:
        """Put a run in place of its earlier self, and write the result."""
        others = [known for known in self.result.runs if known.key != run.key]
        runs = sorted([*others, run], key=lambda run: self._order.get(run.key, -1))  # first those of earlier plans
        self.result = replace(self.result, runs=tuple(runs), seconds=time.perf_counter() - self._started)
        if self.group.rank == 0:
            self.result.save(self.file, **self.extra)

    def _warn(self, sentence: str) -> None:
        if self.group.rank == 0:
            warnings.warn(f"{self.file}: {sentence}", stacklevel=4)
