"""The activations that can be steered, and the modules and functions that compute them.

A new activation module is a row of ``MODULES``, a new function a row of ``SIGNATURES``. Classes of other libraries are named,
never imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    """A member of the family. ``op``: its name in :func:`ctkernels.functional.ctu`. (beta, coeff): its neutral point, where the
    unit is the activation itself. ``eps``: added to 1 - beta, it makes the neutral point exact although float32 rounds beta."""

    op: str
    beta: float
    coeff: float
    eps: float = 0.0


_QUICK = torch.tensor(1.702 / 2.702, dtype=torch.float32).item()  # rounded up: eps is positive
ACTIVATIONS = {
    # At beta = 1 the unit does not depend on coeff; 0.5 is the paper's choice.
    "relu": Activation("relu", 1.0, 0.5),
    "leaky_relu": Activation("leaky_relu", 1.0, 0.5),
    "prelu": Activation("prelu", 1.0, 0.5),
    "relu6": Activation("relu6", 1.0, 0.5),
    "silu": Activation("silu", 0.5, 1.0),
    "gelu": Activation("gelu", 0.5, 1.0),
    "gelu_tanh": Activation("gelu_tanh", 0.5, 1.0),
    # x * sigmoid(1.702 x) is the logistic unit whose beta / (1 - beta + eps) is 1.702.
    "quick_gelu": Activation("silu", _QUICK, 1.0, _QUICK / 1.702 - (1 - _QUICK)),
}
ANY = "any"  # the activation of a call whose function is unknown
RELU_FAMILY = ("relu", "leaky_relu", "prelu", "relu6")


def select(activations: str | Iterable[str]) -> frozenset[str]:
    """Resolves the user's selection: names of activations, or "all"."""
    names = [activations] if isinstance(activations, str) else list(activations)
    if names == ["all"]:
        return frozenset(ACTIVATIONS)
    for name in names:
        if name not in ACTIVATIONS:
            raise ValueError(f"activations: expected 'all' or some of {', '.join(ACTIVATIONS)}, got {name!r}")
    if not names:
        raise ValueError("activations: expected at least one name, got none")
    return frozenset(names)


# -------------------------------------------------------------------------------------------------------------- modules


class ActivationSpec(NamedTuple):
    """An activation module. ``slope``: name of the attribute with the negative slope. ``inplace``: whether it has an ``inplace``
    attribute that its forward obeys."""

    activation: str
    slope: str | None = None
    inplace: bool = False


class NearMiss(NamedTuple):
    """An activation that cannot be steered, and why. ``family``: it computes a member of the family, in a form that cannot be
    steered. ``activation``: which one, if known."""

    reason: str
    family: bool = False
    activation: str = ""


def _hardtanh(module: Any) -> ActivationSpec | NearMiss:
    if (module.min_val, module.max_val) == (0, 6):
        return ActivationSpec("relu6", inplace=True)
    return NearMiss(f"Hardtanh({module.min_val}, {module.max_val}) is not in the family, (0, 6) is")


def _threshold(module: Any) -> ActivationSpec | NearMiss:
    if (module.threshold, module.value) == (0, 0):
        return ActivationSpec("relu", inplace=True)
    return NearMiss(f"Threshold({module.threshold}, {module.value}) is not in the family, (0, 0) is")


def _gelu(module: Any) -> ActivationSpec | NearMiss:
    activation = GELUS.get(module.approximate)
    return ActivationSpec(activation) if activation else NearMiss(f"no GELU has approximate={module.approximate!r}")


GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by torch's `approximate`


def _recurrent(module: Any) -> NearMiss | None:
    if getattr(module, "nonlinearity", None) == "relu":
        return NearMiss("its ReLU is fused into the recurrence", family=True, activation="relu")
    return None  # tanh, or the gates of an LSTM or a GRU


def _outside(module: Any) -> NearMiss:
    return NearMiss(f"{type(module).__name__} is not in the family")


MODULES: dict[str, ActivationSpec | Callable[[Any], ActivationSpec | NearMiss | None]] = {
    "torch.nn.modules.activation.ReLU": ActivationSpec("relu", inplace=True),
    "torch.nn.modules.activation.LeakyReLU": ActivationSpec("leaky_relu", "negative_slope", inplace=True),
    "torch.nn.modules.activation.PReLU": ActivationSpec("prelu", "weight"),
    # ReLU6 derives from Hardtanh: the most derived row counts
    "torch.nn.modules.activation.ReLU6": ActivationSpec("relu6", inplace=True),
    "torch.nn.modules.activation.Hardtanh": _hardtanh,
    "torch.nn.modules.activation.Threshold": _threshold,
    "torch.nn.modules.activation.SiLU": ActivationSpec("silu", inplace=True),
    "torch.nn.modules.activation.GELU": _gelu,
    "transformers.activations.SiLUActivation": ActivationSpec("silu"),
    "transformers.activations.GELUActivation": ActivationSpec("gelu"),
    # The same function in four forms; two round sqrt(2 / pi) to ten digits, so they agree to that.
    **{
        f"transformers.activations.{name}": ActivationSpec("gelu_tanh")
        for name in (
            "GELUTanh",
            "PytorchGELUTanh",
            "NewGELUActivation",
            "FastGELUActivation",
            "AccurateGELUActivation",
        )
    },
    "transformers.models.bloom.modeling_bloom.BloomGelu": ActivationSpec("gelu_tanh"),
    "transformers.activations.QuickGELUActivation": ActivationSpec("quick_gelu"),
    "timm.layers.activations.QuickGELU": ActivationSpec("quick_gelu"),
    "open_clip.transformer.QuickGELU": ActivationSpec("quick_gelu"),
    "clip.model.QuickGELU": ActivationSpec("quick_gelu"),
    "torch.nn.modules.rnn.RNNBase": _recurrent,
    "torch.nn.modules.rnn.RNNCell": _recurrent,
    **{
        f"torch.nn.modules.activation.{name}": _outside
        for name in ("RReLU", "ELU", "SELU", "CELU", "Hardswish", "Hardsigmoid", "Mish", "Softplus")
    },
}


def read_module(module: nn.Module) -> ActivationSpec | NearMiss | None:
    """Recognises an activation module or a near miss; None for other modules."""
    for base in type(module).__mro__:
        row = MODULES.get(f"{base.__module__}.{base.__qualname__}")
        if row is not None:
            read = row if isinstance(row, ActivationSpec) else row(module)
            if isinstance(read, ActivationSpec) and type(module).forward is not base.forward:  # type: ignore[attr-defined]
                return NearMiss(f"{type(module).__name__} overrides the forward of {base.__name__}", family=True)
            return read
    return None


# ------------------------------------------------------------------------------------------------------------ functions


class Arguments(NamedTuple):
    """The arguments of a call of an activation function. ``activation``: set if it depends on them."""

    x: Any
    slope: float | Tensor | None = None
    inplace: bool = False
    activation: str = ""


def _read_unary(input: Any, inplace: bool = False) -> Arguments:
    return Arguments(input, None, inplace)


def _read_leaky(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Arguments:
    return Arguments(input, negative_slope, inplace)


def _read_prelu(input: Any, weight: Any) -> Arguments:
    return Arguments(input, weight)


def _read_gelu(input: Any, *, approximate: str = "none") -> Arguments | None:
    activation = GELUS.get(approximate)
    return Arguments(input, activation=activation) if activation else None


def _read_hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Arguments | None:
    return Arguments(input, None, inplace) if (min_val, max_val) == (0, 6) else None


def _read_threshold(input: Any, threshold: float, value: float, inplace: bool = False) -> Arguments | None:
    return Arguments(input, None, inplace) if (threshold, value) == (0, 0) else None


def read_partial(partial: functools.partial[Any]) -> Arguments | None:
    """The arguments bound by a partial of a function in ``FUNCTIONS``; None if they rule out the family."""
    return SIGNATURES[FUNCTIONS[partial.func].rstrip("_")].read(*(partial.args or (None,)), **partial.keywords)


class CallSignature(NamedTuple):
    """The signature of an activation function. ``read``: parses a call's arguments; returns None if they rule out the family.
    ``activation``: the function's, unless its arguments select another."""

    activation: str
    read: Callable[..., Arguments | None]


# By the function's name, without the underscore of an in-place variant.
SIGNATURES = {
    "relu": CallSignature("relu", _read_unary),
    "leaky_relu": CallSignature("leaky_relu", _read_leaky),
    "prelu": CallSignature("prelu", _read_prelu),
    "relu6": CallSignature("relu6", _read_unary),
    "hardtanh": CallSignature("relu6", _read_hardtanh),
    "threshold": CallSignature("relu", _read_threshold),
    "silu": CallSignature("silu", _read_unary),
    "gelu": CallSignature("gelu", _read_gelu),
}
METHODS = ("relu", "relu_", "prelu")  # of tensors
# torch's namespaces: each may have its own object for the same function.
NAMESPACES = (torch, F, torch._C._nn, torch._VF, torch.ops.aten, Tensor)
_OUTSIDE = ("rrelu", "elu", "selu", "celu", "hardswish", "hardsigmoid", "mish", "softplus")


def _collect(names: Iterable[str]) -> dict[Any, str]:
    """{function: name} of torch's functions with these names, and their in-place variants."""
    functions = {
        function: name
        for base in names
        for name in (base, base + "_")
        for space in NAMESPACES
        if (function := getattr(space, name, None)) is not None
    }
    packets = [(packet, name) for packet, name in functions.items() if isinstance(packet, torch._ops.OpOverloadPacket)]
    overloads = {getattr(packet, overload): name for packet, name in packets for overload in packet.overloads()}
    return functions | overloads


FUNCTIONS = _collect(SIGNATURES)
OUTSIDE = _collect(_OUTSIDE)


def activation_of(target: Any) -> str:
    """The activation that a function in ``FUNCTIONS``, a partial of one, or an activation module computes."""
    if isinstance(target, functools.partial):
        arguments = read_partial(target)
        if arguments is not None and arguments.activation:
            return arguments.activation
        target = target.func
    if isinstance(target, nn.Module):
        spec = read_module(target)
        assert isinstance(spec, ActivationSpec)
        return spec.activation
    return SIGNATURES[FUNCTIONS[target].rstrip("_")].activation
