"""Eager CPU calls that bypass the dispatcher (``csrc/cpu/eager.cpp``).

On small tensors, dispatch takes several times as long as the kernel. An entry point serves valid calls of the common case
and returns ``NotImplemented`` for all others: the dispatcher path then raises the errors, and handles subclasses, modes,
transforms, traces and forced backends. For a valid call that needs a gradient it returns None. Compiled and exported
programs never use entry points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import backends

Entry = Callable[..., Any]


def _missing() -> str | None:
    """Sets up the entry points; returns why they are unavailable, or None."""
    if backends.NATIVE is None:
        return "the CPU kernels are not built"
    states = (
        torch._C._len_torch_function_stack,
        torch._C._len_torch_dispatch_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._is_tracing,
        torch.autograd._profiler_enabled,
    )
    supported = backends.NATIVE.eager_setup(
        torch.Tensor, torch.nn.Parameter, backends.FORCED, states, vars(torch.autograd.forward_ad),
        torch._C._increment_version, torch.is_inference_mode_enabled,
    )  # fmt: skip
    return None if supported else f"torch {torch.__version__} lacks torch_tensor_from_pyobject, which 2.14 added"


def _decline(*_: Any) -> Any:
    return NotImplemented


def entry(name: str) -> Entry:
    """The entry point of that name in ``csrc/cpu/eager.cpp``; without one, a function that declines every call."""
    function: Entry = _decline if MISSING is not None else getattr(backends.NATIVE, name)
    return function


MISSING = _missing()


def describe() -> str:
    """How eager calls reach the kernels."""
    if MISSING is None:
        return "straight to the kernels, without the dispatcher, in the common case"
    return f"through the dispatcher: {MISSING}"


class Entries:
    """Entry points of an op, with the arguments of its autograd Functions.

    forward(*inputs, *attrs) -> y       gradients(needs, dy, inputs, attrs) -> a gradient or None for each of ``needs``
    """

    def __init__(self, name: str | None) -> None:
        self.forward: Entry = _decline if name is None else entry(name)
        self.gradients: Entry = _decline if name is None else entry(f"{name}_gradients")


NONE = Entries(None)
