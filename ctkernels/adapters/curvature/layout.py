"""Finds the channel dimension of every activation's input, and the number of channels, without running the model.

A copy of the model on fake tensors (shapes without data) is called once. Every tensor in it carries the position of its
channels, which convolutions, linear layers and norms set, and other operations propagate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ..._copying import copy_module
from ...steering.activations import ACTIVATIONS
from ...steering.patch import apply_patches
from ...steering.runtime import SiteUnit
from ...steering.scan import Site, scan
from .._offload import drop_offloading, offload_memo

_AXIS = "_ctu_channel_axis"  # attribute of tensors: the channel dimension, counted from the end

_CONVOLUTIONS = {f"conv{name}{n}d": -1 - n for name in ("", "_transpose") for n in (1, 2, 3)}
_LAST = {
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm"),
    *("embedding", "scaled_dot_product_attention", "multi_head_attention_forward"),
}
_LAST_UNLESS_KNOWN = {"layer_norm", "rms_norm"}
_SECOND = {"batch_norm", "instance_norm", "group_norm"}
_MOVES = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"}
_TRANSPOSES = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__)  # type: ignore[attr-defined]
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "__getitem__"}


class SiteCall(NamedTuple):
    """One call of a site. ``axis``: the channel dimension counted from the end; None if unknown."""

    shape: tuple[int, ...]
    axis: int | None


class Channels(NamedTuple):
    """The channels that a site's parameters belong to."""

    dim: int
    size: int


def find_channels(
    model: nn.Module, input_shape: tuple[int, ...] | None = None, prepare: Callable[[nn.Module], None] | None = None
) -> tuple[dict[str, list[SiteCall]], str]:
    """Records the calls of every activation of ``model``, without running or changing the model itself.

    Args:
        model: the model.
        input_shape: of one input, without the batch dimension. None tries what the model or its config declares, and the
            usual sizes for its first layer.
        prepare: removes units from the copy of a model that has them.

    Returns:
        {site name: its calls} (without sites that are not reached), and why the call of the copy failed, or "".

    Raises:
        ValueError: the model cannot be copied.
    """
    return _calls(model, input_shape, prepare, batch=2)


def find_samples(
    model: nn.Module, input_shape: tuple[int, ...] | None = None, prepare: Callable[[nn.Module], None] | None = None
) -> dict[str, bool]:
    """Finds the sites whose inputs have the samples, or a multiple of them, in dimension 0: it scales with the batch.

    Args:
        model, input_shape, prepare: as in :func:`find_channels`.

    Returns:
        {site name: bool}, without sites that are not reached.
    """
    try:
        two, three = (_calls(model, input_shape, prepare, batch)[0] for batch in (2, 3))
    except ValueError:  # the model cannot be copied
        return {}

    def grows(a: SiteCall, b: SiteCall) -> bool:
        return len(a.shape) > 0 and 3 * a.shape[0] == 2 * b.shape[0] and a.shape[1:] == b.shape[1:]

    return {
        name: len(uses) == len(three[name]) and all(map(grows, uses, three[name]))
        for name, uses in two.items()
        if name in three
    }


def _calls(
    model: nn.Module, input_shape: tuple[int, ...] | None, prepare: Callable[[nn.Module], None] | None, batch: int
) -> tuple[dict[str, list[SiteCall]], str]:
    best: dict[str, list[SiteCall]] = {}
    problem = "no input to try"
    half = any(tensor.dtype == torch.float16 for tensor in (*model.parameters(), *model.buffers()))
    # Some models (BART) check values for overflow in float16 only; fake tensors have none.
    for widened in (False, True) if half else (False,):
        for values in _inputs(model, input_shape, batch):
            calls, stopped = _record(model, values, prepare, widened)
            if len(calls) > len(best) or not best:
                best, problem = calls, stopped
            if not stopped:
                return best, ""
    return best, problem


def channels_of(uses: list[SiteCall]) -> Channels | None:
    """The dimension that holds the channels in all calls; None if they disagree, or it is unknown."""
    options: list[set[int]] = []
    counts = set()
    for use in uses:
        axis = -1 if use.axis is None and len(use.shape) == 2 else use.axis
        if axis is None:
            return None
        options.append({axis, axis + len(use.shape)})
        counts.add(use.shape[axis])
    common = set.intersection(*options)
    if not common or len(counts) != 1:
        return None
    # -1 after linear layers, whatever the number of dimensions; 1 after convolutions.
    dim = next((dim for dim in (-1, 1) if dim in common), None)
    return Channels(max(common) if dim is None else dim, counts.pop())


class _Recorder(SiteUnit):
    """Records the calls of a site."""

    def __init__(self, uses: dict[str, list[SiteCall]], site: Site) -> None:
        self.uses, self.site = uses, site

    def __call__(self, x: Tensor, activation: str, slope: float | Tensor | None, inplace: bool) -> Tensor:
        axis = getattr(x, _AXIS, None)
        if isinstance(slope, Tensor) and slope.numel() > 1:
            axis = 1 - x.dim()  # a PReLU's channels are in dimension 1
        self.uses.setdefault(self.site.name, []).append(SiteCall(tuple(x.shape), axis))
        return x if inplace else torch.empty_like(x)


def _record(
    model: nn.Module, values: dict[str, Any], prepare: Callable[[nn.Module], None] | None, widened: bool
) -> tuple[dict[str, list[SiteCall]], str]:
    """Calls a copy with `values`; returns its sites' calls, and the error or "". `widened`: float16 becomes float32."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    uses: dict[str, list[SiteCall]] = {}
    clone = _copy(model, mode, widened)
    if prepare is not None:
        prepare(clone)
    result = scan(clone, frozenset(ACTIVATIONS), split=True, make_unit=lambda site, device: _Recorder(uses, site))
    apply_patches(result.swaps, result.edits)
    for module in {*clone.modules(), *(swap.module for swap in result.swaps)}:
        if not isinstance(module, torch.jit.ScriptModule):
            # torch calls this instead of hooks and forward: no hook may see the copy.
            module._compiled_call_impl = module.forward
    problem = ""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _quiet("torch._subclasses.fake_tensor"), mode:
        inputs = {name: _wide(make()) if widened else make() for name, make in values.items()}
        positional, keywords = [inputs.pop("")] if "" in inputs else [], inputs
        # In evaluation first; then in training, for parts that only training reaches (auxiliary heads).
        for training in (False, True):
            clone.train(training)
            try:
                with _Axes():
                    clone(*positional, **keywords)
            except Exception as error:  # any error of the model's code; the caller reports missing sites
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                break
            if len(uses) == len(result.sites):
                break
    return uses, problem


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silences a logger: sizes are tried that may not fit."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _copy(model: nn.Module, mode: FakeTensorMode, widened: bool) -> nn.Module:
    """A copy of ``model`` with fake tensors, which are shared as the model's are."""
    memo: dict[int, Any] = offload_memo(model)
    tensors = (*model.parameters(), *model.buffers())
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
    for tensor in tensors:
        if hasattr(tensor, "device_mesh"):  # sharded: the copy is whole
            with mode:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        elif tensor.is_meta and device is not None:  # offloaded: on the others' device when it computes
            with mode:
                fake = torch.empty_like(tensor, device=device)
        else:
            fake = mode.from_tensor(tensor.detach(), static_shapes=True)
        if widened:
            fake = _wide(fake)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    try:
        clone = copy_module(model, memo)
    except Exception as error:
        raise ValueError(
            f"model: expected one that can be copied, to find its channels, got {type(error).__name__}: {error}; "
            "give layout in CurvatureConfig, or granularity='layer'"
        ) from error
    drop_offloading(clone)
    for module, whole in zip(model.modules(), clone.modules()):
        if any(hasattr(parameter, "device_mesh") for parameter in module.parameters(recurse=False)):
            whole.__dict__.pop("forward", None)  # transformers' that shares out the work
    return clone


# --------------------------------------------------------------------------------------------------------------- inputs


def _inputs(model: nn.Module, shape: tuple[int, ...] | None, batch: int) -> Iterator[dict[str, Any]]:
    """Arguments to try, as functions that make the tensors; "" is the first positional argument."""
    floats = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()] or [torch.empty(0)]
    first = next((p for p in floats if not p.is_meta), floats[0])

    def images(*size: int) -> Any:
        return lambda: torch.empty(batch, *size, dtype=first.dtype, device=first.device)

    def tokens() -> Tensor:
        return torch.zeros(batch, 8, dtype=torch.long, device=first.device)

    config: Any = getattr(model, "config", None)
    is_transformer = hasattr(config, "model_type")
    name = getattr(model, "main_input_name", "") if is_transformer else ""
    if shape is not None:
        yield {name: images(*shape)}
        return
    if is_transformer:
        yield from _transformer_inputs(config, name, images, tokens)
    declared = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = declared.get("input_size") if isinstance(declared, dict) else None
    if size:
        yield {"": images(*size)}
    layer: Any = next(
        (m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding))), 0
    )
    if isinstance(layer, nn.Embedding):
        yield {"": tokens}
    elif isinstance(layer, nn.Linear):
        yield {"": images(layer.in_features)}
        yield {"": images(8, layer.in_features)}
    elif isinstance(layer, nn.modules.conv._ConvNd):
        dims = len(layer.kernel_size)
        for side in (224, 299, 32, 28, 64, 96, 128, 256, 384, 512):
            yield {"": images(layer.in_channels, *[16] * (dims == 3), *[side] * min(dims, 2))}
    else:
        yield {"": images(3, 224, 224)}


def _transformer_inputs(config: Any, name: str, images: Any, tokens: Any) -> Iterator[dict[str, Any]]:
    parts = [config, getattr(config, "vision_config", None)]
    size = next((part.image_size for part in parts if getattr(part, "image_size", None)), 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = next((part.num_channels for part in parts if getattr(part, "num_channels", None)), 3)
    pixels = {"pixel_values": images(channels, height, width)}
    if name == "pixel_values":
        yield pixels
    elif name == "input_ids":
        yield {name: tokens}
        yield {name: tokens, "decoder_input_ids": tokens}
        yield {name: tokens, **pixels}
    elif name in ("input_values", "input_features"):
        yield {name: images(16000)}
        yield {name: images(getattr(config, "num_mel_bins", 80), 3000)}


# ---------------------------------------------------------------------------------------------------------- propagation


class _Axes(TorchFunctionMode):
    """Propagates the position of the channels from a function's inputs to its outputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, Tensor):
                axis = _axis(func, args, kwargs, out)
                if axis is not None and -out.dim() <= axis < 0:
                    setattr(out, _AXIS, axis)
                elif hasattr(out, _AXIS):
                    delattr(out, _AXIS)
        return result


def _axis(func: Any, args: Any, kwargs: dict[str, Any], out: Tensor) -> int | None:
    name = getattr(func, "__name__", "")
    if name in _CONVOLUTIONS:
        return _CONVOLUTIONS[name]
    if name in _LAST:
        return -1
    if name in _SECOND:
        return 1 - out.dim()
    known = [value for value in _tensors((*args, *kwargs.values())) if getattr(value, _AXIS, None) is not None]
    if not known:
        return -1 if name in _LAST_UNLESS_KNOWN else None
    source = next((value for value in known if value.dim() == out.dim()), known[0])
    axis: int = getattr(source, _AXIS)
    if source is out:  # in-place
        return axis
    if name in _MOVES or func in _TRANSPOSES:
        return _moved(func, args, kwargs, source.dim(), axis)
    if name in _RESHAPES and source.numel() == out.numel():
        return _reshaped(source.shape, axis, out.shape)
    if source.dim() == out.dim():
        return axis
    alike = [i - out.dim() for i, size in enumerate(out.shape) if size == source.shape[axis]]
    return alike[0] if len(alike) == 1 else None  # a reduction, or an indexed dimension


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _moved(func: Any, args: Any, kwargs: dict[str, Any], dims: int, axis: int) -> int:
    """The dimension's new position, found with a tensor whose sizes all differ."""
    labels = torch.empty(*range(2, dims + 2), device="meta")
    values = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    moved = func(labels, *args[1:], **values)
    return list(moved.shape).index(dims + axis + 2) - dims


def _reshaped(old: Any, axis: int, new: Any) -> int | None:
    """The dimension of the new shape with the same size and the same number of elements before it."""
    at = len(old) + axis
    before = math.prod(old[:at])
    for i, size in enumerate(new):
        if size == old[at] and math.prod(new[:i]) == before:
            return i - len(new)
    return None
