"""Comparable timings: contestants take turns in one process, and medians are reported."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import ctkernels

Contestants = dict[str, Callable[[], Any]]


def tune_allocator() -> str:
    """Make the allocator keep freed blocks, for all contestants.

    By default glibc returns large blocks to the system at once and maps fresh pages for the next result; page faults then
    cost more than the kernels. Returns a line that describes the setting.
    """
    try:
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1
        done = libc.mallopt(m_mmap_threshold, 1 << 30) and libc.mallopt(m_trim_threshold, largest)
    except (OSError, AttributeError):
        done = False
    if not done:
        return "allocator: untouched (no mallopt here): large results page-fault, for every contestant alike"
    return "allocator: glibc keeps freed blocks up to 1 GiB (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD), for every contestant alike"


def interleaved(
    contestants: Contestants,
    seconds: float = 1.5,
    least: int = 5,
    seldom: Collection[str] = (),
    seed: int = 0,
    wait: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each contestant; they run in turn, after one warm-up each, for about ``seconds`` in all.

    Every round, including the warm-up, has a random order from ``seed``, so that no contestant always follows the same one.
    Those in ``seldom``, slow ones far from their bounds, run in every fourth round. Only the faster half of the rounds, by
    the contestants' total time, counts: the slower half measures other load on the machine. ``wait`` waits for the work of
    a call on a device. ``clock`` reads the time, for example the CPU time of this thread.
    """
    order, shuffle = list(contestants.items()), random.Random(seed).shuffle
    shuffle(order)
    for _, run in order:
        run()
    gc.collect()
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < least:
        times = {}
        shuffle(order)
        for name, run in order:
            if name in seldom and len(rounds) % 4:
                continue
            if wait is not None:
                wait()
            start = clock()
            run()
            if wait is not None:
                wait()
            times[name] = clock() - start
        rounds.append(times)
    rounds.sort(key=lambda times: sum(t for name, t in times.items() if name not in seldom))

    def median(name: str) -> float:
        seconds = [times[name] for times in rounds if name in times]
        return statistics.median(seconds[: (len(seconds) + 1) // 2]) * 1e3

    return {name: median(name) for name in contestants}


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """``run`` as a CUDA graph, to time the device alone."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def over_processes(count: int, function: Callable[..., dict[str, dict[str, float]]], *args: Any) -> dict[str, Any]:
    """Geometric means of {part: {contestant: figure}}, returned by ``function(seed, *args)`` in ``count`` successive processes
    with different seeds; the entry "processes" has the single results.

    The placement of a process's memory changes ratios of whole networks by several percent.
    """
    records, spawn, threads = [], multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
    for seed in range(count):
        with ProcessPoolExecutor(1, spawn, initializer=_start, initargs=threads) as pool:
            records.append(pool.submit(function, seed, *args).result())
        if sys.stderr.isatty():
            print(f"process {seed + 1} of {count} done", file=sys.stderr)

    def mean(part: str) -> dict[str, float]:
        return {name: statistics.geometric_mean(r[part][name] for r in records) for name in records[0][part]}

    return {part: mean(part) for part in records[0]} | {"processes": records}


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    tune_allocator()


def without_grad(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """A contestant that calls ``function`` outside of autograd."""

    def call() -> None:
        with torch.no_grad():
            function(*args)

    return call


def with_gradients(
    function: Callable[..., torch.Tensor],
    args: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    dy: torch.Tensor,
) -> Callable[[], Any]:
    """A contestant that calls ``function`` and differentiates its result with respect to the tensors ``wanted``."""
    return lambda: torch.autograd.grad(function(*args), wanted, dy)


def composed(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with the composed reference of every op, which a compiler sees through."""

    def call(*args: Any) -> Any:
        with ctkernels.use_backend("reference"):
            return run(*args)

    return call


def overhead(
    contestants: Contestants, calls: int = 400, rounds: int = 15, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Microseconds per call, for calls too short to be timed singly: the median over interleaved batches of ``calls``."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = clock()
            for _ in range(calls):
                run()
            times[name].append((clock() - start) / calls)
    return {name: statistics.median(t) * 1e6 for name, t in times.items()}


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the distinct tensors that autograd saves for the backward pass of ``run``."""
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """The peak memory of torch's allocator in two calls of ``run``, relative to the start; of the GPU if there is one.

    Two, to include the memory that the first leaves allocated (gradients, optimizer state, copies of weights).
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


def bar(dtype: str, what: str, value: float, sense: str, bound: float) -> dict[str, Any]:
    """A measured figure with its bound; ``sense`` is ``"<="`` or ``">="``."""
    met = value <= bound if sense == "<=" else value >= bound
    return {"dtype": dtype, "what": what, "value": value, "bound": f"{sense} {bound:g}", "met": met}


def provenance() -> dict[str, Any]:
    """The command, the revision and the machine, to repeat a measurement."""

    def git(*args: str) -> str:
        if shutil.which("git") is None:
            return ""
        out = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
        return out.stdout.strip()

    return {
        "command": _command(sys.argv[1:]),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _command(arguments: list[str]) -> str:
    """The command that repeats a measurement, without its output file."""
    text = " ".join(["python -m benchmarks", *arguments])
    return re.sub(r" --json[= ]\S+", "", text)
