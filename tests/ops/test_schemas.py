"""The schemas that the compiled kernels read arguments by are those that are registered."""

from __future__ import annotations

import ctypes

import pytest

from ctkernels.ops import backends
from ctkernels.ops.registration import OPS


@pytest.mark.skipif(backends.NATIVE is None, reason="no native kernels here")
def test_schemas_of_the_compiled_kernels():
    library = ctypes.CDLL(backends.NATIVE.__file__)
    library.ctk_schemas.restype = ctypes.c_char_p
    compiled = library.ctk_schemas().decode().splitlines()
    assert len(compiled) >= 2
    for schema in compiled:
        name = schema.partition("(")[0]
        op = OPS[name]
        assert str(op.overloads.forward._schema) == f"ctkernels::{schema}"
        arguments = schema.partition("(")[2].partition(") -> ")[0]
        backward = f"ctkernels::{name}_backward(Tensor dy, {arguments}, int grad_mask) -> Tensor[]"
        assert str(op.overloads.backward._schema) == backward
        if op.overloads.inplace is not None:
            written = arguments.replace("Tensor ", "Tensor(a!) ", 1)
            assert str(op.overloads.inplace._schema) == f"ctkernels::{name}_({written}) -> ()"
