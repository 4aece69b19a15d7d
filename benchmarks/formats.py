"""Inference of an eager ResNet-50, plain, steered and fused, in both memory formats, for large and small images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import ctkernels

from . import measure, networks
from .ctu import DTYPES
from .report import table

PLAIN, STEERED, FUSED = "plain ReLU", "steered", "fused"
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
IMAGES = ((1, 224), (8, 224), (32, 224), (1, 32), (8, 32))  # batch, side
QUICK = ((1, 32),)


def contestants(dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, nn.Module]:
    plain = networks.network(dtype, "cpu").to(memory_format=memory_format)
    steered, fused = copy.deepcopy(plain), copy.deepcopy(plain)
    ctkernels.steer(steered, 0.9)
    ctkernels.steer(fused, 0.9)
    ctkernels.fuse(fused)
    return {PLAIN: plain, STEERED: steered, FUSED: fused}


def _case(batch: int, side: int, format_name: str) -> str:
    return f"{batch} x {side}^2, {format_name}"


def run(dtypes: list[str], seconds: float, quick: bool, cpu_time: bool, only: str) -> list[dict[str, Any]]:
    """Return a record of milliseconds per dtype, format and size, for cases with ``only`` in their name."""
    clock = time.thread_time if cpu_time else time.perf_counter
    generator, records = torch.Generator().manual_seed(1), []
    for name in dtypes:
        for format_name, memory_format in FORMATS.items():
            models = contestants(DTYPES[name], memory_format)
            for batch, side in QUICK if quick else IMAGES:
                if only not in _case(batch, side, format_name):
                    continue
                x = torch.randn(batch, 3, side, side, generator=generator).to(DTYPES[name])
                x = x.contiguous(memory_format=memory_format)
                _check(models, x)
                calls: dict[str, Callable[[], Any]] = {k: networks.inference(m, x) for k, m in models.items()}
                times = measure.interleaved(calls, seconds, least=3, clock=clock)
                about = {"network": "resnet50", "dtype": name, "format": format_name, "batch": batch, "side": side}
                records.append({**about, "inference_ms": times})
    return records


def _check(models: dict[str, nn.Module], x: torch.Tensor) -> None:
    """Check that all results agree, so that no time is reported for a wrong one."""
    with torch.no_grad():
        fused, steered = models[FUSED](x), models[STEERED](x)
    if fused.stride() != steered.stride():
        raise AssertionError("a fused network's result has other strides than the steered one's: not timed")
    error, scale = (fused - steered).abs().max(), steered.abs().max()
    if not error <= 64 * torch.finfo(x.dtype).eps * scale:  # 53 layers with different orders of rounding
        raise AssertionError(f"the fused network is off by {error:.3g} of {scale:.3g}: not timed")


def bars(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios that have bounds, with these."""
    rows = []
    for r in records:
        ratio = r["inference_ms"][FUSED] / r["inference_ms"][PLAIN]
        what = f"{_case(r['batch'], r['side'], r['format'])}: fused / plain"
        rows.append(measure.bar(r["dtype"], what, ratio, "<=", 0.97))
    return rows


def text(records: list[dict[str, Any]]) -> str:
    """The records as a table."""
    rows = [
        [_case(r["batch"], r["side"], r["format"]), r["dtype"], *(f"{t:.1f}" for t in r["inference_ms"].values())]
        for r in records
    ]
    return "ResNet-50, inference, eager, ms\n" + table(["", "dtype", PLAIN, STEERED, FUSED], rows)
