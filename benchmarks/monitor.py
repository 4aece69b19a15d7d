"""The cost of an `EditMonitor` for a model with an adapter, in watched batches and in others."""

from __future__ import annotations

import time
from typing import Any

import torch

from . import measure
from .jola_step import SIZES, llama
from .report import table

PROCESSES = 3
ROWS, TOKENS = 8, {"cpu": 64, "cuda": 512}  # of a prompt
EVERY = 32
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
    base = llama(size, device)

    def contestant(every: int | None) -> tuple[Any, Any]:
        model = get_peft_model(llama(size, device, base), config).eval()
        cache = DynamicCache(config=model.config)
        if every is not None:
            monitor = EditMonitor(model, every=every, window=16)
            monitor.calibrate([{"input_ids": ids, "logits_to_keep": 1}] * 4)
            monitor.attach()
        model(input_ids=ids[:1], use_cache=False, logits_to_keep=1)  # the first of `every`
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

        def decode() -> None:
            model(input_ids=ids[:, :1], past_key_values=cache)
            cache.crop(-1)

        def prefill() -> None:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

        return decode, prefill

    contestants = {OFF: contestant(None), BETWEEN: contestant(10**9), WATCHED: contestant(1)}
    wait = None if device == "cpu" else torch.cuda.synchronize
    alone = device == "cpu" and torch.get_num_threads() == 1
    record: dict[str, Any] = {}
    for part, key in enumerate(("decode_ms", "prefill_ms")):
        runs = {name: calls[part] for name, calls in contestants.items()}
        clock = time.thread_time if alone else time.perf_counter
        record[key] = measure.interleaved(runs, seconds * (6 if part else 3), seed=seed, wait=wait, clock=clock)
    return record


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
