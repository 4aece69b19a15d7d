"""opcheck of the GPU kernels' own host code: what the ops change, alias and return is what their schemas say.

The host code and the compiled PTX run on CPU tensors (`triton_recorder`, `cuda_recorder`), registered with the real schemas
under a library of their own; torch compares every argument with what it was before the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.library import opcheck

from ctkernels.ops.ctu import OP as CTU
from ctkernels.ops.hard_concrete import CLIP, SAMPLE
from ctkernels.ops.hard_concrete import OP as GATES
from ctkernels.ops.head_edit import OP as HEAD_EDIT
from ctkernels.ops.record import Op

if TYPE_CHECKING:
    pass

LIBRARIES = {"triton": "ctkernels_triton_recorded", "cuda": "ctkernels_recorded"}


@lru_cache(maxsize=1)
def _triton_library():
    """The Triton host code, registered for CPU tensors with the schemas of the real ops."""
    from ctkernels.ops.channelwise.launch import implementation

    library = torch.library.Library(LIBRARIES["triton"], "DEF")
    for op in (CTU, HEAD_EDIT, GATES):
        for overload, kernel in zip(op.overloads, implementation(op)):
            if overload is not None:
                schema = str(overload._schema).removeprefix("ctkernels::")
                library.define(schema)
                library.impl(schema.partition("(")[0], kernel, "CPU")
    return library


def _ctu(dtype, full):
    x, residual = torch.randn(3, 4, 300).to(dtype), torch.randn(3, 4, 300).to(dtype)
    knobs = torch.rand(6, 4).unbind()
    return (
        x,
        *knobs[:2],
        *(knobs[2:5] if full else (None,) * 3),
        residual if full else None,
        1,
        1 if full else 0,
        False,
        0.0,
    )


CALLS: dict[str, tuple[Op, Callable[[], tuple[Any, ...]], int]] = {
    "ctu": (CTU, lambda: _ctu(torch.float32, False), 0b111),
    "ctu, every input": (CTU, lambda: _ctu(torch.bfloat16, True), 0b1111111),
    "head_edit": (
        HEAD_EDIT,
        lambda: (torch.randn(30, 64), torch.randn(64), torch.randn(64), torch.rand(4), torch.rand(4), 1),
        0b11111,
    ),
    "gates from noise": (GATES, lambda: (torch.randn(5, 7), torch.rand(5, 7), -1, SAMPLE, 0.33, -0.1, 1.1), 0b11),
    "gates from a seed": (GATES, lambda: (torch.randn(5, 7), torch.tensor([3]), -1, SAMPLE, 0.33, -0.1, 1.1), 0b1),
    "clipped gates": (GATES, lambda: (torch.randn(5, 7), None, -1, CLIP, 0.33, -0.1, 1.1), 0b1),
}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (name, suffix)
        for name, (op, *_) in CALLS.items()
        for suffix in ("", "_", "_backward")
        if suffix != "_" or op.inplace_schema is not None
    ],
)
def test_schema(toolchain, name, suffix):
    op, make, needs = CALLS[name]
    args = make()
    x = args[0]
    if suffix == "_backward":
        args = (torch.randn_like(x), *args, needs)
    with toolchain() as recorder:
        if toolchain.name == "triton":
            _triton_library()
        else:
            recorder.begin(x)
        packet = getattr(getattr(torch.ops, LIBRARIES[toolchain.name]), op.name + suffix).default
        assert opcheck(packet, args, test_utils="test_schema") == {"test_schema": "SUCCESS"}
    assert recorder.launches
