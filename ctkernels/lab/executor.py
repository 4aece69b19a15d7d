"""Executors of the trials of an experiment: this process, or the machines of a Ray cluster.

The engine consists of coroutines that await trials. In this process an awaited trial runs at once, so coroutines run one
after the other; on Ray, independent coroutines run concurrently.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .._extras import require
from .._factories import told
from ..cli.errors import is_bad_input
from ..cli.option_types import CLUSTER
from ._progress import bar
from .result import versions

T = TypeVar("T")
Work = Coroutine[Any, Any, T]
RETRIES = 3  # of a trial whose worker or machine died


class Task(Protocol):
    """An experiment on one model and one data set.

    The model and the data are loaded when :meth:`train` or :meth:`test` is called: a finished comparison calls neither.
    """

    @property
    def gpu(self) -> bool:
        """Whether it runs on a GPU if there is one."""
        ...

    def names(self) -> dict[str, Any]:
        """The fields of a run that name the model and the data."""
        ...

    def train(self, method: Any, run: Any) -> Any:
        """Trains ``run.setting`` on the examples of ``run.seed``. Returns a :class:`TrainingLog`."""
        ...

    def test(self, method: Any, run: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fields of the run with its test scores. ``state``: of the log of :meth:`train`."""
        ...

    def factory(self) -> Callable[[], Task]:
        """A picklable function that constructs this task in another process.

        It raises ValueError if the model or the data loaded there differ from this process's.
        """
        ...


class Trial(NamedTuple):
    """A run to train, or, with its trained ``state``, to test."""

    task: Task
    method: Any
    run: Any
    state: Mapping[str, Tensor] | None = None

    def outcome(self) -> Any:
        """Trains or tests. Returns the training log, or the fields of the run with its test scores."""
        if self.state is None:
            started = time.perf_counter()
            log = self.task.train(self.method, self.run)
            log.seconds = time.perf_counter() - started
            return log
        return self.task.test(self.method, self.run, self.state)


class Executor(Protocol):
    """Runs trials."""

    def run(self, works: Iterable[Work[Any]]) -> None:
        """Runs coroutines to completion."""
        ...

    async def gather(self, works: Iterable[Work[T]]) -> list[T]:
        """The results of independent coroutines, in order."""
        ...

    async def run_trial(self, trial: Trial) -> Any:
        """The outcome of a trial."""
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """Runs trials in this process, one after the other; under ``torchrun`` the processes share each trial."""

    def run(self, works: Iterable[Work[Any]]) -> None:
        for work in works:
            try:
                work.send(None)  # without an event loop, as trials may run their own
            except StopIteration:
                continue
            raise RuntimeError("a coroutine waits for something else than a trial")

    async def gather(self, works: Iterable[Work[T]]) -> list[T]:
        return [await work for work in works]

    async def run_trial(self, trial: Trial) -> Any:
        return trial.outcome()


class RayExecutor:
    """Runs trials on the machines of a Ray cluster; needs ``ctkernels[ray]``.

    Workers train and test; this process chooses settings and writes files. A trial uses as many CPUs as torch has threads
    here, and a GPU if the cluster has any. A trial whose worker or machine died is repeated, at most three times.

    Args:
        address: ``"auto"``: the cluster of this machine. ``"HOST:PORT"``: the cluster with that head node. ``"local"``: a
            cluster of this machine alone, which ends with the comparison. An existing connection of this process to Ray
            is used and kept.
        progress: show a count of trials on standard error.

    Raises:
        ImportError: ray is missing; the message names the extra.
        ValueError: the address has another form.

    Examples:
        >>> compare_transfer(models, data, executor=RayExecutor("local"))  # doctest: +SKIP
    """

    def __init__(self, address: str = "auto", *, progress: bool = True) -> None:
        self._ray: Any = require("ray", "ray", "running trials on several machines")
        CLUSTER.check("address", address)
        self.address, self.progress = address, progress
        self._stored: dict[int, Any] = {}  # tasks in Ray's object store, by id
        self._advance: Callable[[int], object] = lambda step: None

    def run(self, works: Iterable[Work[Any]]) -> None:
        async def run_all() -> None:
            await self.gather(works)

        with self._connected(), bar(None, "trials", self.progress) as self._advance:
            if _has_event_loop():  # the thread of a notebook
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(asyncio.run, run_all()).result()
            else:
                asyncio.run(run_all())

    async def gather(self, works: Iterable[Work[T]]) -> list[T]:
        return await asyncio.gather(*works)

    async def run_trial(self, trial: Trial) -> Any:
        errors = self._ray.exceptions
        remote = self._ray.remote(_in_worker).options(
            name=trial.run.title, max_retries=RETRIES, **self._resources(trial.task)
        )
        environment = _Environment(versions(), torch.get_num_threads(), os.getcwd())
        reference = remote.remote([self._reference(trial.task)], environment, trial.method, trial.run, trial.state)
        try:
            outcome = await reference
        except asyncio.CancelledError:  # interrupted, or another trial failed
            self._ray.cancel(reference, force=True)
            raise
        except errors.RayTaskError:  # an error in the trial, with the worker's traceback
            raise
        except errors.RayError as error:
            title = f"{trial.run.title}: no worker came to its end in {RETRIES + 1} tries"
            raise ChildProcessError(f"{title}, the last: {told(error)}") from error
        if isinstance(outcome, _BadInput):
            raise outcome.error
        self._advance(1)
        return outcome

    def _reference(self, task: Task) -> Any:
        """The task in Ray's object store, from which each machine copies it once."""
        if id(task) not in self._stored:
            self._stored[id(task)] = (
                task,
                self._ray.put(task.factory()),
            )  # the task is kept, so that its id stays unique
        return self._stored[id(task)][1]

    def _resources(self, task: Task) -> dict[str, float]:
        """The resources that a trial needs.

        Raises:
            ValueError: no machine has them; Ray would wait for one.
        """
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus, most = torch.get_num_threads(), max(machine.get("CPU", 0) for machine in machines)
        gpus = int(task.gpu and any(machine.get("GPU") for machine in machines))
        if not any(m.get("CPU", 0) >= cpus and m.get("GPU", 0) >= gpus for m in machines):
            raise ValueError(
                f"a trial takes {cpus} CPUs, as many as torch has threads here, and {gpus} GPUs; expected a machine of the "
                f"cluster that has them, got up to {most:g} CPUs (set OMP_NUM_THREADS)"
            )
        return {"num_cpus": cpus, "num_gpus": gpus}

    @contextmanager
    def _connected(self) -> Iterator[None]:
        connects = not self._ray.is_initialized()
        if connects:
            if self.address == "local":
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._ray.init(self.address, logging_level="warning")
        try:
            yield
        finally:
            self._stored.clear()
            if connects:
                self._ray.shutdown()


def _has_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# --- in a worker ------------------------------------------------------------------------------------------------------


class _Environment(NamedTuple):
    """The environment of the process that runs the comparison, which workers adopt."""

    versions: dict[str, str]
    threads: int
    folder: str


@dataclass(frozen=True)
class _BadInput:
    """An error about the user's input, which is raised again in the process that runs the comparison."""

    error: Exception


_TASKS: dict[Any, Task] = {}  # the task of the last trial, which is usually that of the next


def _in_worker(
    boxed: list[Any], environment: _Environment, method: Any, run: Any, state: Mapping[str, Tensor] | None
) -> Any:
    """Runs a trial. ``boxed`` holds the reference to the task, in a list so that Ray does not resolve it for every trial."""
    try:
        (reference,) = boxed
        if reference not in _TASKS:
            _adopt(environment)
            _TASKS.clear()
            _TASKS[reference] = require("ray", "ray", "a worker").get(reference)()
        return Trial(_TASKS[reference], method, run, state).outcome()
    except Exception as error:
        if is_bad_input(error):
            return _BadInput(error)
        raise


def _adopt(environment: _Environment) -> None:
    """Adopts threads and working directory of the process that runs the comparison.

    Raises:
        ValueError: this machine has other versions of packages, which may compute other numbers.
    """
    installed, required = versions(), environment.versions
    if differ := sorted(name for name in installed | required if installed.get(name) != required.get(name)):
        expected, got = ({name: packages.get(name) for name in differ} for packages in (required, installed))
        raise ValueError(f"machine {socket.gethostname()}: expected the versions {expected}, got {got}")
    torch.set_num_threads(environment.threads)  # the order of summation depends on it
    if Path(environment.folder).is_dir():
        os.chdir(environment.folder)  # for relative paths of data
