"""Runtime of steered models: replacements for activation calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

from .. import functional
from ..nn import Knobs, records_grad
from .activations import ACTIVATIONS, SIGNATURES, ActivationSpec


class SiteUnit:
    """Base class of the units that replace activations at sites.

    Called as ``unit(x, activation, slope, inplace)``; ``activation`` is a key of ``ACTIVATIONS``.

    Attributes:
        active: if False, the original activation runs.
    """

    active: bool = True
    __call__: Callable[..., Tensor]

    def ctu_arguments(self, x: Tensor, activation: str, slope: float | Tensor | None) -> dict[str, Any] | None:
        """Keyword arguments for :func:`ctkernels.functional.ctu`; None if only ``__call__`` can compute the site.

        In a fused call, ``x`` is the input of the preceding layer: use only its device.
        """
        return None

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies the function of ``nn.Module._apply``, unless the unit is a registered child."""

    def summary(self) -> str:
        """Text for the repr of the steered module, unless the unit is a registered child."""
        return ""


class SiteKnobs(SiteUnit, Knobs):
    """A site's fixed (beta, coeff). Not registered as a child, so not in the ``state_dict``."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(persistent=False, device=device)

    def __call__(self, x: Tensor, activation: str, slope: float | Tensor | None, inplace: bool) -> Tensor:
        values = self._buffers  # faster than self.beta, which goes through nn.Module.__getattr__
        return call_ctu(x, ctu_arguments(values["beta"], values["coeff"], activation, slope), inplace)

    def ctu_arguments(self, x: Tensor, activation: str, slope: float | Tensor | None) -> dict[str, Any]:
        values = self._buffers
        return ctu_arguments(values["beta"], values["coeff"], activation, slope)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._apply(fn)

    def summary(self) -> str:
        return self.extra_repr()


def ctu_arguments(
    beta: Any, coeff: Any, activation: str, slope: float | Tensor | None, channel_dim: int | None = None
) -> dict[str, Any]:
    """Keyword arguments for :func:`ctkernels.functional.ctu` at a site."""
    member = ACTIVATIONS[activation]
    if slope is None:
        slope = 0.01
    elif isinstance(slope, Tensor) and slope.numel() > 1:
        channel_dim = 1
    return {
        "beta": beta,
        "coeff": coeff,
        "channel_dim": channel_dim,
        "activation": member.op,
        "negative_slope": slope,
        "eps": member.eps,
    }


def call_ctu(x: Tensor, arguments: dict[str, Any], inplace: bool) -> Tensor:
    """Calls the CT unit in place of an activation, which may be in-place."""
    if inplace and records_grad(x, *arguments.values()):
        # The backward pass needs the original input. Not writing to x would be cheaper, but wrong if the model reads x again:
        # the skip connection of a pix2pix U-Net does.
        return x.copy_(functional.ctu(x.clone(), **arguments))
    return functional.ctu(x, inplace=inplace, **arguments)


def runs(unit: SiteUnit, x: Any) -> bool:
    """True if ``unit`` replaces the activation for ``x``: a ReLU of integers is left alone."""
    if not unit.active:
        return False
    if isinstance(x, Tensor):
        return x.is_floating_point()
    return isinstance(x, torch.fx.Proxy)  # of a tracer that looks into the module: functional.ctu refuses it


# ---- activation modules ------------------------------------------------------------------------------------------------


def call_module(module: Any, spec: ActivationSpec, unit: SiteUnit, x: Tensor) -> Tensor:
    """Calls ``unit`` in place of the activation module ``module``."""
    slope = getattr(module, spec.slope) if spec.slope is not None else None
    return unit(x, spec.activation, slope, spec.inplace and module.inplace)


def call_global(owner: Any, key: str, spec: ActivationSpec, module: Any, x: Tensor) -> Tensor:
    """Replaces ``module(x)`` for an activation module that is not part of the model."""
    unit = owner._ctu.get(key)
    return call_module(module, spec, unit, x) if unit is not None and runs(unit, x) else module(x)


# ---- activation functions ----------------------------------------------------------------------------------------------


def call_function(owner: Any, key: str, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replaces ``function(*args, **kwargs)`` by the unit of ``owner`` with this ``key``.

    ``name``: of the function, with the trailing underscore of an in-place variant.
    """
    unit = owner._ctu.get(key)
    if unit is None:  # the instance overrides the class attribute that holds the activation
        return function(*args, **kwargs)
    signature = SIGNATURES[name.rstrip("_")]
    call = signature.read(*args, **kwargs)
    if call is None:
        return function(*args, **kwargs)
    if isinstance(call.x, (torch.fx.Proxy, StandIn)):
        target = SteeredCall(owner, key, name, function)
        return call.x.tracer.create_proxy("call_function", target, args, kwargs)
    if not runs(unit, call.x):
        return function(*args, **kwargs)
    return unit(call.x, call.activation or signature.activation, call.slope, call.inplace or name.endswith("_"))


def call_partial(owner: Any, key: str, name: str, partial: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces ``partial(*args, **kwargs)`` for a partial of an activation function."""
    return call_function(owner, key, name, partial.func, *partial.args, *args, **{**partial.keywords, **kwargs})


def call_method(owner: Any, key: str, name: str, x: Any, *args: Any) -> Any:
    """Replaces ``x.relu(*args)``, where x may not be a tensor."""
    return call_function(owner, key, name, functools.partial(_method, name), x, *args)


def _method(name: str, x: Any, *args: Any) -> Any:
    return getattr(x, name)(*args)


# ---- graphs of steered code --------------------------------------------------------------------------------------------


class StandIn:
    """Base class of placeholders for tensors during tracing, other than ``torch.fx.Proxy``. ``tracer`` records calls."""

    tracer: Any


class SteeredCall:
    """A steered function call as the target of a graph node."""

    __name__ = "steered_call"  # its name in generated code

    def __init__(self, owner: Any, key: str, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.key, self.name, self.function = owner, key, name, function
        self.signature = SIGNATURES[name.rstrip("_")]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call_function(self.owner, self.key, self.name, self.function, *args, **kwargs)

    def ctu_arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """:meth:`SiteUnit.ctu_arguments` of this call; None if it is outside the family, or the unit is not active."""
        call, unit = self.signature.read(*args, **kwargs), self.owner._ctu[self.key]
        if call is None or not unit.active:
            return None
        return unit.ctu_arguments(call.x, call.activation or self.signature.activation, call.slope)
