"""Runs every architecture in its own process, so that crashes and endless loops become lines of the table."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from .check import Finding, check
from .choose import Architecture, smallest

Group = tuple[str, list[str]]  # a module file, and its models with one first word


def run(groups: Iterable[Group], jobs: int = 1, seconds: float = 600) -> Iterator[Finding]:
    """Yield the finding for the smallest model of each group, in order."""
    # A fork server with everything imported, since importing torch and timm takes longer than most checks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "timm", "peft"])
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda group: _guarded(context, group, seconds), groups)


def _guarded(context: multiprocessing.context.ForkServerContext, group: Group, seconds: float) -> Finding:
    ours, theirs = context.Pipe(duplex=False)
    started = time.perf_counter()
    process = context.Process(target=_work, args=(group, theirs))
    process.start()
    theirs.close()
    failed = Finding(group[1][0], group[0], 0)
    chosen = found = None
    try:
        if ours.poll(seconds):
            chosen = ours.recv()
        if chosen is not None and ours.poll(max(seconds - (time.perf_counter() - started), 0)):
            found = ours.recv()
        else:
            failed.failures.append(f"not finished within {seconds:.0f} s")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        failed.failures.append(f"the interpreter ended: {how}")
    if process.is_alive():
        process.kill()
    process.join()
    if isinstance(chosen, str):  # too large, or no model available
        failed.failures, failed.skipped = [], chosen
    elif isinstance(chosen, Architecture):
        failed = dataclasses.replace(failed, name=chosen.name, size=chosen.size)
    found = found or failed
    found.seconds = round(time.perf_counter() - started, 1)
    return found


def _work(group: Group, connection: Connection) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        chosen = smallest(*group)
    except LookupError as error:
        connection.send(str(error))
        return
    connection.send(chosen)
    connection.send(check(chosen))
