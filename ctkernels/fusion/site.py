"""The fused call of a layer, a BatchNorm, a sum and an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..nn import records_grad
from ..ops import eager
from ..ops.autograd import in_transform
from ..ops.ctu.op import ACTIVATIONS, LEAKY
from . import frozen
from .fold import affine, is_eval, normalise
from .layers import Norm, Snapshot, is_layer, is_unit
from .recompute import normalised, recomputed

_SMALL = 256  # values per channel: computing its constants takes about 50 ns, a pass over one more value 0.2 ns
_AFTER_NORM = eager.entry("ctu_after_norm")
# Defaults of functional.ctu, for arguments that a unit leaves out.
_DEFAULTS = {
    "beta": None, "coeff": 0.5, "channel_dim": None, "raw": False, "activation": "relu", "negative_slope": 0.01, "eps": 0.0,
}  # fmt: skip
LARGE = 1 << 14  # values: for smaller tensors, checking for shared memory costs more than allocating


@dataclass(frozen=True)
class FusedSite:
    """Modules fused into one call, by their names in the model; "" for absent parts.

    Attributes:
        layer: the convolution or linear layer.
        norm: the BatchNorm.
        residual: whether a second tensor is added.
        unit: the CT unit. Without one, the BatchNorm is folded into the layer.
        product: whether the unit's result is multiplied by a second tensor, as in the gated MLP of a language model.
    """

    layer: str
    norm: str
    residual: bool
    unit: str
    product: bool = False

    def __str__(self) -> str:
        before = [n for n in (self.layer, self.norm) if n] + ["add"] * self.residual
        return " -> ".join(before + [self.unit] * bool(self.unit) + ["mul"] * self.product)


class FusedCall:
    """The call of a site in generated code: ``(x, residual or None, *other arguments of the unit)``.

    Every call decides how to compute it, from the state of modules and tensors; if no fused path applies, it calls the
    modules one after the other. Layer and norm are read through ``_parameters`` and ``_buffers``, which ``is_unchanged``
    has checked: faster than attributes of a module.
    """

    __name__ = "fused"  # its name in generated code

    def __init__(self, source: nn.Module | None, norm: Norm | None, unit: Any) -> None:
        self.source: Any = source
        self.is_linear = isinstance(source, nn.Linear)
        self.norm_spec, self.unit = norm, unit
        self.norm: Any = None if norm is None else norm.module
        self.snapshot: Snapshot | None = None
        self.inside = norm is not None and norm.unit is not None  # the norm's own forward calls the unit

    def __call__(self, x: Tensor, residual: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        source, norm, unit = self.source, self.norm, self.unit
        # Like a compiled program, a trace must hold for other sizes, and for calls with gradients.
        tracing = torch.jit.is_tracing()
        compiling = tracing or torch.compiler.is_compiling()
        arguments = None
        if self.is_unchanged() and (compiling or not in_transform()):
            if unit is None:
                return self.folded(x, compiling)
            arguments = unit.ctu_arguments(x, *args, **kwargs) if isinstance(x, Tensor) else None
        if arguments is None:
            return self.unfused(x if source is None else source(x), residual, *args, **kwargs)
        z, bias = x, None
        if source is not None:
            if source._parameters["bias"] is not None and self.leaves_bias(x, arguments):
                z, bias = frozen.without_bias(source, x, self.frozen_layer(x)), source._parameters["bias"]
            else:
                z = self.layer(x, compiling)
        if source is not None and norm is not None and bias is None and not compiling and is_eval(norm):
            y = self.after_norm(z, residual, arguments)
            if y is not None:
                return y
        if not self.fits(z, residual, arguments):
            z = z if bias is None else z + bias.view(-1, *[1] * (z.dim() - 2))
            return self.unfused(z, residual, *args, **kwargs)
        recorded = torch.is_grad_enabled() and self.records(z, residual, arguments)
        scale, shift = None, bias
        if norm is not None:
            frozen_statistics = is_eval(norm)
            if frozen_statistics or not compiling:
                norm._check_input_dim(z)
            if frozen_statistics and not (compiling or recorded) and bias is None and _is_small(z):
                z = normalise(norm, z)
            elif frozen_statistics or not compiling:
                scale, shift = affine(norm, z)
                if bias is not None:
                    shift = shift + scale * bias
            elif self.inside:
                return norm(z)
            else:
                z = norm(z)
        if shift is not None:
            arguments["channel_dim"] = 1
        arguments |= {"scale": scale, "shift": shift, "residual": residual}
        if residual is not None and recorded and not compiling:
            with recomputed(residual):
                return functional.ctu(z, **arguments)
        inplace = not recorded and z is not x and (residual is None or residual.dtype == z.dtype)
        inplace = inplace and not tracing and (compiling or z.numel() >= LARGE)
        return functional.ctu(z, inplace=inplace, **arguments)

    def after_norm(self, z: Tensor, residual: Tensor | None, arguments: dict[str, Any]) -> Tensor | None:
        """Norm in evaluation, sum and unit in one entry point, written over the layer's result ``z``; None if it declines."""
        complete = _DEFAULTS | arguments
        kind = ACTIVATIONS.get(complete["activation"], -1)
        if len(complete) > len(_DEFAULTS):  # arguments without a place here, such as knobs per sample
            return None
        norm = self.norm
        weights, buffers = norm._parameters, norm._buffers
        norm._check_input_dim(z)
        y = _AFTER_NORM(
            z, complete["beta"], complete["coeff"], complete["negative_slope"] if kind == LEAKY else None, None, None, residual,
            complete["channel_dim"], kind, complete["raw"], complete["eps"],
            buffers["running_mean"], buffers["running_var"], weights["weight"], weights["bias"], norm.eps,
        )  # fmt: skip
        return y if isinstance(y, Tensor) else None

    def is_unchanged(self) -> bool:
        """True if the modules still run the code that this call replaces."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.snapshot is not None and self.snapshot.holds():
            return True
        unchanged = (
            (self.source is None or is_layer(self.source))
            and (self.norm_spec is None or self.norm_spec.is_unchanged())
            and (not isinstance(self.unit, nn.Module) or is_unit(self.unit))
        )
        if not compiling:
            comparable = unchanged and (self.norm_spec is None or not self.norm_spec.reads)
            modules = (m for m in (self.source, self.norm, self.unit) if isinstance(m, nn.Module))
            self.snapshot = Snapshot(*modules) if comparable and eager.MISSING is None else None
        return unchanged

    def records(self, z: Tensor, residual: Tensor | None, arguments: dict[str, Any]) -> bool:
        """True if autograd records the norm or the unit."""
        weights = () if self.norm is None else self.norm._parameters.values()
        return records_grad(z, residual, *weights, *arguments.values())

    def layer(self, x: Tensor, compiling: bool) -> Tensor:
        """The layer's result; with frozen weights, its input is not saved."""
        source = self.source
        if self.frozen_layer(x):
            return frozen.call(source, x, True)
        if compiling:  # so that an exported program has the layer's name
            return source(x)
        weight, bias = source._parameters["weight"], source._parameters["bias"]
        if self.is_linear:
            return F.linear(x, weight, bias)
        if _rearranges_weight(x, weight):
            z = source._conv_forward(x.contiguous(), weight, bias)
            return z.contiguous(memory_format=torch.channels_last)
        return source._conv_forward(x, weight, bias)

    def frozen_layer(self, x: Tensor) -> bool:
        """True if autograd records the layer for the gradient of ``x`` alone."""
        source = self.source
        return records_grad(x) and not records_grad(*source._parameters.values()) and _computes_in(x, source)

    def leaves_bias(self, x: Tensor, arguments: dict[str, Any]) -> bool:
        """True if the unit adds the layer's bias, because cuDNN's convolutions are followed by a separate pass for it."""
        source = self.source
        return (
            _adds_bias_apart(x)
            and _computes_in(x, source)
            and frozen.is_plain_convolution(source, x)
            and arguments["channel_dim"] in (None, 1, 1 - x.dim())
            and (self.norm is None or is_eval(self.norm))
        )

    def fits(self, z: Tensor, residual: Any, arguments: dict[str, Any]) -> bool:
        """True if the unit can apply the norm and the sum."""
        if residual is not None and (not isinstance(residual, Tensor) or residual.shape != z.shape):
            return False
        if self.norm is None:
            return True
        return z.dim() > 1 and arguments["channel_dim"] in (None, 1, 1 - z.dim()) and _normalises(self.norm, z.dtype)

    def folded(self, x: Tensor, compiling: bool) -> Tensor:
        """Layer and norm of a site without a unit: one layer with scaled weights, if that is less work."""
        source, norm = self.source, self.norm
        assert self.norm_spec is not None
        constant = is_eval(norm) and not records_grad(*source._parameters.values(), *norm._parameters.values())
        constant = constant and _computes_in(x, source) and norm.running_mean.dtype == x.dtype
        if constant and _normalises(norm, x.dtype) and frozen.folds_cheaply(source, x):
            norm._check_input_dim(x)
            z = frozen.call(source, x, records_grad(x), *affine(norm, x))
            return z if self.norm_spec.other is None else self.norm_spec.other(z)
        z = self.layer(x, compiling)
        return norm(z) if compiling or self.norm_spec.reads else normalised(norm, z)

    def unfused(self, z: Tensor, residual: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the parts after the layer one after the other."""
        if self.norm is not None:
            z = self.norm(z)
        if residual is not None:
            z = z + residual
        return z if self.unit is None or self.inside else self.unit(z, *args, **kwargs)


def _rearranges_weight(x: Tensor, weight: Tensor) -> bool:
    """True on a CPU if torch would copy a convolution's weights into the memory format of ``x``, and converting ``x`` and the
    result costs less."""
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and x.dim() == 4
        and weight.numel() > 4 * x.numel()
        and not x.is_contiguous()
        and weight.is_contiguous()
        and not weight.is_contiguous(memory_format=torch.channels_last)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _is_small(z: Tensor) -> bool:
    """True on a CPU if a pass over ``z`` costs less than precomputing the unit's constants per channel."""
    return z.is_cpu and z.numel() < _SMALL * z.shape[1]


def _computes_in(x: Tensor, source: Any) -> bool:
    """True if ``source`` computes in the dtype of ``x``."""
    return x.dtype == source._parameters["weight"].dtype and not torch.is_autocast_enabled(x.device.type)


def _adds_bias_apart(x: Tensor) -> bool:
    return x.is_cuda


def _normalises(norm: Any, dtype: torch.dtype) -> bool:
    """True if torch's BatchNorm accepts this dtype with these weights."""
    half = dtype in (torch.float16, torch.bfloat16)
    weights, buffers = norm._parameters, norm._buffers
    for t in (weights["weight"], weights["bias"], buffers["running_mean"], buffers["running_var"]):
        if t is not None and t.dtype != dtype and not (half and t.dtype == torch.float32):
            return False
    return True
