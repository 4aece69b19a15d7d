"""Where the trials of an experiment run: in this process, or on the machines of a Ray cluster.

The engine is written once, as coroutines that await trials. In this process a trial is over when it is awaited, so the
coroutines run one after the other; on Ray all that do not need one another's trials go on at once.
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
RETRIES = 3  # how often a trial is repeated whose worker or machine died


class Task(Protocol):
    """The part of an experiment that the engine does not know, on one model and one data set.

    Nothing has to be ready before :meth:`train` or :meth:`test` is called: a finished comparison calls neither.
    """

    @property
    def gpu(self) -> bool:
        """Whether it runs on a GPU where there is one."""
        ...

    def names(self) -> dict[str, Any]:
        """Fields of a run that name the model and the data."""
        ...

    def train(self, method: Any, run: Any) -> Any:
        """Train ``run.setting`` on the examples of ``run.seed``. Returns a :class:`TrainingLog`."""
        ...

    def test(self, method: Any, run: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields of the run that hold its test scores, with ``state`` as :meth:`train` left it."""
        ...

    def elsewhere(self) -> Callable[[], Task]:
        """A function that makes this task in another process, to which it is pickled.

        It raises ValueError if what it loads there is not what it is here.
        """
        ...


class Trial(NamedTuple):
    """One run to train, or, with what it trained, to test."""

    task: Task
    method: Any
    run: Any
    state: Mapping[str, Tensor] | None = None

    def outcome(self) -> Any:
        """The log of training, or the scores of testing."""
        if self.state is None:
            started = time.perf_counter()
            log = self.task.train(self.method, self.run)
            log.seconds = time.perf_counter() - started
            return log
        return self.task.test(self.method, self.run, self.state)


class Executor(Protocol):
    """Carries out trials."""

    def run(self, works: Iterable[Work[Any]]) -> None:
        """Run coroutines to their end."""
        ...

    async def together(self, works: Iterable[Work[T]]) -> list[T]:
        """The results of coroutines that do not need one another, in order."""
        ...

    async def carry_out(self, trial: Trial) -> Any:
        """The outcome of a trial."""
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """Trials in this process, one after the other; under ``torchrun`` its processes share each."""

    def run(self, works: Iterable[Work[Any]]) -> None:
        for work in works:
            try:
                work.send(None)  # no event loop: trials may run one of their own
            except StopIteration:
                continue
            raise RuntimeError("a coroutine waits for something else than a trial")

    async def together(self, works: Iterable[Work[T]]) -> list[T]:
        return [await work for work in works]

    async def carry_out(self, trial: Trial) -> Any:
        return trial.outcome()


class RayExecutor:
    """Trials on the machines of a Ray cluster; needs ``ctkernels[ray]``.

    This process chooses and writes, as always; workers only train and test. A trial takes as many CPUs as torch has threads
    here, which it uses, and a GPU where the cluster has some. A trial whose worker or machine died is repeated, at most
    three times.

    Args:
        address: ``"auto"``: the cluster that this machine is part of. ``"HOST:PORT"``: the one with that head.
            ``"local"``: a cluster of this machine alone, for the time of the comparison. Where this process is connected
            to Ray already, it remains so.
        progress: count trials on standard error.

    Raises:
        ImportError: ray is missing; the message names the extra.
        ValueError: an address of another form.

    Examples:
        >>> compare_transfer(models, data, executor=RayExecutor("local"))  # doctest: +SKIP
    """

    def __init__(self, address: str = "auto", *, progress: bool = True) -> None:
        self._ray: Any = require("ray", "ray", "running trials on several machines")
        CLUSTER.check("address", address)
        self.address, self.progress = address, progress
        self._sent: dict[int, Any] = {}  # tasks in Ray's store, by their id here
        self._advance: Callable[[int], object] = lambda step: None

    def run(self, works: Iterable[Work[Any]]) -> None:
        async def everything() -> None:
            await self.together(works)

        with self._connected(), bar(None, "trials", self.progress) as self._advance:
            if _has_event_loop():  # a notebook's thread
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(asyncio.run, everything()).result()
            else:
                asyncio.run(everything())

    async def together(self, works: Iterable[Work[T]]) -> list[T]:
        return await asyncio.gather(*works)

    async def carry_out(self, trial: Trial) -> Any:
        errors = self._ray.exceptions
        remote = self._ray.remote(_in_worker).options(
            name=trial.run.title, max_retries=RETRIES, **self._resources(trial.task)
        )
        reference = remote.remote([self._reference(trial.task)], _origin(), trial.method, trial.run, trial.state)
        try:
            outcome = await reference
        except asyncio.CancelledError:  # interrupted, or another trial failed
            self._ray.cancel(reference, force=True)
            raise
        except errors.RayTaskError:  # a fault, with the worker's traceback
            raise
        except errors.RayError as error:
            title = f"{trial.run.title}: no worker came to its end in {RETRIES + 1} tries"
            raise ChildProcessError(f"{title}, the last: {told(error)}") from error
        if isinstance(outcome, _BadInput):
            raise outcome.error
        self._advance(1)
        return outcome

    def _reference(self, task: Task) -> Any:
        """The task in Ray's store, which brings it to a machine once; in a list, as workers unpack it once as well."""
        if id(task) not in self._sent:
            self._sent[id(task)] = task, self._ray.put(task.elsewhere())  # the task is kept, and so its id
        return self._sent[id(task)][1]

    def _resources(self, task: Task) -> dict[str, float]:
        """What a trial takes of a machine.

        Raises:
            ValueError: no machine has it; Ray would wait for one that does.
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
        ours = not self._ray.is_initialized()
        if ours:
            if self.address == "local":
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._ray.init(self.address, logging_level="warning")
        try:
            yield
        finally:
            self._sent.clear()
            if ours:
                self._ray.shutdown()


def _has_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# --- in a worker ------------------------------------------------------------------------------------------------------


class _Origin(NamedTuple):
    """What a worker shares with the process that runs the comparison."""

    versions: dict[str, str]
    threads: int
    folder: str


@dataclass(frozen=True)
class _BadInput:
    """An error that is raised again where the comparison runs, and told there as one that arose there."""

    error: Exception


_TASKS: dict[Any, Task] = {}  # the task at work: trials of one come one after the other


def _origin() -> _Origin:
    return _Origin(versions(), torch.get_num_threads(), os.getcwd())


def _in_worker(boxed: list[Any], origin: _Origin, method: Any, run: Any, state: Mapping[str, Tensor] | None) -> Any:
    """Carry out a trial of the task behind the reference in ``boxed``."""
    try:
        (reference,) = boxed
        if reference not in _TASKS:
            _settle(origin)
            _TASKS.clear()
            _TASKS[reference] = require("ray", "ray", "a worker").get(reference)()
        return Trial(_TASKS[reference], method, run, state).outcome()
    except Exception as error:
        if is_bad_input(error):
            return _BadInput(error)
        raise


def _settle(origin: _Origin) -> None:
    """Bring this process into line with the one that runs the comparison.

    Raises:
        ValueError: it has other versions, which may compute other numbers.
    """
    ours = versions()
    if differ := sorted(name for name in ours | origin.versions if ours.get(name) != origin.versions.get(name)):
        expected, got = ({name: having.get(name) for name in differ} for having in (origin.versions, ours))
        raise ValueError(f"machine {socket.gethostname()}: expected the versions {expected}, got {got}")
    torch.set_num_threads(origin.threads)  # with another number, sums are added up in another order
    if Path(origin.folder).is_dir():
        os.chdir(origin.folder)  # relative paths of data
