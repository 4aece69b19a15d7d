"""Argument checks and conversions. Every message names the argument, what was expected, and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor

from . import backends

_FLOATING = frozenset(backends.DTYPES)


def tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {_name(value.dtype)}")
    if value.is_nested:
        raise TypeError(f"{op}: {name} must be a strided tensor, got a nested one; pad it, or give it part by part")
    if value.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} must be a strided tensor, got {_name(value.layout)}; convert it with .to_dense()"
        )


def same_shape(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{op}: {name} must have {like_name}'s shape {tuple(like.shape)}, got {tuple(value.shape)}")
    same_device(op, name, value, like_name, like)


def same_device(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like_name}'s device {like.device}, got {value.device}")


def dimension(op: str, name: str, value: Any, x: Tensor) -> int:
    """``value`` as a non-negative dimension of ``x``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must be None for an x without dimensions, got {value}")
    if not -x.dim() <= value < x.dim():
        raise ValueError(
            f"{op}: {name} must be between {-x.dim()} and {x.dim() - 1} for x of {x.dim()} dimensions, got {value}"
        )
    return value + x.dim() if value < 0 else value


def number(op: str, name: str, value: Any) -> float:
    """``value``, a real number of any type other than bool, as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be a number that float64 can hold, got one beyond 1.8e308") from None


def unit_interval(op: str, name: str, value: Any) -> float:
    if type(value) is not float:
        value = number(op, name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {value}")
    return value


def finite(op: str, name: str, value: Any) -> float:
    value = number(op, name, value)
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value


def choice(op: str, name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def channel_count(op: str, name: str, count: int, x: Tensor, channel_dim: int | None) -> None:
    if channel_dim is None:
        raise ValueError(
            f"{op}: channel_dim is needed, because {name} has {count} values; say which dimension of x they belong to"
        )
    if count != x.shape[channel_dim]:
        raise ValueError(
            f"{op}: {name} must have 1 value or x.shape[{channel_dim}] = {x.shape[channel_dim]} values, got {count}"
        )


# ---- conversions -----------------------------------------------------------------------------------------------------


@overload
def widened(t: Tensor) -> Tensor: ...
@overload
def widened(t: None) -> None: ...
def widened(t: Tensor | None) -> Tensor | None:
    """``t`` in float32 or wider: the dtypes of parameters."""
    return t if t is None or t.dtype in (torch.float32, torch.float64) else t.float()


def parameter(op: str, name: str, value: float | Tensor, x: Tensor, channel_dim: int | None) -> Tensor:
    """Converts a number or a per-channel tensor to an op's input: float32 or float64, 0-d or 1-D, on x's device."""
    if not isinstance(value, Tensor):
        return scalar_tensor(number(op, name, value), x)
    tensor(op, name, value)
    if value.dim() > 1:
        raise ValueError(f"{op}: {name} must have at most one dimension, got shape {tuple(value.shape)}")
    count = value.numel()
    if count != 1:
        channel_count(op, name, count, x, channel_dim)
    if value.device != x.device:
        if value.dim():
            same_device(op, name, value, "x", x)
        value = value.to(x.device)
    return widened(value)


def scalar_tensor(value: float, x: Tensor) -> Tensor:
    """``value`` as the ops take a number, in float64 where there is one: then 1 - beta keeps every digit the user wrote.

    An eager call's number stays on the CPU: kernels take its value as an argument, and nothing is copied or filled on x's
    device. Traced and compiled code has it on that device, since a CPU tensor in a program keeps it out of CUDA graphs.
    """
    if (
        (x.is_cpu or x.is_cuda)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    ):
        return _cached_scalar(value)
    return torch.scalar_tensor(value, dtype=backends.scalar_dtype(x.device), device=x.device)


@lru_cache(maxsize=256)
def _cached_scalar(value: float) -> Tensor:
    """Cached, because creating a call's scalar tensors would take a third of a small call's time."""
    with torch.inference_mode(False):
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


def sample_index(op: str, index: Tensor, x_name: str, x: Tensor, tables: Iterable[float | Tensor | None]) -> None:
    """Checks that ``index`` has a row of ``tables`` for every sample of ``x``. On a GPU, indexing itself checks the range."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{op}: index must be an int64 or int32 tensor, got {kind}")
    if x.dim() == 0 or index.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: index must have one entry per sample, shape {tuple(x.shape[:1])}, got {tuple(index.shape)}"
        )
    same_device(op, "index", index, x_name, x)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(index) is not Tensor:
        return
    if index.device.type == "cpu" and index.numel():
        rows = [t.shape[0] for t in tables if isinstance(t, Tensor) and t.dim()]
        low, high = (int(v) for v in index.aminmax())
        if rows and not 0 <= low <= high < min(rows):
            raise ValueError(f"{op}: index must lie in 0..{min(rows) - 1}, got values from {low} to {high}")


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
