"""Rung 5: the fused attention's launch code and compiled PTX, executed on the CPU with race checks, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from attention_cases import Case, check, results
from attention_recorder import Recorder, fused_on_cpu

from ctkernels.functional import attention_head_edit
from ctkernels.ops.attention import triton_launch

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
CAUSAL = {"is_causal": True}

# Lengths that no tile divides; between them every branch of every kernel.
CASES = [
    (Case("causal, grouped, fewer queries", (2, 2, 1, 130, 150, 64, 64), CAUSAL, layout="tokens first"), BRAIN),
    (Case("full, padded head sizes", (1, 2, 2, 67, 141, 40, 24)), HALF),
    (Case("causal, more queries than keys", (1, 1, 1, 140, 70, 32, 32), CAUSAL), HALF),
    (Case("window, causal", (1, 1, 1, 290, 300, 32, 32), CAUSAL | {"window": 70}), BRAIN),
    (Case("window both ways", (1, 1, 1, 270, 290, 32, 32), {"window": 40}), HALF),
    (Case("padding, causal", (2, 2, 2, 70, 70, 32, 32), CAUSAL, mask="padding"), BRAIN),
    (Case("mask with blind queries", (1, 2, 1, 70, 90, 32, 32), mask="random"), HALF),
    (Case("bias", (1, 2, 2, 68, 70, 32, 32), {"scale": 0.3}, mask="bias"), BRAIN),
    (Case("packed, causal", (3, 2, 1, 0, 0, 32, 32), CAUSAL, lengths=([70, 3, 20], [75, 40, 20])), BRAIN),
    (Case("packed, window", (2, 1, 1, 0, 0, 32, 32), CAUSAL | {"window": 9}, lengths=([30, 66], [30, 66])), HALF),
    (Case("float32", (1, 2, 1, 67, 70, 32, 32), CAUSAL), FLOAT),
    (Case("heads of 128", (1, 1, 1, 70, 70, 128, 128), CAUSAL), BRAIN),
    (Case("heads of 192 and 128", (1, 1, 1, 66, 66, 192, 128), CAUSAL), BRAIN),
    (Case("heads of 256", (1, 1, 1, 66, 40, 256, 256)), HALF),
    (Case("scale alone", (1, 2, 2, 70, 40, 32, 32), absent=("a", "g_a", "g_m")), BRAIN),
    (Case("offset alone", (1, 2, 2, 70, 40, 32, 32), absent=("m", "g_m")), BRAIN),
]
DECODING = [
    (Case("one token", (2, 4, 2, 1, 700, 64, 64), CAUSAL, layout="tokens first"), BRAIN),
    (Case("three tokens, window", (1, 4, 2, 3, 600, 32, 32), CAUSAL | {"window": 290}), HALF),
    (Case("padded", (3, 2, 1, 1, 530, 32, 48), mask="padding"), BRAIN),
    (Case("float32, 20 rows", (1, 10, 1, 2, 300, 32, 32), CAUSAL), FLOAT),
    (Case("blind splits", (1, 1, 1, 2, 520, 32, 32), CAUSAL | {"window": 5}), BRAIN),
]


def _kernels(recorder: Recorder) -> list[str]:
    return [name for name, *_ in recorder.launches]


def _ids(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=_ids)
def test_forward_and_backward(case: Case, dtype: torch.dtype) -> None:
    with fused_on_cpu(Recorder()) as recorder:
        found = results(attention_head_edit, case.tensors(dtype), upstream=dtype, **case.arguments())
    assert _kernels(recorder) == ["forward_kernel", "prepare_kernel", "edit_kernel", "keys_kernel", "queries_kernel"]
    check(case, dtype, found)


@pytest.mark.parametrize(("case", "dtype"), DECODING, ids=_ids)
def test_decoding(case: Case, dtype: torch.dtype) -> None:
    with fused_on_cpu(Recorder()) as recorder, torch.no_grad():
        y = attention_head_edit(**case.tensors(dtype), **case.arguments())
    assert _kernels(recorder) == ["split_kernel", "join_kernel"]
    assert recorder.launches[0][2]["splits"] > 1
    truth = case.plain(*(None if t is None else t.double() for t in case.tensors(dtype).values()))
    baseline = case.plain(*case.tensors(dtype).values())
    bound = 2 * (baseline.double() - truth).abs().max() + torch.finfo(dtype).eps * (truth.abs() + 4)
    assert ((y.double() - truth).abs() <= bound).all()
