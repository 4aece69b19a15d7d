"""Weight formats, plain or quantised by bitsandbytes or torchao: dequantising a weight and requantising a new one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Packing(NamedTuple):
    """The weight format of a projection: `unpack` returns the weight, `pack` makes a parameter in the same format."""

    quantised: bool
    unpack: Callable[[], Tensor]
    pack: Callable[[Tensor], nn.Parameter]


def packing(base: Any, site: str) -> Packing:
    """The weight format of the projection `base`.

    Raises:
        ValueError: the weight is sharded over ranks, or quantised in an unsupported way.
    """
    weight: Any = getattr(base, "weight", None)
    data: Any = weight.data if isinstance(weight, Tensor) else None
    if type(weight) is nn.Parameter and type(data) is Tensor and data.dtype in _FLOATS:
        return Packing(False, lambda: data, lambda value: nn.Parameter(value, requires_grad=False))
    if hasattr(weight, "device_mesh"):
        raise ValueError(f"{site}: cannot merge into a weight that is sharded over ranks; merge in one process")
    kind = type(weight).__name__ if type(weight) is not nn.Parameter else type(data).__name__
    if kind == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        return Packing(True, lambda: _unpack_4bit(weight), lambda value: _pack_4bit(weight, value))
    if kind == "Int8Params" and not weight.has_fp16_weights and data is not None and data.dtype == torch.int8:
        return Packing(True, lambda: _unpack_8bit(base), lambda value: _pack_8bit(weight, value))
    if kind == "Int8Tensor" and _granularity(data) is not None:
        return Packing(True, data.dequantize, lambda value: _pack_torchao(data, value))
    raise ValueError(
        f"{site}: cannot merge into a quantised {type(base).__name__} (weight {kind}, {getattr(weight, 'dtype', None)}): "
        "its columns would have to be scaled and quantised again, which is known here of bitsandbytes' 4 and 8 bits and of "
        "torchao's Int8Tensor. Keep the adapter unmerged, or load the base model without quantisation and merge there."
    )


def _unpack_4bit(weight: Any) -> Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(*_as_loaded(weight))


def _as_loaded(weight: Any) -> tuple[Tensor, Any]:
    """Data and state of a 4-bit weight in the layout before its first forward on a CPU, which changes the layout."""
    import bitsandbytes as bnb

    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        data, state = bnb.functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        if state.absmax.dim() == 2:  # bitsandbytes leaves absmax transposed unless it is itself quantised
            state.absmax = state.absmax.t().float().flatten()
    return data, state


def lay_out_as_loaded(model: nn.Module) -> None:
    """Restore the layout of 4-bit weights that bitsandbytes changed in a CPU forward: it saves that layout wrongly."""
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            weight.data, weight.quant_state = _as_loaded(weight)
            module.quant_state = weight.quant_state


def _pack_4bit(weight: Any, value: Tensor) -> nn.Parameter:
    fresh = type(weight)(
        value.contiguous().cpu(),
        requires_grad=False,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    return fresh.to(weight.device)  # `to` quantises it


def _unpack_8bit(base: Any) -> Tensor:
    import bitsandbytes as bnb

    scales = base.weight.SCB if base.weight.SCB is not None else base.state.SCB
    return bnb.functional.int8_vectorwise_dequant(base.weight.data, scales.to(base.weight.device))


def _pack_8bit(weight: Any, value: Tensor) -> nn.Parameter:
    fresh = type(weight)(value.contiguous().cpu(), requires_grad=False, has_fp16_weights=False)
    return fresh.to(weight.device)


def _granularity(data: Any) -> Any:
    """The granularity of torchao's symmetric scales, per row or per tensor; None for others."""
    from torchao.quantization.granularity import PerRow, PerTensor

    if data.act_pre_scale is not None or data.act_quant_scale is not None:
        return None
    if data.zero_point is not None and bool(data.zero_point.any()):
        return None
    if list(data.block_size) == list(data.shape):
        return PerTensor()
    return PerRow() if list(data.block_size) == [1, data.shape[1]] else None


def _pack_torchao(data: Any, value: Tensor) -> nn.Parameter:
    packed = type(data).from_hp(
        value.to(data.dtype), _granularity(data), act_quant_kwargs=data.act_quant_kwargs, reduce_range=data.reduce_range
    )
    return nn.Parameter(packed, requires_grad=False)


def moved_state(base: Any) -> tuple[Any, ...] | None:
    """The tensors that a bitsandbytes 8-bit layer moves from its weight to itself in its first forward; None for others."""
    weight: Any = getattr(base, "weight", None)
    state = getattr(base, "state", None)
    if type(weight).__name__ != "Int8Params" or state is None:
        return None
    return weight.CB, weight.SCB, state.CB, state.SCB


def move_back(base: Any, moved: tuple[Any, ...] | None) -> None:
    """Restore the result of `moved_state`, after the weight itself was restored."""
    if moved is not None:
        base.weight.CB, base.weight.SCB, base.state.CB, base.state.SCB = moved
