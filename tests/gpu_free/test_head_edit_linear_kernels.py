"""Executed PTX: the Triton kernels of the linear layer with the edit in its weights, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("numpy", minversion="2.0", reason="the PTX executor needs numpy 2")

import triton_recorder
from linear_edit_cases import NAMES, PARTS, check, observed, tensors
from ptx import Memory
from recorder import Launched
from roofline.ahead_of_time import compiled
from torch import Tensor

from ctkernels.ops import launcher
from ctkernels.ops.head_edit_linear import op, triton
from ctkernels.ops.head_edit_linear.function import head_edit_linear

WRITES = {"fold_kernel": ("folded", "offset"), "finish_kernel": ("dm", "da", "dg_m", "dg_a")}


class Recorder(triton_recorder.Recorder):
    """Replaces ``launcher.launch``. Only dz is read and written."""

    def __call__(self, kernel, grid, args, meta):
        found, values = compiled(kernel, args, meta, self.sm)
        self.launches.append(Launched(kernel.__name__, grid, None, args))
        given = {n: t for n, t in values.items() if isinstance(t, Tensor)}
        outputs = {n: t for n, t in given.items() if n in WRITES[kernel.__name__]}
        self.memory = Memory()
        inputs = [t for n, t in given.items() if n not in outputs and n != "dz"]
        self.run_compiled(found, grid, values, outputs.values(), inputs)
        assert all(self.memory.written(t).all() for t in outputs.values()), f"{kernel.__name__} leaves a part unwritten"


@pytest.fixture
def recorder(monkeypatch):
    """Records the launches; the passes of the head edit's own op are its CPU kernels'."""
    found = Recorder()
    monkeypatch.setattr(launcher, "launch", found)
    monkeypatch.setattr(op, "kernels", lambda z: triton)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_every_combination_of_edits(parts, dtype, recorder):
    case = tensors(dtype, parts)
    check(case, dtype, observed(head_edit_linear, *case))
    folded_again = "m" in parts
    assert [name for name, *_ in recorder.launches] == ["fold_kernel", *["fold_kernel"] * folded_again, "finish_kernel"]


def test_more_columns_than_a_step_and_rows_that_no_step_divides(recorder, monkeypatch):
    monkeypatch.setattr(triton, "COLUMNS", 16)
    case = tensors(torch.bfloat16, rows=(3, 11), size=7, outputs=9)
    check(case, torch.bfloat16, observed(head_edit_linear, *case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scales_that_nothing_can_be_divided_by(dtype, recorder):
    for m in ([-1.0, -1.0001, -0.7], [199.0, -1.0, -1.0]):
        case = tensors(dtype, rows=(3, 11), m=m)
        check(case, dtype, observed(head_edit_linear, *case))


def test_only_what_needs_a_gradient_is_computed(recorder):
    z, weight, bias, edits = tensors(torch.float32)
    y = head_edit_linear(z, weight, bias, tuple(t.requires_grad_(n == "a") for n, t in zip(NAMES, edits)))
    torch.autograd.grad(y.sum(), edits[1])
    assert [name for name, *_ in recorder.launches] == [
        "fold_kernel",
        "finish_kernel",
    ]  # z needs none: nothing is scaled again
    last = recorder.launches[-1].detail
    assert last["s1"] is None
    assert [name for name in ("dm", "dg_m", "dz") if last[name] is not None] == []
