"""Devices without float64, of which there is none here: the CPU refuses it as they would."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ctkernels
from ctkernels.functional import attention_head_edit, ctu, expected_l0, hard_concrete, head_edit
from ctkernels.ops import backends


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves((args, out))):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return out


def test_what_numbers_become(monkeypatch):
    assert backends.scalar_dtype(torch.device("mps")) == torch.float32
    assert backends.scalar_dtype(torch.device("cpu")) == backends.scalar_dtype(torch.device("cuda")) == torch.float64
    for has in (True, False):
        properties = SimpleNamespace(has_fp64=has)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, p=properties: p)
        assert backends.scalar_dtype(torch.device("xpu")) == (torch.float64 if has else torch.float32)


@pytest.fixture
def no_float64(monkeypatch):
    known = backends.scalar_dtype
    monkeypatch.setattr(backends, "scalar_dtype", lambda device: known(torch.device("mps")))
    with ctkernels.use_backend("reference"), WithoutFloat64():
        yield


@pytest.mark.parametrize("activation", ["relu", "prelu", "relu6", "gelu", "gelu_tanh"])
def test_the_unit(no_float64, activation):
    with pytest.raises(TypeError, match="MPS"):
        torch.randn(3).double()
    x, knob = torch.randn(3, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    for beta in (0.5, knob):
        y = ctu(x, beta, activation=activation, channel_dim=1, scale=knob, shift=knob, residual=x)
        grads = torch.autograd.grad(y.sum(), (x, knob))
        assert {t.dtype for t in (y, *grads)} == {torch.float32}
    z = x.detach().clone()
    expected = ctu(z, 0.5, activation=activation)
    assert torch.equal(ctu(z, 0.5, activation=activation, inplace=True), expected)


def test_the_other_ops(no_float64):
    x, edit = torch.randn(3, 4, requires_grad=True), torch.randn(2, 2)
    q = torch.randn(1, 2, 3, 2)
    results = [
        head_edit(x, edit),
        hard_concrete(x, training=True),
        hard_concrete(x, training=False),
        hard_concrete(x, training=False, estimator="mean"),
        expected_l0(x),
    ]
    for y in results:
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert y.dtype == grad.dtype == torch.float32
    assert attention_head_edit(q, q, q, edit).dtype == torch.float32
