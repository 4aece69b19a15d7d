"""On a GPU: the linear layer with the edit in its weights, against float64, and in a JoLA layer."""

from __future__ import annotations

import pytest
import torch
from linear_edit_cases import PARTS, check, observed, tensors
from torch import nn

from ctkernels.ops import backends
from ctkernels.ops.head_edit_linear.function import head_edit_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        backends.BACKENDS["triton"].missing is not None, reason=str(backends.BACKENDS["triton"].missing)
    ),
]


def _on_gpu(z, weight, bias, edits):
    z, weight, bias, *edits = (t if t is None else t.cuda() for t in (z, weight, bias, *edits))
    return head_edit_linear(z, weight, bias, edits).cpu()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_against_float64(parts, dtype):
    case = tensors(dtype, parts, rows=(4, 130), size=64, outputs=96)
    found = observed(_on_gpu, *case)
    check(case, dtype, found)
    again = observed(_on_gpu, *case)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_scales_that_nothing_can_be_divided_by():
    for m in ([-1.0, -1.0001, -0.7], [199.0, -1.0, -1.0]):
        case = tensors(torch.bfloat16, rows=(3, 111), m=m)
        check(case, torch.bfloat16, observed(_on_gpu, *case))


def test_a_layer_chooses_it():
    adapters = pytest.importorskip("ctkernels.adapters")
    layers = pytest.importorskip("ctkernels.adapters.jola.layer")
    base = nn.Linear(256, 256).requires_grad_(False)
    layer = layers.JolaLayer(base, 4, 64, "o_proj")
    layer.update_layer("default", adapters.JolaConfig(init_std=0.3))
    layer.set_adapter("default")
    layer = layer.cuda().bfloat16().eval()
    z = torch.randn(1 << 16, 256, device="cuda", dtype=torch.bfloat16)
    assert "in the projection's weights" in layer.explain(z)
    assert "in a pass over its input" in layer.explain(z[:8])
    assert torch.equal(layer(z), head_edit_linear(z, base.weight, base.bias, layer.single_edit(4, 64)))
