"""Argument checks: the only code that words errors. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .backends import DTYPES

_FLOATING = frozenset(DTYPES)


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


def unit_interval(op: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {value}")


def number(op: str, name: str, value: Any) -> float:
    """``value``, a real number of any type, as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be a number that float64 can hold, got one beyond 1.8e308") from None


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


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
