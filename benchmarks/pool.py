"""A thousand adapters in one batch: decoding and prefill with an `AdapterPool`, against the base model and peft."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from . import measure
from .jola_step import SIZES, llama
from .report import table

PROCESSES = 3
ADAPTERS, ROWS = 1000, 64
TOKENS = {"cpu": 16, "cuda": 256}  # of a prompt
BASE = "base model"
POOL = f"pool, {ROWS} of {ADAPTERS} JoLA adapters"
ALL_BASE = "pool, base rows alone"
LORA = f"peft, adapter_names, {ROWS} LoRA adapters r=8"
MIXED = f"peft, adapter_names, {ROWS} JoLA adapters"
ONE_BY_ONE = "JoLA adapters one after the other"


def run(seconds: float, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Milliseconds of a decoding step and of a prefill of every contestant (``quick``: in one process)."""
    count = 1 if quick or device != "cpu" else PROCESSES
    size = f"{SIZES[device]}".split(", batch")[0]
    record = measure.over_processes(count, _run, device, seconds)
    return {"op": "pool", "size": f"{size}, {ROWS} rows, prompts of {TOKENS[device]} tokens", **record}


@torch.inference_mode()
def _run(seed: int, device: str, seconds: float) -> dict[str, Any]:
    """Medians of one process. Every row has its own adapter; peft's models contain only those."""
    from peft import LoraConfig, get_peft_model
    from transformers import DynamicCache

    from ctkernels.adapters import AdapterPool, JolaConfig

    size, tokens = SIZES[device], TOKENS[device]
    ids = torch.randint(2048, (ROWS, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    base = llama(size, device).eval()
    names = [str(number) for number in range(ROWS)]

    def adapted(config: Callable[[], Any]) -> Any:
        model = get_peft_model(llama(size, device, base), config(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config())
        return model.eval()

    jola = adapted(lambda: JolaConfig(task_type="CAUSAL_LM", init_std=0.1))
    lora = adapted(
        lambda: LoraConfig(
            r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian"
        )
    )
    pooled = llama(size, device, base).eval()
    pool = AdapterPool(pooled, JolaConfig(), ADAPTERS)
    for number in range(ADAPTERS):
        pool.load(f"adapter {number}", jola, adapter=names[number % ROWS])
    chosen = [f"adapter {number}" for number in range(ADAPTERS - ROWS, ADAPTERS)]

    def steps(model: Any, block: Callable[[], Any] = nullcontext, **values: Any) -> tuple[Any, Any]:
        cache = DynamicCache(config=model.config)
        with block():
            model(input_ids=ids, past_key_values=cache, **values)

        def decode() -> None:
            with block():
                model(input_ids=ids[:, :1], past_key_values=cache, **values)
            cache.crop(-1)

        def prefill() -> None:
            with block():
                model(input_ids=ids, use_cache=False, logits_to_keep=1, **values)

        return decode, prefill

    def one_by_one() -> tuple[Any, Any]:
        caches = [DynamicCache(config=jola.config) for _ in names]

        def call(decoding: bool) -> None:
            for row, (name, cache) in enumerate(zip(names, caches)):
                jola.set_adapter(name)
                own = ids[row : row + 1]
                if decoding:
                    jola(input_ids=own[:, :1], past_key_values=cache)
                    cache.crop(-1)
                else:
                    jola(input_ids=own, use_cache=False, logits_to_keep=1)

        for row, (name, cache) in enumerate(zip(names, caches)):
            jola.set_adapter(name)
            jola(input_ids=ids[row : row + 1], past_key_values=cache)
        return lambda: call(True), lambda: call(False)

    contestants = {
        BASE: steps(base),
        POOL: steps(pooled, lambda: pool.batch(chosen)),
        ALL_BASE: steps(pooled, lambda: pool.batch([None] * ROWS)),
        LORA: steps(lora, adapter_names=names),
        MIXED: steps(jola, adapter_names=names),
        ONE_BY_ONE: one_by_one(),
    }
    wait = None if device == "cpu" else torch.cuda.synchronize
    slow = [LORA, MIXED, ONE_BY_ONE]
    record: dict[str, Any] = {}
    for part, key in enumerate(("decode_ms", "prefill_ms")):
        runs = {name: calls[part] for name, calls in contestants.items()}
        record[key] = measure.interleaved(runs, seconds * (6 if part else 3), seldom=slow, seed=seed, wait=wait)
    lora_bytes = sum(p.numel() * p.element_size() for n, p in lora.named_parameters() if ".lora_" in n) / ROWS
    return record | {"bytes_per_adapter": {"pool": pool.bytes_per_adapter, "LoRA r=8": lora_bytes}}


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios that have bounds, with these."""
    rows = []
    for key, kind in (("decode_ms", "decoding"), ("prefill_ms", "prefill")):
        ms = record[key]
        rows.append(measure.bar("fp32", f"{kind}: pool / base model", ms[POOL] / ms[BASE], "<=", 1.05))
        rows.append(measure.bar("fp32", f"{kind}: pool of base rows / base model", ms[ALL_BASE] / ms[BASE], "<=", 1.03))
    return rows


def text(record: dict[str, Any]) -> str:
    """The record as a table."""
    decode, prefill = record["decode_ms"], record["prefill_ms"]
    rows = [
        [name, *(text for ms in (decode, prefill) for text in (f"{ms[name]:.1f}", f"{ms[name] / ms[BASE]:.3f}"))]
        for name in decode
    ]
    memory = ", ".join(f"{name} {size:,.0f}" for name, size in record["bytes_per_adapter"].items())
    lines = [record["size"], table(["", "decode, ms", "/ base", "prefill, ms", "/ base"], rows)]
    return "\n".join([*lines, f"bytes per adapter: {memory}"])
