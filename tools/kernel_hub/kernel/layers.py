"""Layers for ``kernels.kernelize``: each is a ``forward`` that a module can take over, and has no state of its own.

A layer computes what the module computed. A module may also have knobs, the attributes ``beta``, ``coeff`` and ``channel_dim``:
its activation is then the CT unit with those. They are as ``ctu`` takes them, numbers or tensors, parameters included; one that
is not there has the value of the plain activation. An in-place activation overwrites its input only where no gradient is needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import ctu, ctu_and_mul, head_edit
from .ops.autograd import needs_grad

# beta and coeff at which the unit is the plain activation.
_PLAIN = {"relu": (1.0, 0.5), "leaky_relu": (1.0, 0.5), "relu6": (1.0, 0.5)}
_PLAIN |= {"silu": (0.5, 1.0), "gelu": (0.5, 1.0), "gelu_tanh": (0.5, 1.0)}

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by the attribute `approximate`

# By the class of an MLP's activation module, of torch or transformers.
_ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def _knobs(module: nn.Module, activation: str) -> dict[str, Any]:
    beta, coeff = _PLAIN[activation]
    return {
        "beta": getattr(module, "beta", beta),
        "coeff": getattr(module, "coeff", coeff),
        "channel_dim": getattr(module, "channel_dim", None),
        "activation": activation,
    }


def _activate(module: nn.Module, x: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    knobs = _knobs(module, activation)
    tensors = [value for value in (x, *knobs.values()) if isinstance(value, Tensor)]
    inplace = getattr(module, "inplace", False) and not needs_grad(tensors)
    return ctu(x, **knobs, negative_slope=negative_slope, inplace=inplace)


def _gate(module: nn.Module, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return ctu_and_mul(gate, up, **{**_knobs(module, activation), "channel_dim": -1})


def _activation_of(module: nn.Module) -> str:
    """The activation that a gated MLP's own activation module is."""
    name = type(module).__name__
    if name == "GELU":
        return _GELU[module.approximate]  # type: ignore[index]
    if name not in _ACTIVATIONS:
        raise TypeError(f"gated MLP: its activation must be one of GELU, {', '.join(_ACTIVATIONS)}; got {name}")
    return _ACTIVATIONS[name]


class ReLU(nn.Module):
    """``nn.ReLU``."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _activate(self, input, "relu")


class LeakyReLU(nn.Module):
    """``nn.LeakyReLU``."""

    can_torch_compile = True
    negative_slope: float

    def forward(self, input: Tensor) -> Tensor:
        return _activate(self, input, "leaky_relu", self.negative_slope)


class ReLU6(nn.Module):
    """``nn.ReLU6``."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _activate(self, input, "relu6")


class SiLU(nn.Module):
    """``nn.SiLU``, and transformers' "SiLU"."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _activate(self, input, "silu")


class GELU(nn.Module):
    """``nn.GELU``, either form, and transformers' "GeLU"."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _activate(self, input, _GELU[getattr(self, "approximate", "none")])


class GELUTanh(nn.Module):
    """Transformers' "GeluTanh" and "NewGELU": GELU by tanh."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return _activate(self, input, "gelu_tanh")


class SiluAndMul(nn.Module):
    """``silu(gate) * up`` of ``x = [gate | up]`` along its last dimension."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _gate(self, x, None, "silu")


class GeluAndMul(nn.Module):
    """``gelu(gate) * up`` of ``x = [gate | up]`` along its last dimension."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return _gate(self, x, None, _GELU[getattr(self, "approximate", "none")])


class GatedMLP(nn.Module):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``: the MLP of Llama, Mistral, Qwen and Gemma. Per-channel knobs have a value
    per channel of ``gate_proj``."""

    can_torch_compile = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_gate(self, self.gate_proj(x), self.up_proj(x), _activation_of(self.act_fn)))


class PackedGatedMLP(nn.Module):
    """The same with both projections in one, ``gate_up_proj``: the MLP of Phi-3 and GLM."""

    can_torch_compile = True
    gate_up_proj: nn.Module
    down_proj: nn.Module
    activation_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        packed = self.gate_up_proj(hidden_states)
        return self.down_proj(_gate(self, packed, None, _activation_of(self.activation_fn)))


class HeadEdit(nn.Module):
    """``(1 + g_m * m) * z + g_a * a`` of attention heads' outputs, (..., heads * head_dim). See ``head_edit``."""

    can_torch_compile = True
    m: Tensor | None
    a: Tensor | None
    g_m: Tensor | None
    g_a: Tensor | None

    def forward(self, z: Tensor) -> Tensor:
        return head_edit(z, self.m, self.a, self.g_m, self.g_a)
