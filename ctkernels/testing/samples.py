"""Samples of all ops: calls that together cover every code path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules

import torch

from .. import ops
from ..ops.registration import OPS
from ..ops.sample import Sample

# By the name of the op: `samples` of every op's folder that has a `samples.py`.
SAMPLES: dict[str, Callable[..., Iterator[Sample]]] = {
    folder.name: import_module(f"{ops.__name__}.{folder.name}.samples").samples
    for folder in iter_modules(ops.__path__)
    if folder.ispkg and find_spec(f"{ops.__name__}.{folder.name}.samples") is not None
}


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Iterator[Sample]:
    """The samples of every op that has elementwise data and per-channel parameters.

    Args:
        dtype: of elementwise tensors; parameters are float32, or float64 for float64.
        device: where the tensors are.
        seed: of their values, which are the same on every device.

    Examples:
        >>> from ctkernels.testing import samples
        >>> worst = max(float(sample().abs().max()) for sample in samples() if sample().numel())
    """
    for name, of_op in SAMPLES.items():
        op = OPS.get(name)
        if op is not None and set(op.inputs._fields) - op.elementwise:
            yield from of_op(dtype, device, seed)
