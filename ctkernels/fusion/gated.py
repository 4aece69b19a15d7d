"""The fused call of a layer, a CT unit and the product with its result, as in the gated MLPs of language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..nn import records_grad
from ..ops.autograd import in_transform
from .layers import is_layer, is_unit
from .site import LARGE


class GatedCall:
    """The call of a gated product in generated code: ``(x, up, *other arguments of the unit)``.

    dim: the dimension along which ``x`` holds gate and ``up``, and the argument ``up`` is None; None if they are separate.
    """

    __name__ = "fused"  # its name in generated code

    def __init__(self, source: nn.Module | None, unit: Any, dim: int | None) -> None:
        self.source, self.unit, self.dim = source, unit, dim

    def __call__(self, x: Tensor, up: Any, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.jit.is_tracing() or torch.compiler.is_compiling()
        fusible = self.is_unchanged() and (compiling or not in_transform())
        z = x if self.source is None else self.source(x)
        if self.dim is None:
            gate, factor = z, up
        else:
            gate, factor = z.chunk(2, self.dim)
        arguments = self.unit.ctu_arguments(gate, *args, **kwargs) if fusible and _match(gate, factor) else None
        if arguments is None:
            return self.unit(gate, *args, **kwargs) * factor
        if self.dim is not None:
            dim = self.dim % z.dim()
            if z.shape[dim] % 2 or (arguments["channel_dim"] is not None and arguments["channel_dim"] % z.dim() != dim):
                return self.unit(gate, *args, **kwargs) * factor
            return functional.ctu_and_mul(z, None, **arguments | {"channel_dim": dim})
        inplace = z is not x and up.dtype == z.dtype and not records_grad(z, up, *arguments.values())
        inplace = inplace and not torch.jit.is_tracing() and (compiling or z.numel() >= LARGE)
        return functional.ctu_and_mul(z, up, inplace=inplace, **arguments)

    def is_unchanged(self) -> bool:
        """True if the modules still run the code that this call replaces."""
        return (self.source is None or is_layer(self.source)) and (
            not isinstance(self.unit, nn.Module) or is_unit(self.unit)
        )


def _match(gate: Any, factor: Any) -> bool:
    """True for floating-point tensors of the same shape and device."""
    tensors = isinstance(gate, Tensor) and isinstance(factor, Tensor)
    return tensors and gate.shape == factor.shape and factor.is_floating_point() and gate.device == factor.device
