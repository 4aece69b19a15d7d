"""The op under torch.library's checks, torch.compile, torch.export, autocast and checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import ctkernels
from ctkernels.functional import ctu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _arguments(full, dtype=torch.float32):
    x = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    knobs = [torch.rand(4).mul(0.9).requires_grad_() for _ in range(2)]
    extra = [torch.rand(4, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)]
    residual = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    rest = (*extra, residual) if full else (None, None, None, None)
    return (x, *knobs, *rest, 1, 1 if full else 0, False, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, dtype):
    results = opcheck(torch.ops.ctkernels.ctu.default, _arguments(full, dtype))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("full", [False, True])
def test_opcheck_backward(full):
    arguments = _arguments(full)
    needs = 0b1111111 if full else 0b111
    results = opcheck(torch.ops.ctkernels.ctu_backward.default, (torch.randn(2, 4, 6), *arguments, needs))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_inplace():
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in _arguments(True)]
    assert set(opcheck(torch.ops.ctkernels.ctu_.default, tuple(arguments)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("view", ["contiguous", "channels last", "transposed", "sliced"])
def test_fake_strides(view):
    x = torch.randn(2, 4, 6, 6)
    x = {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "sliced": x[:, :, 1:5],
    }[view]
    beta = torch.rand(x.shape[1])
    results = opcheck(torch.ops.ctkernels.ctu.default, (x, beta, beta, None, None, None, None, 1, 0, False, 0.0))
    assert set(results.values()) == {"SUCCESS"}


def _loss(x, beta, coeff):
    y = ctu(x * 2, beta, coeff, channel_dim=1, activation="relu")
    return (y + x).square().sum()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("forced", [None, "reference"])
def test_compile_fullgraph(forced, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        x = torch.randn(rows, 4, 7, requires_grad=True)
        beta, coeff = (torch.rand(4, requires_grad=True) for _ in range(2))
        inputs = (x, beta, coeff)
        expected = _loss(*inputs)
        wanted = torch.autograd.grad(expected, inputs)
        if forced:
            with ctkernels.use_backend(forced):
                found = compiled(*inputs)
                grads = torch.autograd.grad(found, inputs)
        else:
            found = compiled(*inputs)
            grads = torch.autograd.grad(found, inputs)
        torch.testing.assert_close(found, expected)
        for a, b in zip(grads, wanted):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_compile_does_not_specialise_on_a_knob_tensor():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, beta: ctu(x, beta), fullgraph=True, backend=counter)
    x = torch.randn(10)
    for value in (0.7, 0.8, 0.9):
        assert torch.equal(compiled(x, torch.tensor(value)), ctu(x, torch.tensor(value)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.beta = torch.nn.Parameter(torch.full((4,), 0.8))

        def forward(self, x):
            return ctu(x, self.beta, 0.5, channel_dim=1)

    net, x = Net(), torch.randn(3, 4, 5)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    assert "ctkernels.ctu" in program.graph_module.code
    for rows in (3, 6):
        x = torch.randn(rows, 4, 5)
        torch.testing.assert_close(program.module()(x), net(x))


def test_autocast_keeps_float32_knobs():
    net = torch.nn.Conv2d(3, 4, 3)
    beta = torch.full((4,), 0.999, requires_grad=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = net(x)
        assert w.dtype == torch.bfloat16
        y = ctu(w, beta, channel_dim=1)
        mixed = ctu(w, beta, channel_dim=1, residual=torch.randn(w.shape))
    assert y.dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    y.float().sum().backward()
    assert beta.grad is not None
    assert beta.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    x = torch.randn(3, 4, requires_grad=True)
    beta = torch.rand(4, requires_grad=True)

    def f(x):
        return ctu(torch.sin(x), beta, channel_dim=1).square()

    plain = torch.autograd.grad(f(x).sum(), (x, beta))
    beta.grad = x.grad = None
    checkpoint(f, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(beta.grad, plain[1])
