"""Fusion on a GPU, in inference: the unit adds the bias of the convolution before it. Here on the CPU, with the choice forced."""

from __future__ import annotations

import pytest
import torch
from fused_models import BLOCKS, Residual, compare, prepare
from torch import Tensor

import ctkernels
from ctkernels.fusion import site


@pytest.fixture(autouse=True)
def any_device(monkeypatch):
    monkeypatch.setattr(site, "_adds_bias_apart", lambda x: True)


@pytest.fixture
def shifts(monkeypatch):
    """The shifts that units were given."""
    seen: list[Tensor | None] = []
    unit = site.functional.ctu

    def noted(*args, **kwargs):
        seen.append(kwargs["shift"])
        return unit(*args, **kwargs)

    monkeypatch.setattr(site.functional, "ctu", noted)
    return seen


def _network(*blocks, dtype=torch.float32):
    torch.manual_seed(0)
    model = prepare(Residual(blocks)).eval().to(dtype)
    ctkernels.steer(model, 0.8)
    return model


def _image(dtype=torch.float32):
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_fused_network_equals_itself(block, dtype):
    compare(_network(block, dtype=dtype), _image(dtype), ctkernels.fuse, "frozen")


def test_only_in_inference(shifts):
    """A convolution without a BatchNorm: its bias is the unit's shift in inference, and its own where a gradient flows."""
    model, x = _network("no norm", dtype=torch.bfloat16).requires_grad_(False), _image(torch.bfloat16)
    ctkernels.fuse(model)
    biases = [model.blocks[0].conv1.bias, model.blocks[0].conv2.bias]
    with torch.no_grad():
        model(x)
    assert shifts[1:] == biases  # the first is the stem's, with its BatchNorm
    shifts.clear()
    model(x.requires_grad_())
    assert len(shifts) == 3
    assert shifts[1:] == [None, None]


def test_compiled_programs():
    model, x = _network("basic").requires_grad_(False), _image()
    handle = ctkernels.fuse(model)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
