"""Folding edits into a projection, and restoring it.

One projection can have a stack of tuner layers of several methods. Folding depends on their order, so a stack is merged
from the innermost layer and unmerged from the outermost one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._offload import offload_hook
from .packing import move_back, moved_state


def folded(
    base: nn.Module, weight: Tensor, bias: Tensor | None, p: Tensor, q: Tensor, *, output: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`W diag(p)` and `b + W q` for a Linear (out, in) or a Conv1D (in, out); with `output`, `diag(p) W` and `p*b + q`.

    Computed in the dtype of p, returned in the dtype of `weight`. Without a bias and with q zero, the bias stays None.
    """
    wide = weight.detach().to(p.dtype)
    by_row = (type(base).__name__ == "Conv1D") != output  # whether p scales rows of the stored weight
    new_weight = wide * p[:, None] if by_row else wide * p
    if output:
        offset = q
    else:
        offset = q @ wide if by_row else wide @ q
    new_bias: Tensor | None = None
    if bias is not None:
        before = bias.detach().to(p.dtype)
        new_bias = ((before * p if output else before) + offset).to(bias.dtype)
    elif bool(q.any()):
        new_bias = offset.to(weight.dtype)
    return new_weight.to(weight.dtype), new_bias


def stack(layer: nn.Module | None) -> Iterator[nn.Module]:
    """A tuner layer and those below it on the same projection, outermost first."""
    while isinstance(layer, BaseTunerLayer):
        yield layer
        layer = getattr(layer, "base_layer", None)


def not_merged(layer: Any, wanted: list[str] | None) -> list[str]:
    """The active adapters of a tuner layer that are neither merged nor in `wanted` (None: all active)."""
    available = layer._get_available_adapters()
    merged = {*layer.merged_adapters, *(layer.active_adapters if wanted is None else wanted)}
    return [name for name in layer.active_adapters if name in available and name not in merged]


def to_merge(layer: Any, wanted: list[str] | None) -> list[str]:
    """The unmerged adapters of a tuner layer that are in `wanted` (None: the active ones)."""
    if isinstance(wanted, str):
        raise TypeError(f"adapter_names must be a list of names, got {wanted!r}")
    available = layer._get_available_adapters()
    names = dict.fromkeys(layer.active_adapters if wanted is None else wanted)
    return [name for name in names if name in available and name not in layer.merged_adapters]


class Kept:
    """The state of a projection and its stack before merging.

    `apply` casts and moves it with the projection, so unmerging gives, bit for bit, the base model that was never merged.
    For an offloaded projection, only the map to its weights is kept, without a copy.
    """

    def __init__(self, base: nn.Module, layers: list[Any]) -> None:
        self._parameters = nn.Module()
        for name in ("weight", "bias"):
            self._parameters.register_parameter(name, base._parameters.get(name))
        self._moved = moved_state(base)
        self._merged = [list(layer.merged_adapters) for layer in layers]
        hook = offload_hook(base)
        self._weights_map = None if hook is None else hook.weights_map

    @property
    def has_bias(self) -> bool:
        """Whether the projection had a bias."""
        return self._parameters._parameters["bias"] is not None

    def merged_since(self, layers: list[Any]) -> list[list[str]]:
        """The adapters merged in each layer of the stack since this state was taken."""
        return [[n for n in layer.merged_adapters if n not in names] for layer, names in zip(layers, self._merged)]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to the kept parameters, as `nn.Module._apply` does."""
        self._parameters._apply(fn)

    def restore(self, base: nn.Module, layers: list[Any]) -> None:
        """Restore the parameters, the same objects with the same bits."""
        loaded = offload_hook(base) is not None and not any(p.is_meta for p in base.parameters(recurse=False))
        for layer, names in zip(layers, self._merged):
            layer.merged_adapters[:] = names
            if not names and getattr(layer, "_kept", None) is not None:
                layer._kept = None
        base._parameters.update(self._parameters._parameters)
        move_back(base, self._moved)
        hook = offload_hook(base)
        if hook is not None:
            hook.weights_map = self._weights_map
            if loaded and any(p.is_meta for p in base.parameters(recurse=False)):
                hook.pre_forward(base)  # load them: the caller that had loaded the weights offloads them


def copied(base: nn.Module) -> None:
    """Copy a projection's parameters, for methods that merge in place."""
    for name, value in base._parameters.items():
        if type(value) is nn.Parameter:  # quantised ones are replaced, not changed
            base._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)


def merge_from_inside(outer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Merge the layers below `outer`, a tuner layer of another method over a JoLA layer, and then `outer` itself.

    It replaces `outer.merge`, which would add to a weight that JoLA scales afterwards.

    Raises:
        ValueError: an active adapter below would stay unmerged, or the projection is offloaded. Nothing is changed then.
    """
    base, below = outer.get_base_layer(), list(stack(outer.base_layer))
    if to_merge(outer, adapter_names):
        for layer in below:
            refuse_live(layer, adapter_names, type(outer).__name__)
        if offload_hook(base) is not None:
            raise ValueError(
                f"{_site(below)}: cannot merge a {type(outer).__name__} over a JolaLayer while the weights are "
                "offloaded; load the base model without offloading and merge there"
            )
    if any(to_merge(layer, adapter_names) for layer in below):
        outer.base_layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    type(outer).merge(outer, safe_merge=safe_merge, adapter_names=adapter_names)


def refuse_live(layer: Any, adapter_names: list[str] | None, over: str) -> None:
    """Raise an error if a tuner layer has active adapters that would stay unmerged: their input would change."""
    live = not_merged(layer, adapter_names)
    if live:
        raise ValueError(
            f"{_site([layer])}: cannot merge a {over} over a {type(layer).__name__} whose active adapters {live} are "
            "not merged; merge them too (adapter_names=None merges all active ones), or deactivate them"
        )


def _site(layers: list[Any]) -> str:
    return next((layer.site for layer in layers if hasattr(layer, "site")), type(layers[0]).__name__)
