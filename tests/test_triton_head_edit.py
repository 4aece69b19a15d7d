"""Rung 5: the head edit's Triton launches and compiled PTX, executed on the CPU, held to the CPU kernels' bounds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

from conformance import check_against_float64, outputs, sample_named
from triton_recorder import Recorder, triton_on_cpu

from ctkernels.functional import head_edit
from ctkernels.testing import head_edit_samples

NAMES = [s.name for s in head_edit_samples()]
# The layouts that make different cuts: heads side by side, tokens between heads, an edit for every sample.
FEW = ["head edit (B, T, H D)", "head edit (B, H, T, D)", "head edit per sample", "head edit per sample, (B, H, T, D)"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _run(name: str, dtype: torch.dtype, sm: int) -> dict[str, torch.Tensor]:
    with triton_on_cpu(Recorder(sm)):
        return outputs(sample_named(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_sample(name: str, dtype: torch.dtype) -> None:
    check_against_float64(sample_named(name, dtype), _run(name, dtype, 80))
