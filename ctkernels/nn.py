"""Layers: thin modules over :mod:`ctkernels.functional`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .ops.ctu.op import ACTIVATIONS

__all__ = ["CTU", "Knobs", "TrainableCTU"]


class Knobs(nn.Module):
    """A settable pair (beta, coeff) that any number of units can share.

    Both are 0-d float32 buffers. They stay float32 under ``.half()``, ``.bfloat16()`` and ``.double()`` (in bfloat16 a
    beta of 0.999 would be 1), follow the model across devices, and never go to the meta device. Setting
    ``knobs.beta = 0.9`` writes to the same tensor: compiled code and captured graphs see it without recompilation.

    Args:
        beta: number or 0-d tensor in [0, 1]. Default: 1, the plain activation.
        coeff: number or 0-d tensor in [0, 1]. Default: 0.5, as in the paper.
        persistent: whether both values are part of the ``state_dict``. Default: True.
        device: of the buffers. Default: torch's default device.

    Raises:
        ValueError: a value outside [0, 1], or one that requires a gradient (see :class:`TrainableCTU`).

    Examples:
        >>> knobs = Knobs(0.9)
        >>> first, second = CTU(knobs=knobs), CTU(knobs=knobs)

    Source: equation 8 of the Curvature Tuning paper.
    """

    beta: Tensor
    coeff: Tensor

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        coeff: float | Tensor = 0.5,
        *,
        persistent: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type == "meta":  # values would be lost there, and two scalars cost nothing
            device = torch.device("cpu")
        with torch.inference_mode(False):  # an inference tensor could not be written to later
            for name, value in (("beta", beta), ("coeff", coeff)):
                number = unit_interval(name, value)
                self.register_buffer(name, torch.tensor(number, dtype=torch.float32, device=device), persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("beta", "coeff") and name in self.__dict__.get("_buffers", {}):
            number = unit_interval(name, value)
            with torch.no_grad():
                self._buffers[name].fill_(number)  # type: ignore[union-attr]
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Knobs:
        def follow(value: Tensor) -> Tensor:
            moved = fn(value)
            if moved is value or moved.device.type == "meta":
                return value
            return value.to(moved.device)  # not `moved`, which may be cast, or uninitialised (`to_empty`)

        return super()._apply(follow, recurse)

    def extra_repr(self) -> str:
        return f"beta={self.beta.item():.6g}, coeff={self.coeff.item():.6g}"


class Unscriptable:
    """Mixin of modules that ``torch.jit.script`` cannot compile: raises an error that says what to use instead."""

    def __prepare_scriptable__(self) -> Any:
        """Called first by ``torch.jit.script``."""
        raise TypeError(
            f"torch.jit.script: expected modules whose source TorchScript can read, got a {type(self).__name__}; use "
            "torch.export, torch.compile, torch.jit.trace or ctkernels.export"
        )


class CTU(Unscriptable, nn.Module):
    """The CT unit with one fixed (beta, coeff): a drop-in for an activation layer.

    ``unit.beta`` and ``unit.coeff`` read the 0-d float32 tensors; assigning a number to them sets the value in place.
    They are the buffers of the child ``knobs`` (``state_dict`` keys ``knobs.beta``, ``knobs.coeff``). With a shared
    :class:`Knobs`, the unit only refers to it and has no state: register that ``Knobs`` once, anywhere in the model, to
    save and move it with the model.

    Args:
        beta: number or 0-d tensor in [0, 1]. Default: 1, the plain activation.
        coeff: number or 0-d tensor in [0, 1]. Default: 0.5.
        activation: a name that :func:`ctkernels.functional.ctu` takes. Default: "relu".
        negative_slope: of "leaky_relu" and "prelu": a number, or a Parameter (0-d, or one slope per channel of
            dimension 1), which becomes a parameter of the unit. Default: 0.01.
        inplace: overwrite the input in calls that need no gradient. Default: False.
        knobs: the pair to share; excludes ``beta`` and ``coeff``.
        persistent: whether the unit's own values are part of the ``state_dict``. Default: True.

    Shape: any, floating point; the output has the input's shape and dtype.

    Raises:
        ValueError: a value outside [0, 1], an unknown activation, or ``beta``/``coeff`` together with ``knobs``.

    Examples:
        >>> act = CTU(0.9)
        >>> y = act(torch.randn(4, 8))
        >>> act.beta = 0.95

    Source: equation 8 of the Curvature Tuning paper.
    """

    def __init__(
        self,
        beta: float | Tensor | None = None,
        coeff: float | Tensor | None = None,
        *,
        activation: str = "relu",
        negative_slope: float | nn.Parameter = 0.01,
        inplace: bool = False,
        knobs: Knobs | None = None,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        if knobs is None:
            beta, coeff = 1.0 if beta is None else beta, 0.5 if coeff is None else coeff
            self.knobs = Knobs(beta, coeff, persistent=persistent)
        else:
            if beta is not None or coeff is not None:
                raise ValueError(f"knobs: expected to be given without beta and coeff, got beta={beta}, coeff={coeff}")
            self.__dict__["knobs"] = knobs  # not a child: a shared value must appear once in the state_dict
        self.activation = _known_activation(activation)
        self.negative_slope = negative_slope
        self.inplace = inplace

    @property
    def beta(self) -> Tensor:
        return self.knobs.beta

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        self.knobs.beta = value  # type: ignore[assignment]

    @property
    def coeff(self) -> Tensor:
        return self.knobs.coeff

    @coeff.setter
    def coeff(self, value: float | Tensor) -> None:
        self.knobs.coeff = value  # type: ignore[assignment]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CTU:
        super()._apply(fn, recurse)
        if "knobs" in self.__dict__:  # every unit that shares them repeats this, harmlessly
            self.knobs._apply(fn)
        return self

    def forward(self, x: Tensor) -> Tensor:
        inplace = self.inplace and not records_grad(x, self.negative_slope)
        return functional.ctu(x, inplace=inplace, **self.ctu_arguments(x))

    def ctu_arguments(self, _: Tensor) -> dict[str, Any]:
        """Keyword arguments for :func:`ctkernels.functional.ctu`."""
        slope, knobs = self.negative_slope, self.knobs
        return {
            "beta": knobs.beta,
            "coeff": knobs.coeff,
            "channel_dim": 1 if isinstance(slope, Tensor) and slope.numel() > 1 else None,
            "activation": self.activation,
            "negative_slope": slope,
        }

    def extra_repr(self) -> str:
        parts = [f"beta={self.beta.item():.6g}", f"coeff={self.coeff.item():.6g}", *_describe(self)]
        return ", ".join(parts + (["inplace=True"] if self.inplace else []))


class TrainableCTU(Unscriptable, nn.Module):
    """The CT unit with a learned (beta, coeff) per channel.

    The parameters are ``raw_beta`` and ``raw_coeff``, float32 vectors of logits: beta = sigmoid(raw_beta). They and
    their gradients stay float32 under ``.half()``, ``.bfloat16()`` and ``.double()``. ``unit.beta`` and ``unit.coeff``
    return the sigmoids.

    Args:
        num_channels: size of ``channel_dim`` in the inputs.
        channel_dim: the dimension of the input that holds the channels, possibly negative: 1 for convolutions, -1 for
            transformers. Default: 1.
        beta, coeff: initial values, strictly between 0 and 1. Default: 0.8 and 0.5, as in the paper.
        activation: a name that :func:`ctkernels.functional.ctu` takes. Default: "relu".
        negative_slope: as in :class:`CTU`; a vector has one slope per channel. Default: 0.01.
        device: of the parameters. Default: torch's default device.

    Shape: any with ``num_channels`` at ``channel_dim``, floating point; the output has the input's shape and dtype.

    Raises:
        ValueError: ``num_channels`` below 1, an initial value outside (0, 1), an unknown activation, or, in a call, an
            input with another size at ``channel_dim``.

    Examples:
        >>> act = TrainableCTU(64)
        >>> y = act(torch.randn(2, 64, 8, 8))

    Source: Curvature Tuning paper, section 3.3 (trainable CT).
    """

    def __init__(
        self,
        num_channels: int,
        channel_dim: int = 1,
        *,
        beta: float = 0.8,
        coeff: float = 0.5,
        activation: str = "relu",
        negative_slope: float | nn.Parameter = 0.01,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"num_channels: expected a positive integer, got {num_channels!r}")
        self.num_channels, self.channel_dim = num_channels, channel_dim
        self.activation = _known_activation(activation)
        self.negative_slope = negative_slope
        for name, value in (("beta", beta), ("coeff", coeff)):
            number = unit_interval(name, value)
            if number in (0.0, 1.0):
                raise ValueError(
                    f"{name}: expected a number strictly between 0 and 1 (its logit is learned), got {value}"
                )
            logit = math.log(number) - math.log1p(-number)
            raw = torch.full((num_channels,), logit, dtype=torch.float32, device=device)
            self.register_parameter(f"raw_{name}", nn.Parameter(raw))

    raw_beta: nn.Parameter
    raw_coeff: nn.Parameter

    @property
    def beta(self) -> Tensor:
        """sigmoid(raw_beta): float32, shape (num_channels,), differentiable."""
        return torch.sigmoid(self.raw_beta)

    @property
    def coeff(self) -> Tensor:
        """sigmoid(raw_coeff): float32, shape (num_channels,), differentiable."""
        return torch.sigmoid(self.raw_coeff)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableCTU:
        def without_cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.detach().to(moved.device)

        return super()._apply(without_cast, recurse)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != self.num_channels:
            raise ValueError(f"x: expected {self.num_channels} channels in dimension {dim}, got shape {tuple(x.shape)}")
        return functional.ctu(x, **self.ctu_arguments(x))

    def ctu_arguments(self, _: Tensor) -> dict[str, Any]:
        """Keyword arguments for :func:`ctkernels.functional.ctu`."""
        return {
            "beta": self.raw_beta,
            "coeff": self.raw_coeff,
            "channel_dim": self.channel_dim,
            "raw": True,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
        }

    def extra_repr(self) -> str:
        return ", ".join([str(self.num_channels), f"channel_dim={self.channel_dim}", *_describe(self)])


def unit_interval(name: str, value: object) -> float:
    """Converts a number or 0-d tensor in [0, 1] to a float. ValueError for anything else, or if it requires a gradient."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(
                f"{name}: expected a value that needs no gradient, got a tensor that requires one; "
                "TrainableCTU learns its values"
            )
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got a tensor of shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number or a 0-d tensor in [0, 1], got {value!r}")
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return float(value)


def records_grad(*values: object) -> bool:
    """True if autograd records a call with these arguments, or may: a trace may be called with gradients."""
    if torch.jit.is_tracing():
        return True
    if torch.is_grad_enabled():
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def _known_activation(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return activation


def _describe(unit: CTU | TrainableCTU) -> list[str]:
    parts = [] if unit.activation == "relu" else [f"activation={unit.activation!r}"]
    if unit.activation in ("leaky_relu", "prelu") and not isinstance(unit.negative_slope, Tensor):
        parts.append(f"negative_slope={unit.negative_slope}")
    return parts
