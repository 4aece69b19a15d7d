"""Parts of networks compiled with our ops, against the same compiled with the composed reference of every op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import jola_step, measure, networks
from .ctu import DTYPES
from .report import table

OURS, COMPOSED = "ours, compiled", "composed reference, compiled"
SIZE = jola_step.SIZES["cpu"]
STAGE, PROJECTION = "first stage of a ResNet-50", "edited output projection of a Llama"


def run(dtypes: list[str], seconds: float) -> list[dict[str, Any]]:
    """Return a record of milliseconds per part and dtype.

    The parts are the first of four stages of the ResNet, with nine units (the compiler generates long programs for units), and
    the layer that JoLA puts in place of the Llama's ``o_proj``, since the edits are a hundredth of the time of a whole step.
    """
    records = []
    for name in dtypes:
        torch.compiler.reset()
        for part, make in ((STAGE, _stage), (PROJECTION, _projection)):
            contestants = make(DTYPES[name])
            times = {f"{kind}_ms": measure.interleaved(runs, seconds * 4) for kind, runs in contestants.items()}
            records.append({"part": part, "dtype": name, **times})
    return records


def _pair(make: Callable[[], Callable[[], Any]]) -> measure.Contestants:
    return {OURS: make(), COMPOSED: measure.composed(make())}


def _stage(dtype: torch.dtype) -> dict[str, measure.Contestants]:
    side, generator = networks.SIZE // 4, torch.Generator().manual_seed(1)
    x = torch.randn(networks.BATCH["cpu"], 64, side, side, generator=generator).to(dtype)
    x, labels = x.contiguous(memory_format=torch.channels_last), torch.arange(networks.BATCH["cpu"])

    def stage(trained: bool) -> Any:
        model: Any = networks.contestants(dtype, trained)[networks.OURS]
        return torch.compile(nn.Sequential(model.layer1, model.avgpool, nn.Flatten()), fullgraph=True)

    return {
        "inference": _pair(lambda: networks.inference(stage(trained=False), x)),
        "step": _pair(lambda: networks.step(stage(trained=True), x, labels)),
    }


def _projection(dtype: torch.dtype) -> dict[str, measure.Contestants]:
    from peft import get_peft_model

    from ctkernels.adapters import JolaConfig

    model = get_peft_model(jola_step.llama(replace(SIZE, dtype=dtype)), JolaConfig(task_type="CAUSAL_LM")).train()
    projection = model.get_base_model().model.layers[0].self_attn.o_proj
    generator, shape = torch.Generator().manual_seed(1), (SIZE.batch, SIZE.tokens, SIZE.hidden)
    z, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    wanted = [z.requires_grad_(), *(p for p in projection.parameters() if p.requires_grad)]

    def step() -> Callable[[], Any]:
        compiled = torch.compile(projection, fullgraph=True)
        return lambda: torch.autograd.grad(compiled(z), wanted, dy)

    return {"step": _pair(step)}


def bars(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios that have bounds, with these."""
    return [
        measure.bar(r["dtype"], f"{r['part']}, {kind}: composed reference / ours", ms[COMPOSED] / ms[OURS], ">=", 1.0)
        for r in records
        for kind in ("inference", "step")
        if (ms := r.get(f"{kind}_ms")) is not None
    ]


def text(records: list[dict[str, Any]]) -> str:
    """The records as a table."""
    rows = [
        [r["part"], r["dtype"], kind, *(f"{ms[name]:.2f}" for name in (OURS, COMPOSED))]
        for r in records
        for kind in ("inference", "step")
        if (ms := r.get(f"{kind}_ms")) is not None
    ]
    return table(["", "", "", f"{OURS}, ms", COMPOSED], rows)
