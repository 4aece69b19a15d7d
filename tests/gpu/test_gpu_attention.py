"""On a GPU: the fused attention on a real GPU, against float64 and against torch's attention followed by the edit."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, check, results

import ctkernels
from ctkernels.functional import attention_head_edit
from ctkernels.ops import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        backends.BACKENDS["triton"].missing is not None, reason=str(backends.BACKENDS["triton"].missing)
    ),
]
CAUSAL = {"is_causal": True}
CASES = [
    Case("causal, grouped", (2, 4, 2, 130, 150, 64, 64), CAUSAL, layout="tokens first"),
    Case("heads of 32", (2, 2, 2, 140, 140, 32, 32)),
    Case("heads of 128", (2, 2, 2, 260, 260, 128, 128), CAUSAL),
    Case("heads of 192 and 128", (1, 2, 2, 100, 100, 192, 128), CAUSAL),
    Case("heads of 256", (1, 2, 2, 100, 130, 256, 256), CAUSAL),
    Case("padded heads", (2, 2, 2, 100, 90, 80, 48)),
    Case("window", (1, 2, 2, 300, 300, 64, 64), CAUSAL | {"window": 70}),
    Case("padding", (3, 4, 2, 130, 130, 64, 64), CAUSAL, mask="padding"),
    Case("mask with blind queries", (2, 2, 1, 70, 90, 64, 64), mask="random"),
    Case("packed", (3, 4, 2, 0, 0, 64, 64), CAUSAL, lengths=([170, 3, 40], [175, 40, 40])),
    Case("decoding", (2, 8, 2, 1, 1500, 128, 128), CAUSAL),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_float64(case, dtype):
    def moved(t):
        return t.cuda() if isinstance(t, torch.Tensor) else tuple(map(moved, t)) if isinstance(t, tuple) else t

    def fused(**given):
        arguments = {n: moved(t) for n, t in (given | case.arguments()).items()}
        return attention_head_edit(**arguments, implementation="fused").cpu()  # type: ignore[arg-type]

    found = results(fused, case.tensors(dtype), upstream=dtype)
    check(case, dtype, found)
    again = results(fused, case.tensors(dtype), upstream=dtype)
    assert all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["flash4", "flex"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_providers_against_float64(case, name, dtype):
    def moved(t):
        return t.cuda() if isinstance(t, torch.Tensor) else tuple(map(moved, t)) if isinstance(t, tuple) else t

    def served(**given):
        arguments = {n: moved(t) for n, t in (given | case.arguments()).items()}
        return attention_head_edit(**arguments, implementation=name).cpu()

    try:
        found = results(served, case.tensors(dtype), upstream=dtype)
    except RuntimeError as error:
        if "was forced but cannot serve this call" not in str(error):
            raise
        pytest.skip(str(error))
    check(case, dtype, found)


def test_explain_shows_the_prediction():
    q = torch.empty(2, 8, 1024, 64, device="cuda", dtype=torch.bfloat16)
    text = ctkernels.explain(q, "attention_head_edit")
    assert text.count("us predicted") >= 2
    assert text.count(" used") - text.count("not used") == 1
