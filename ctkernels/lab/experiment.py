"""The experiment engine: methods x settings x seeds. Validation chooses a setting; every seed trains and tests it once.

An experiment defines a :class:`Task`, which splits the data, trains and tests, and the classes of its runs and results. An
executor runs the trials, in this process or on other machines. Every finished run is written at once with its weights, so
that a comparison that was interrupted resumes, after checking the consistency of each run.
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

from torch import Tensor, nn

from .._files import read_json
from ._distributed import Group
from ._weights import damage, read_weights, save_weights
from .executor import Executor, LocalExecutor, Task, Trial
from .result import Result, describe

Setting = Mapping[str, float]
Metrics = Mapping[str, float]
Source = nn.Module | Callable[[], nn.Module]  # a network, or a function that builds it
BetterBy = Sequence[tuple[str, float]]  # metrics with 1 (larger is better) or -1, in lexicographic order
BY_ACCURACY: BetterBy = (("accuracy", 1.0), ("loss", -1.0))
LARGE = 1e9  # replaces a metric that is not finite: JSON has no infinity, and NaN cannot be compared
WAY_OUT = "delete it to start anew, or choose another folder"


def build(source: Source) -> nn.Module:
    """The network itself, or the result of the function that builds it."""
    return source if isinstance(source, nn.Module) else source()


def rank(metrics: Metrics, better_by: BetterBy = BY_ACCURACY) -> tuple[float, ...]:
    """The key by which epochs and settings are compared; larger is better."""
    return tuple(sign * metrics[name] for name, sign in better_by)


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A method of adapting a model.

    Attributes:
        name: in tables and on the command line.
        summary: one line about it.
        grid: values to try, by name; every combination is one setting. A method with an empty grid trains nothing.
        attach: attaches the method to a model; each experiment defines the signature. None: the model is unchanged.
        optional: further settings that it accepts.
        nonnegative: settings that may be zero; all others must be positive.
    """

    name: str
    summary: str
    grid: Mapping[str, Sequence[float]]
    attach: Callable[..., Any] | None = None
    optional: tuple[str, ...] = ()
    nonnegative: tuple[str, ...] = ()

    def settings(self, grid: Mapping[str, Sequence[float]] | None = None) -> list[dict[str, float]]:
        """All combinations of the values of the method's grid, updated by ``grid``.

        Raises:
            ValueError: the method has no such setting, or a setting has no values or one out of range.
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
    """The methods, each with the settings to try.

    Raises:
        ValueError: a grid is of a method that does not take part, or does not fit it (see :meth:`Method.settings`).
    """
    by_name = {method.name: method for method in methods}
    if unknown := sorted(set(grids or {}) - set(by_name)):
        raise ValueError(f"grids must be of methods that take part, {list(by_name)}, got {unknown}")
    return [(method, method.settings((grids or {}).get(name))) for name, method in by_name.items()]


# --- runs and results -------------------------------------------------------------------------------------------------


@dataclass
class TrainingLog:
    """Validation metrics after every epoch, and the trained state of the best epoch.

    Attributes:
        better_by: metrics by which epochs are compared.
        epochs: metrics of every epoch, all finite.
        best: number of the best epoch, from 1; the first among equals.
        state: copies of the trained tensors at the best epoch.
        details: further fields of the :class:`RunResult`.
        seconds: duration of the training.
    """

    better_by: BetterBy = BY_ACCURACY
    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, metrics: Metrics, state: Callable[[], dict[str, Tensor]]) -> None:
        """Adds an epoch. ``state``: returns the trained state; called if the epoch is the best so far."""
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
        method, seed, setting: of the run.
        parameters: number of trained values.
        epochs: validation metrics after each epoch.
        best: number of the epoch that was kept, from 1; 0 for a model that is not trained.
        seconds: duration of the training.
        test: score on the test examples; None for a run that was only used to choose a setting.
        weights: size and digest of the file of trained weights; None for a model that is not trained, and in older
            results.
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
        """The names of method, model and data; runs with the same names differ in seed or setting."""
        return (self.method,)

    @property
    def key(self) -> tuple[Any, ...]:
        """The identity of the run within a result."""
        return (*self.where, self.seed, tuple(sorted(self.setting.items())))

    @property
    def title(self) -> str:
        """The run as text: ``"resnet18, flowers, tct, seed 42, lr 0.1"``."""
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
    """The file of a run's trained weights, in the folder of the comparison."""
    return Path(folder) / "weights" / run.filename


@dataclass(frozen=True)
class ComparisonResult(Result, Generic[R]):
    """The runs of a comparison.

    Attributes:
        runs: finished runs, including those that were only used to choose settings.
        setup: everything that determines the numbers.
        seconds: duration of the last call.
    """

    runs: tuple[R, ...]
    setup: dict[str, Any]
    seconds: float = 0.0

    RUN: ClassVar[type[Any]]
    GROWS: ClassVar[tuple[str, ...]] = ("methods",)  # entries of the setup to which a later call may add names
    FIELDS: ClassVar[tuple[str, ...]] = ()  # further entries of the file that are fields

    @property
    def better_by(self) -> BetterBy:
        """Metrics by which validations are compared."""
        return BY_ACCURACY

    def tested(self, *where: str) -> list[R]:
        """The tested runs with these names (see :attr:`RunResult.where`), by seed."""
        return sorted((r for r in self.runs if r.where == where and r.test is not None), key=lambda r: r.seed)

    def tried(self, *where: str) -> list[R]:
        """The runs that were used to choose a setting: those on the first seed, or on the first ``choose_on``."""
        seeds = self.setup["seeds"][: self.setup.get("choose_on", 1)]
        return [r for r in self.runs if r.where == where and r.seed in seeds]

    def contradiction(self, run: R) -> str | None:
        """An inconsistency within a run, as a sentence; None if there is none."""
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
        """An inconsistency in the scores of a run, as a sentence; None if there is none. May raise for damaged values."""
        raise NotImplementedError

    def entries(self) -> dict[str, Any]:
        return {"setup": self.setup, "cells": [asdict(run) for run in self.runs], "seconds": self.seconds}

    @classmethod
    def read(cls: type[C], path: str | os.PathLike[str]) -> C:
        """Reads a result from a file.

        Raises:
            ValueError: the file is no result of this kind.
        """
        values = read_json(path)
        try:
            if values["schema"] != cls.SCHEMA:
                raise ValueError(f"expected the schema {cls.SCHEMA}, got {values['schema']}")
            runs = tuple(cls.RUN(**run) for run in values["cells"])
            fields = {name: values[name] for name in cls.FIELDS}
            return cls(runs, dict(values["setup"]), float(values["seconds"]), **fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of this kind: {error!r}") from None

    def resume(self: C, path: str | os.PathLike[str]) -> C:
        """This result with the runs of a file, if it exists, and with the names and seeds that its setup has besides.

        A later call may add seeds, and names to the entries ``GROWS``; everything else must be equal.

        Raises:
            ValueError: the file has another setup, or is no result of this kind; the message names the differences.
        """
        if not Path(path).exists():
            return self
        try:
            saved = type(self).read(path)
        except ValueError as error:
            raise ValueError(f"{error}; {WAY_OUT}") from error
        setup, saved_setup = json.loads(json.dumps(self.setup)), saved.setup
        differ = different(setup, saved_setup, except_for=(*self.GROWS, "seeds"))
        try:
            for entry in self.GROWS:
                differ += [
                    f"{entry}: {name}"
                    for name in sorted(setup[entry].keys() & saved_setup[entry].keys())
                    if setup[entry][name] != saved_setup[entry][name]
                ]
            if setup["seeds"][0] != saved_setup["seeds"][0]:
                differ.append("the first seed")
            merged = {**setup, **{entry: {**saved_setup[entry], **setup[entry]} for entry in self.GROWS}}
            merged["seeds"] = list(dict.fromkeys([*setup["seeds"], *saved_setup["seeds"]]))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a result of this kind: {error!r}; {WAY_OUT}") from None
        if differ:
            raise ValueError(f"{path} is the result of another set-up (different: {', '.join(differ)}); {WAY_OUT}")
        return replace(self, runs=saved.runs, setup=merged)


def different(setup: Mapping[str, Any], other: Mapping[str, Any], except_for: Sequence[str] = ()) -> list[str]:
    """The names of the entries in which two setups differ."""
    return sorted(k for k in setup.keys() | other.keys() if k not in except_for and setup.get(k) != other.get(k))


# --- the engine -------------------------------------------------------------------------------------------------------


class Study(Generic[C]):
    """A running comparison: its result so far, the folder of its files, and the executor of its trials.

    Settings are chosen and files written in this process, wherever trials run. Runs are in the order of the plan, in
    whatever order they end.
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
        """Opens or resumes a comparison in the folder ``out``; None: a temporary folder.

        ``extra`` entries are added to the result file. Inconsistent runs are dropped with a warning, and done again.

        Raises:
            ValueError: the executor uses other machines, under ``torchrun``; or ``out`` is of another setup.
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
        """Reads the result and checks its runs; those that were tested must have their weights."""
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
        """Runs the missing runs of the plan on every task; the first ``choose_on`` seeds choose between settings."""
        self.executor.run(
            self._run_method(task, method, settings, seeds, choose_on) for task in tasks for method, settings in plan
        )

    async def _run_method(
        self, task: Task, method: Method, settings: Sequence[Setting], seeds: Sequence[int], choose_on: int
    ) -> None:
        """Chooses a setting of a method, and tests it."""
        for setting, seed in itertools.product(settings, seeds):
            self._order.setdefault(self._untrained(task, method, setting, seed).key, len(self._order))
        choosing = itertools.product(settings, seeds[:choose_on])
        runs = await self.executor.gather(self._train(task, method, *trial) for trial in choosing)
        by_setting = [runs[i : i + choose_on] for i in range(0, len(runs), choose_on)]
        best = (max(by_setting, key=self._rank) if by_setting[1:] else by_setting[0])[0]
        for run in self.result.tested(*best.where):
            if run.setting != best.setting:
                self._warn(f"{run.title}: validation chooses {describe(best.setting)}; its test does not count")
                self._keep(run.untested())
        to_test = seeds if best.setting else seeds[:1]
        await self.executor.gather(self._test(task, method, best.setting, seed) for seed in to_test)
        if self.group.rank == 0:
            for run in runs:
                if run.setting != best.setting:
                    weights_path(self.folder, run).unlink(missing_ok=True)

    def _rank(self, runs: Sequence[RunResult]) -> tuple[float, ...]:
        """The rank of a setting: that of its validation metrics, averaged over seeds."""
        means = {name: mean(run.validation[name] for run in runs) for name, _ in self.result.better_by}
        return rank(means, self.result.better_by)

    def _untrained(self, task: Task, method: Method, setting: Setting, seed: int) -> Any:
        return self.result.RUN(**task.names(), method=method.name, seed=seed, setting=dict(setting))

    async def _train(self, task: Task, method: Method, setting: Setting, seed: int, to_test: bool = False) -> Any:
        """The trained run, from an earlier call if its weights are intact (which only a test needs)."""
        untrained = self._untrained(task, method, setting, seed)
        path = weights_path(self.folder, untrained)
        finished = next((run for run in self.result.runs if run.key == untrained.key), None)
        if finished is not None and to_test and finished.test is None and setting:
            reason = self.group.share(damage(path, finished.weights) if self.group.rank == 0 else None)
            if reason is not None:
                self._warn(f"{finished.title}: {reason}; this run is done again")
                finished = None
        if finished is not None or not setting:
            return finished or untrained
        log = await self.executor.run_trial(Trial(task, method, untrained))
        record = self.group.share(save_weights(path, log.state) if self.group.rank == 0 else None)
        run = replace(untrained, epochs=log.epochs, best=log.best, seconds=log.seconds, weights=record, **log.details)
        self._keep(run)
        return run

    async def _test(self, task: Task, method: Method, setting: Setting, seed: int) -> None:
        run = await self._train(task, method, setting, seed, to_test=True)
        if run.test is None:
            state = read_weights(weights_path(self.folder, run)) if run.setting else {}
            scores = await self.executor.run_trial(Trial(task, method, run, state))
            self._keep(replace(run, **scores))

    def _keep(self, run: Any) -> None:
        """Replaces or adds a run, and writes the result."""
        others = [other for other in self.result.runs if other.key != run.key]
        runs = sorted([*others, run], key=lambda run: self._order.get(run.key, -1))  # those of earlier plans first
        self.result = replace(self.result, runs=tuple(runs), seconds=time.perf_counter() - self._started)
        if self.group.rank == 0:
            self.result.save(self.file, **self.extra)

    def _warn(self, sentence: str) -> None:
        if self.group.rank == 0:
            warnings.warn(f"{self.file}: {sentence}", stacklevel=4)
