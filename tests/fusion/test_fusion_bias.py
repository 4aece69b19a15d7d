"""Fusion on a GPU: the unit adds the bias of the convolution before it. Here on the CPU, with the choice forced."""

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


@pytest.mark.parametrize("mode", ["frozen", "eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_fused_network_equals_itself(block, dtype, mode):
    compare(_network(block, dtype=dtype), _image(dtype), ctkernels.fuse, mode)


@pytest.mark.parametrize("situation", ["inference", "input", "knobs", "weights"])
def test_the_bias_is_the_shift_of_the_unit(situation, shifts):
    """In inference, and when gradients flow: to the input, to learned knobs, to the weights and the bias itself."""
    model = prepare(Residual(["no norm"])).eval().bfloat16().requires_grad_(False)
    model.stem[2], model.blocks[0].relu = (
        ctkernels.nn.TrainableCTU(4).requires_grad_(situation == "knobs") for _ in "12"
    )
    ctkernels.fuse(model)
    biases = [model.blocks[0].conv1.bias, model.blocks[0].conv2.bias]
    model.blocks[0].conv2.requires_grad_(situation == "weights")
    with torch.set_grad_enabled(situation != "inference"):
        y = model(_image(torch.bfloat16).requires_grad_(situation == "input"))
    assert [id(shift) for shift in shifts[1:]] == [
        id(bias) for bias in biases
    ]  # the first is the stem's, with its BatchNorm
    assert y.requires_grad == (situation != "inference")


def test_a_frozen_convolution_keeps_no_input(monkeypatch):
    model = _network("no norm").requires_grad_(False)
    ctkernels.fuse(model)
    calls, frozen_conv = [], site.frozen.frozen_conv
    monkeypatch.setattr(site.frozen, "frozen_conv", lambda *args: (calls.append(args), frozen_conv(*args))[1])
    model(_image().requires_grad_())
    assert [(args[1] is layer.weight, args[2]) for args, layer in zip(
        calls, (model.stem[0], model.blocks[0].conv1, model.blocks[0].conv2), strict=True
    )] == [(True, None)] * 3  # fmt: skip


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
