"""What runs where a layer, a BatchNorm, a sum and an activation ran one after the other."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..ops._op import in_transform
from .anew import computed_anew, normalised
from .fold import Frozen, affine, is_eval
from .frozen import adds_bias_apart, call, call_without_bias
from .trace import has_hooks


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

    def __init__(self, source: nn.Module | None, norm: nn.Module | None, unit: Any) -> None:
        self.source, self.norm, self.unit = source, norm, unit
        self.modules = [m for m in (source, norm, unit) if isinstance(m, nn.Module)]

    def __call__(self, x: Tensor, residual: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if any(has_hooks(m) for m in self.modules) or (not compiling and in_transform()):
            return self.unfused(x, residual, *args, **kwargs)
        frozen = self.frozen(x, compiling)
        if self.unit is None:
            if frozen is not None:
                return self.layer(x, frozen)
            if self.source is None or compiling:
                return self.unfused(x, None)
            return normalised(self.norm, self.source(x))
        arguments = self.arguments(x, *args, **kwargs)
        if arguments is None or not isinstance(residual, (Tensor, type(None))):
            return self.unfused(x, residual, *args, **kwargs)
        scale = shift = None
        if frozen is not None and self.leaves_bias(x, residual, frozen, arguments):
            z, shift = call_without_bias(self.source, frozen, x)
            arguments["channel_dim"] = 1
        else:
            z = self.layer(x, frozen)
        if self.norm is not None and frozen is None:
            if (
                z.dim() > 1
                and arguments["channel_dim"] in (None, 1, 1 - z.dim())
                and (is_eval(self.norm) or not compiling)
            ):
                scale, shift = affine(self.norm, z)
                arguments["channel_dim"] = 1
            else:
                z = self.norm(z)
        if residual is not None and residual.shape != z.shape:
            z, residual = z + residual, None
        inplace = z is not x and (residual is None or residual.dtype == z.dtype)
        inplace = inplace and not _records(z, residual, scale, shift, *arguments.values())
        with nullcontext() if compiling else computed_anew(residual):
            return functional.ctu(z, scale=scale, shift=shift, residual=residual, inplace=inplace, **arguments)

    def arguments(self, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        read = getattr(self.unit, "ctu_arguments", None)  # gone once the steering was removed
        return read(x, *args, **kwargs) if read is not None and isinstance(x, Tensor) else None

    def layer(self, x: Tensor, frozen: Frozen | None) -> Tensor:
        if self.source is None:
            return x
        return self.source(x) if frozen is None else call(self.source, frozen, x, _records(x))

    def leaves_bias(self, x: Tensor, residual: Tensor | None, frozen: Frozen, arguments: dict[str, Any]) -> bool:
        """Whether the unit adds the layer's bias, in its own pass: in inference, where that saves one."""
        if _records(x, residual, *arguments.values()) or arguments["channel_dim"] not in (None, 1, 1 - x.dim()):
            return False
        return adds_bias_apart(self.source, frozen, x)

    def forget(self) -> None:
        """Give up copies of weights."""
        if self.source is not None:
            Frozen.of(self.source, self.norm).forget()

    def frozen(self, x: Tensor, compiling: bool) -> Frozen | None:
        """The layer and the norm, where nobody needs them apart: both are frozen, and the norm is in evaluation."""
        if self.source is None or not (self.norm is None or is_eval(self.norm)):
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        frozen, recording = Frozen.of(self.source, self.norm), torch.is_grad_enabled()
        for t in frozen.floats():
            if t.dtype != x.dtype or (recording and t.requires_grad) or (not compiling and t.is_inference()):
                return None
        return frozen

    def unfused(self, x: Tensor, residual: Any, *args: Any, **kwargs: Any) -> Tensor:
        for module in (self.source, self.norm):
            x = x if module is None else module(x)
        if residual is not None:
            x = x + residual
        return x if self.unit is None else self.unit(x, *args, **kwargs)


def _records(*values: Any) -> bool:
    """Whether a call on these records a gradient."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
