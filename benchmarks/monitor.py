"""The cost of an `EditMonitor` for a model with an adapter, in watched batches and in others."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from . import measure
from .jola_step import SIZES, llama
from .report import table

PROCESSES = 3
ROWS, TOKENS = 8, {"cpu": 64, "cuda": 512}  # of a prompt
EVERY = 8  # the default
OFF, BETWEEN, WATCHED = "without a monitor", f"every={EVERY}: a batch between", "a watched batch"


def run(seconds: float, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Milliseconds of a decoding step and of a prefill of every contestant (``quick``: in one process)."""
    count = 1 if quick or device != "cpu" else PROCESSES
    size = f"{SIZES[device]}".split(", batch")[0]
    record = measure.over_processes(count, _run, device, seconds)
    return {"op": "monitor", "size": f"{size}, {ROWS} rows, prompts of {TOKENS[device]} tokens", **record}


@torch.inference_mode()
def _run(seed: int, device: str, seconds: float) -> dict[str, Any]:
    """Medians of one process; CPU time of one thread, since others may use the machine too."""
    from peft import get_peft_model
    from transformers import DynamicCache

    from ctkernels.adapters import EditMonitor, JolaConfig

    size, tokens = SIZES[device], TOKENS[device]
    ids = torch.randint(2048, (ROWS, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    config = JolaConfig(task_type="CAUSAL_LM", init_std=0.1)

    model = get_peft_model(llama(size, device), config).eval()
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    monitor = EditMonitor(model, window=16)
    monitor.calibrate([{"input_ids": ids, "logits_to_keep": 1}] * 4)
    with monitor:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)  # the first of `every`, which is watched

    def switch(state: str) -> None:
        monitor.begin()
        monitor.every = 1 if state == WATCHED else 10**9
        monitor.detach() if state == OFF else monitor.attach()

    def decode() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-1)

    def prefill() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    wait = None if device == "cpu" else torch.cuda.synchronize
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    calls = {"decode_ms": (decode, 3 * seconds), "prefill_ms": (prefill, 6 * seconds)}
    return {key: _paired(call, switch, limit, seed, wait, clock) for key, (call, limit) in calls.items()}


def _paired(
    call: Callable[[], None],
    switch: Callable[[str], None],
    seconds: float,
    seed: int,
    wait: Callable[[], None] | None,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Milliseconds of a call of one model in each state, by the medians of ratios within rounds, each in an order of its own.

    One model, because where another one happens to lie in memory decides more than a monitor does. ``switch`` is not timed.
    """
    shuffle, rounds = random.Random(seed).shuffle, []
    order = [OFF, BETWEEN, WATCHED]
    end = time.perf_counter() + seconds
    while len(rounds) < 6 or time.perf_counter() < end:
        shuffle(order)
        times = {}
        for state in order:
            switch(state)
            if wait is not None:
                wait()
            start = clock()
            call()
            if wait is not None:
                wait()
            times[state] = clock() - start
        rounds.append(times)
    off = 1e3 * statistics.median(times[OFF] for times in rounds[1:])  # the first warms up
    return {state: off * statistics.median(t[state] / t[OFF] for t in rounds[1:]) for state in (OFF, BETWEEN, WATCHED)}


def cost(ms: dict[str, float], every: int) -> float:
    """The mean time of a batch with one of ``every`` watched, relative to no monitor."""
    return (ms[WATCHED] + (every - 1) * ms[BETWEEN]) / every / ms[OFF]


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The average cost, with its bound."""
    parts = (("decode_ms", "decoding"), ("prefill_ms", "prefill"))
    what = f"every={EVERY} / without a monitor"
    return [measure.bar("fp32", f"{kind}: {what}", cost(record[key], EVERY), "<=", 1.01) for key, kind in parts]


def text(record: dict[str, Any]) -> str:
    """The record as a table."""
    columns = [record["decode_ms"], record["prefill_ms"]]
    rows = [
        [name, *(text for ms in columns for text in (f"{ms[name]:.3f}", f"{ms[name] / ms[OFF]:.4f}"))]
        for name in columns[0]
    ]
    rows.append([f"every={EVERY}, on average", *(text for ms in columns for text in ("", f"{cost(ms, EVERY):.4f}"))])
    return "\n".join([record["size"], table(["", "decode, ms", "/ without", "prefill, ms", "/ without"], rows)])
