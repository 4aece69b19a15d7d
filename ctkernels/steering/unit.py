"""What steered code runs: the calls that stand where the activations stood."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.fx
from torch import Tensor

from .. import functional
from ..nn import Knobs, needs_grad
from .activations import ACTIVATIONS, FORMS, Use


class SiteKnobs(Knobs):
    """The knobs of one site; in nobody's ``state_dict``. While they are not ``active`` the original activation runs."""

    active = True

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(persistent=False, device=device)


class Unit(Protocol):
    """What a site's knobs may be beside :class:`SiteKnobs`. While it is not ``active`` the original activation runs."""

    @property
    def active(self) -> bool: ...

    def __call__(self, x: Tensor, activation: str, slope: float | Tensor | None, inplace: bool) -> Tensor: ...

    def ctu_arguments(
        self, device: torch.device, activation: str, slope: float | Tensor | None
    ) -> dict[str, Any] | None: ...


def arguments(
    knobs: SiteKnobs | Unit, device: torch.device, activation: str, slope: float | Tensor | None
) -> dict[str, Any] | None:
    """What :func:`ctkernels.functional.ctu` is called with at a site, beside the tensor; None where the unit does not run."""
    if not knobs.active:
        return None
    if isinstance(knobs, SiteKnobs):
        return unit_arguments(knobs.beta, knobs.coeff, activation, slope)
    return knobs.ctu_arguments(device, activation, slope)


def unit_arguments(
    beta: Tensor, coeff: Tensor, activation: str, slope: float | Tensor | None, channel_dim: int | None = None
) -> dict[str, Any]:
    """The same from its parts."""
    return {
        "beta": beta,
        "coeff": coeff,
        "channel_dim": 1 if isinstance(slope, Tensor) and slope.numel() > 1 else channel_dim,
        "activation": ACTIVATIONS[activation].op,
        "negative_slope": 0.01 if slope is None else slope,
    }


def unit(
    x: Tensor,
    beta: Tensor,
    coeff: Tensor,
    activation: str,
    slope: float | Tensor | None,
    inplace: bool,
    *,
    channel_dim: int | None = None,
    raw: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """The CT unit in the place of an activation call, which may be in place."""

    def ctu(x: Tensor, inplace: bool = False) -> Tensor:
        found = unit_arguments(beta, coeff, activation, slope, channel_dim)
        return functional.ctu(x, raw=raw, inplace=inplace, index=index, **found)

    if inplace and (needs_grad(x, slope) or needs_grad(beta, coeff)):
        # The backward needs the input that is overwritten. Leaving it alone would be cheaper, and wrong where the
        # overwritten tensor is read again: the skip connection of a pix2pix U-Net concatenates it.
        return x.copy_(ctu(x.clone()))
    return ctu(x, inplace)


def call_module(module: Any, use: Use, knobs: SiteKnobs | Unit, input: Tensor) -> Tensor:
    slope = getattr(module, use.slope) if use.slope else None
    return _apply(input, knobs, use.activation, slope, getattr(module, "inplace", False))


def _apply(x: Tensor, knobs: SiteKnobs | Unit, activation: str, slope: float | Tensor | None, inplace: bool) -> Tensor:
    if isinstance(knobs, SiteKnobs):
        return unit(x, knobs.beta, knobs.coeff, activation, slope, inplace)
    return knobs(x, activation, slope, inplace)


def runs(knobs: SiteKnobs | Unit, x: Any) -> bool:
    """Whether the unit, and not the original activation, is to run on ``x``: a ReLU may also be one of integers."""
    if isinstance(x, torch.fx.Proxy):  # of a tracer that looks into the module: refused where it is computed
        return knobs.active
    return knobs.active and torch.is_tensor(x) and x.is_floating_point()


def call_function(owner: Any, key: str, form: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` with the knobs that ``owner`` keeps under ``key``."""
    name = form.rstrip("_")
    call, knobs = FORMS[name].read(*args, **kwargs), owner._ctu.get(key)
    if knobs is None:  # the instance has something else under the name that its class has an activation under
        return function(*args, **kwargs)
    if call is not None and isinstance(call.x, (torch.fx.Proxy, StandIn)):
        target = SteeredCall(owner, key, form, function)
        return call.x.tracer.create_proxy("call_function", target, args, kwargs)
    if call is None or not runs(knobs, call.x):
        return function(*args, **kwargs)
    inplace = call.inplace or name != form
    return _apply(call.x, knobs, FORMS[name].activation, call.slope, inplace)


def call_partial(owner: Any, key: str, form: str, made: Any, *args: Any, **kwargs: Any) -> Any:
    """``made(*args, **kwargs)``, for a ``functools.partial`` of an activation function."""
    return call_function(owner, key, form, made.func, *made.args, *args, **{**made.keywords, **kwargs})


class StandIn:
    """What stands for a tensor while code is read as a graph, beside ``torch.fx.Proxy``; ``tracer`` records calls."""

    tracer: Any


class SteeredCall:
    """A steered call of a function as a node of a graph: a function of its arguments that keeps owner and key."""

    __name__ = "steered_call"  # what generated code calls it

    def __init__(self, owner: Any, key: str, form: str, function: Callable[..., Any]) -> None:
        self.owner, self.key, self.form, self.function = owner, key, form, function
        self.activation = FORMS[form.rstrip("_")].activation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_function(self.owner, self.key, self.form, self.function, *args, **kwargs)

    def ctu_arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """:func:`arguments` of this call, None where it is not in the family or has no knobs. ``args`` start with the tensor."""
        call, knobs = FORMS[self.form.rstrip("_")].read(*args, **kwargs), self.owner._ctu[self.key]
        return arguments(knobs, call.x.device, self.activation, call.slope) if call else None


def call_global(owner: Any, key: str, use: Use, module: Any, input: Tensor) -> Tensor:
    """``module(input)``, for an activation module that is not part of the model."""
    knobs = owner._ctu.get(key)
    return call_module(module, use, knobs, input) if knobs is not None and runs(knobs, input) else module(input)


def call_method(owner: Any, key: str, form: str, x: Any, *args: Any) -> Any:
    """``x.relu(*args)``, where x may turn out to be no tensor."""
    return call_function(owner, key, form, functools.partial(_method, form), x, *args)


def _method(name: str, x: Any, *args: Any) -> Any:
    return getattr(x, name)(*args)
