"""What runs where a layer, a BatchNorm, a sum and an activation ran one after the other."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..ops.autograd import in_transform
from . import frozen
from .fold import affine, is_eval, normalise
from .layers import Norm, is_layer, is_unit
from .recompute import normalised, recomputed

_SMALL = 256  # values of a channel: about 50 ns to derive its constants, 0.2 ns for a value more in a pass


@dataclass(frozen=True)
class Site:
    """What was fused into one, by name in the model; "" for a part that is not there.

    Attributes:
        layer: the convolution or linear layer.
        norm: the BatchNorm.
        residual: whether a second tensor is added.
        unit: the CT unit. Without one the BatchNorm is folded into the layer, and what follows is as it was.
    """

    layer: str
    norm: str
    residual: bool
    unit: str

    def __str__(self) -> str:
        return " -> ".join(
            [n for n in (self.layer, self.norm) if n] + ["add"] * self.residual + [self.unit] * bool(self.unit)
        )


class FusedCall:
    """The call that stands for a site in generated code: ``(x, residual or None, *other arguments of the unit)``.

    Which way it goes is decided at every call, by what the modules and tensors are then; where none applies, the modules
    are called one after the other.
    """

    __name__ = "fused"  # what generated code calls it

    def __init__(self, source: nn.Module | None, norm: Norm | None, unit: Any) -> None:
        self.source: Any = source
        self.known, self.unit = norm, unit
        self.norm: Any = None if norm is None else norm.module
        self.inside = norm is not None and norm.unit is not None  # the norm's own forward calls the unit

    def __call__(self, x: Tensor, residual: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        # Like a compiled program, a trace is to hold for other sizes, and for calls with gradients.
        tracing = torch.jit.is_tracing()
        compiling = tracing or torch.compiler.is_compiling()
        if not self.is_as_read() or (not compiling and in_transform()):
            z = x if self.source is None else self.source(x)
            return self.unfused(z, residual, *args, **kwargs)
        if self.unit is None:
            return self.folded(x, compiling)
        arguments = self.arguments(x, *args, **kwargs)
        if arguments is None:
            z = x if self.source is None else self.source(x)
            return self.unfused(z, residual, *args, **kwargs)
        bias: Any = None
        scale = shift = None
        if self.leaves_bias(x, residual, arguments):
            z, bias = frozen.without_bias(self.source, x), self.source.bias
        else:
            z = self.layer(x)
        if not self.fits(z, residual, arguments):
            z = z if bias is None else z + bias.view(-1, *[1] * (z.dim() - 2))
            return self.unfused(z, residual, *args, **kwargs)
        if self.norm is not None:
            if not compiling and bias is None and is_eval(self.norm) and self.is_small(z, residual, arguments):
                self.norm._check_input_dim(z)
                z = normalise(self.norm, z)
            elif is_eval(self.norm) or not compiling:
                self.norm._check_input_dim(z)
                scale, shift = affine(self.norm, z)
            elif self.inside:
                return self.norm(z)
            else:
                z = self.norm(z)
        if bias is not None:
            shift = bias if scale is None else shift + scale * bias
        if shift is not None:
            arguments["channel_dim"] = 1
        inplace = z is not x and (residual is None or residual.dtype == z.dtype)
        inplace = inplace and not tracing and not _records(z, residual, scale, shift, *arguments.values())
        with nullcontext() if compiling else recomputed(residual):
            return functional.ctu(z, scale=scale, shift=shift, residual=residual, inplace=inplace, **arguments)

    def is_as_read(self) -> bool:
        """Whether the modules still run the code that this call stands for."""
        return (
            (self.source is None or is_layer(self.source))
            and (self.known is None or self.known.is_as_read())
            and (not isinstance(self.unit, nn.Module) or is_unit(self.unit))
        )

    def arguments(self, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        return self.unit.ctu_arguments(x, *args, **kwargs) if isinstance(x, Tensor) else None

    def layer(self, x: Tensor) -> Tensor:
        if self.source is None:
            return x
        recorded = _records(x) and not _records(self.source.weight, self.source.bias) and _by_itself(x, self.source)
        return frozen.call(self.source, x, recorded)

    def leaves_bias(self, x: Tensor, residual: Tensor | None, arguments: dict[str, Any]) -> bool:
        """Whether the unit adds the layer's bias, in its own pass: in inference, where that saves one.

        torch makes one of it after cuDNN's convolutions.
        """
        source = self.source
        if source is None or source.bias is None or not _adds_bias_apart(x) or not _by_itself(x, source):
            return False
        tensors = (x, residual, source.weight, source.bias, *arguments.values())
        return (
            frozen.is_plain_convolution(source, x)
            and not _records(*tensors)
            and arguments["channel_dim"] in (None, 1, 1 - x.dim())
            and (self.norm is None or is_eval(self.norm))
        )

    def fits(self, z: Tensor, residual: Any, arguments: dict[str, Any]) -> bool:
        """Whether the unit can take all that is before it."""
        if residual is not None and (not isinstance(residual, Tensor) or residual.shape != z.shape):
            return False
        if self.norm is None:
            return True
        return z.dim() > 1 and arguments["channel_dim"] in (None, 1, 1 - z.dim()) and _normalises(self.norm, z.dtype)

    def is_small(self, z: Tensor, residual: Tensor | None, arguments: dict[str, Any]) -> bool:
        """Whether a pass over ``z`` costs less than what the unit derives for every channel's scale and shift, on a CPU."""
        small = z.is_cpu and z.numel() < _SMALL * z.shape[1]
        return small and not _records(z, residual, self.norm.weight, self.norm.bias, *arguments.values())

    def folded(self, x: Tensor, compiling: bool) -> Tensor:
        """Without a unit: the norm's scale and shift go into the layer's weights, where that is less work."""
        source, norm = self.source, self.norm
        assert self.known is not None
        constant = is_eval(norm) and not _records(source.weight, source.bias, norm.weight, norm.bias)
        constant = constant and _by_itself(x, source) and norm.running_mean.dtype == x.dtype
        if constant and _normalises(norm, x.dtype) and frozen.folds_cheaply(source, x):
            norm._check_input_dim(x)
            z = frozen.call(source, x, _records(x), *affine(norm, x))
            return z if self.known.other is None else self.known.other(z)
        z = self.layer(x)
        return norm(z) if compiling or self.known.reads else normalised(norm, z)

    def unfused(self, z: Tensor, residual: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What comes after the layer, one after the other."""
        if self.norm is not None:
            z = self.norm(z)
        if residual is not None:
            z = z + residual
        return z if self.unit is None or self.inside else self.unit(z, *args, **kwargs)


def _records(*values: Any) -> bool:
    """Whether a call on these records a gradient."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _by_itself(x: Tensor, source: Any) -> bool:
    """Whether ``source`` computes in the dtype of ``x``."""
    return x.dtype == source.weight.dtype and not torch.is_autocast_enabled(x.device.type)


def _adds_bias_apart(x: Tensor) -> bool:
    return x.is_cuda


def _normalises(norm: Any, dtype: torch.dtype) -> bool:
    """Whether torch's BatchNorm takes this dtype with these weights."""
    half = dtype in (torch.float16, torch.bfloat16)
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(t is None or t.dtype == dtype or (half and t.dtype == torch.float32) for t in tensors)
