"""The Triton launches as ops that a compiler sees through, down to the kernels: ``torch.library.triton_op``.

Imported where ``use_backend("triton")`` meets ``torch.compile``. A graph is made for each shape: how a tensor is cut into
programs depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library import triton as _library

from .. import record as _op
from ..record import Op
from . import launch as _triton

OVERLOADS: dict[str, torch._ops.OpOverload] = {}  # by the name of the op that each one stands for


def _traced(host: Callable[..., Any]) -> Callable[..., Any]:
    """The host code with launches that a compiler records."""

    def function(*args: Any) -> Any:
        for t in args:
            if isinstance(t, Tensor):
                for size in (*t.shape, *t.stride()):
                    int(size)
        token = _triton.inlining.set(True)
        try:
            return host(*args)
        finally:
            _triton.inlining.reset(token)

    return function


def _define(op: Op) -> None:
    overloads = {}
    for suffix, host in _triton.implementations(op).items():
        schema = str(_op._OVERLOADS[op.name + suffix]._schema).partition("(")
        name = f"{op.name}{suffix}_triton"
        mutated = (op.inputs[0],) if suffix == "_" else ()
        # torch.compile's caches hash the kernels that torch finds in a function's source. In this one's it would not find
        # them: it gets a partial, whose source it does not read, and a list.
        traced = _traced(partial(host))
        torch.library.triton_op(f"ctkernels::{name}", traced, mutates_args=mutated, schema="".join(schema[1:]))
        _library.triton_ops_to_kernels[f"ctkernels::{name}"] = _triton.kernels(op)
        overloads[suffix] = getattr(torch.ops.ctkernels, name).default
    for suffix, (backward, save) in _op.derivatives(op, overloads.__getitem__).items():
        torch.library.register_autograd(f"ctkernels::{op.name}{suffix}_triton", backward, setup_context=save)
    OVERLOADS.update({op.name + suffix: overload for suffix, overload in overloads.items()})


for _each in _op.OPS:
    _define(_each)
