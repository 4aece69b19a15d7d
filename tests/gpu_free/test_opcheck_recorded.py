"""opcheck of the GPU kernels' own host code: what the ops change, alias and return is what their schemas say.

The host code and the compiled PTX run on CPU tensors (`triton_recorder`, `cuda_recorder`), registered with the real schemas
under a library of their own; torch compares every argument with what it was before the call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from ptx.toolchain import has_triton, nvcc

from ctkernels.ops import backends
from ctkernels.ops.ctu import OP as CTU
from ctkernels.ops.hard_concrete import CLIP, SAMPLE
from ctkernels.ops.hard_concrete import OP as GATES
from ctkernels.ops.head_edit import OP as HEAD_EDIT
from ctkernels.ops.record import Op

LIBRARY = "ctkernels_triton_recorded"


@lru_cache(maxsize=1)
def _triton_library() -> torch.library.Library:
    """The Triton host code, registered for CPU tensors under LIBRARY with the schemas of the real ops."""
    from ctkernels.ops.channelwise.launch import implementation

    library = torch.library.Library(LIBRARY, "DEF")
    for op in (CTU, HEAD_EDIT, GATES):
        for overload, kernel in zip(op.overloads, implementation(op)):
            if overload is not None:
                schema = str(overload._schema).removeprefix("ctkernels::")
                library.define(schema)
                library.impl(schema.partition("(")[0], kernel, "CPU")
    return library


def _triton(x: Tensor) -> tuple[str, AbstractContextManager[Any]]:
    from triton_recorder import Recorder, triton_on_cpu

    _triton_library()
    return LIBRARY, triton_on_cpu(Recorder(80))


def _cuda(x: Tensor) -> tuple[str, AbstractContextManager[Any]]:
    import cuda_recorder

    recorder = cuda_recorder.Recorder(80)
    recorder.begin(x)
    return cuda_recorder.LIBRARY, cuda_recorder.cuda_on_cpu(recorder)


TOOLCHAINS = [
    pytest.param(_triton, id="triton", marks=pytest.mark.skipif(not has_triton(), reason="triton is not installed")),
    pytest.param(_cuda, id="cuda", marks=pytest.mark.skipif(
        nvcc() is None or not backends.CUDA_BINDING.exists(), reason="nvcc, or the host code, is not there")),
]  # fmt: skip


def _ctu(dtype: torch.dtype, full: bool) -> tuple[Any, ...]:
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


@pytest.mark.parametrize("toolchain", TOOLCHAINS)
@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (name, suffix)
        for name, (op, *_) in CALLS.items()
        for suffix in ("", "_", "_backward")
        if suffix != "_" or op.inplace_schema is not None
    ],
)
def test_schema(toolchain: Callable[[Tensor], tuple[str, AbstractContextManager[Any]]], name: str, suffix: str) -> None:
    op, make, needs = CALLS[name]
    args = make()
    x = args[0]
    if suffix == "_backward":
        args = (torch.randn_like(x), *args, needs)
    namespace, recorded = toolchain(x)
    with recorded as recorder:
        packet = getattr(getattr(torch.ops, namespace), op.name + suffix).default
        assert opcheck(packet, args, test_utils="test_schema") == {"test_schema": "SUCCESS"}
    assert recorder.launches
