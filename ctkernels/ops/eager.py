"""Eager calls on the CPU that go to the compiled kernels without the dispatcher (``csrc/cpu/eager.cpp``).

On a few values, finding a kernel takes several times as long as running it. An entry takes a call that is right and usual,
and declines every other by returning ``NotImplemented``: then the general way runs, which words the errors and serves
subclasses, modes, transforms, traces and forced backends. Where a call is right and usual but records a gradient, it
returns None. Compiled and exported code never comes here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import backends

Entry = Callable[..., Any]


def _missing() -> str | None:
    """Why there are no such calls here, or None; prepares them."""
    if backends.NATIVE is None:
        return "the CPU kernels are not built"
    states = (
        torch._C._len_torch_function_stack,
        torch._C._len_torch_dispatch_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._is_tracing,
        torch.autograd._profiler_enabled,
    )
    known = backends.NATIVE.eager_setup(
        torch.Tensor, torch.nn.Parameter, backends.FORCED, states, vars(torch.autograd.forward_ad),
        torch._C._increment_version, torch.is_inference_mode_enabled,
    )  # fmt: skip
    return None if known else f"torch {torch.__version__} lacks torch_tensor_from_pyobject, which 2.14 added"


def _declines(*_: Any) -> Any:
    return NotImplemented


def entry(name: str) -> Entry:
    """The function of that name in ``csrc/cpu/eager.cpp``, or one that declines every call."""
    if MISSING is not None:
        return _declines
    made: Entry = getattr(backends.NATIVE, name)
    return made


MISSING = _missing()


def way() -> str:
    """How eager calls reach the kernels, in words."""
    if MISSING is None:
        return "to the kernels without the dispatcher, where nothing about them is unusual"
    return f"through the dispatcher: {MISSING}"


class Entries:
    """The entries of an op, by its name, on what its Functions have.

    forward(*inputs, *attrs) -> y       gradients(needs, dy, inputs, attrs) -> a gradient or None for each of ``needs``
    """

    def __init__(self, name: str | None) -> None:
        self.forward: Entry = _declines if name is None else entry(name)
        self.gradients: Entry = _declines if name is None else entry(f"{name}_gradients")


NONE = Entries(None)
