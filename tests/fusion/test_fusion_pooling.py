"""Fusion: max pooling in compiled training steps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fused_models import prepare
from torch import nn

import ctkernels

SIZES = {
    "3 by 2": ([3, 3], [2, 2], [1, 1], [1, 1], False),
    "uneven": ([2, 3], [1, 2], [0, 1], [1, 1], False),
    "rounded up": ([3, 3], [2, 2], [0, 0], [1, 1], True),
    "dilated": ([2, 2], [2, 2], [0, 0], [2, 2], False),
}


def network(pooling):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), pooling, nn.Conv2d(4, 2, 2), nn.ReLU()
    model = prepare(nn.Sequential(*layers), 0).eval().requires_grad_(False)
    ctkernels.steer(model, 0.8)
    return model


def with_gradient(call, x):
    x = x.detach().requires_grad_()
    y = call(x)
    return y, *torch.autograd.grad(y.double().square().sum(), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_max_pool2d(sizes, layout):
    kernel, stride, padding, dilation, ceil_mode = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randperm(2 * 3 * 9 * 8, generator=generator).view(2, 3, 9, 8).contiguous(memory_format=layout)

    def ours(v):
        return torch.ops.ctkernels.max_pool2d(v, *sizes)[0]

    def theirs(v):
        return F.max_pool2d(v, kernel, stride, padding, dilation, ceil_mode)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for a, b in zip(with_gradient(ours, x.to(dtype)), with_gradient(theirs, x.to(dtype))):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(ours, x, eps=1e-3, fast_mode=True)  # values lie one apart
    assert torch.autograd.gradgradcheck(ours, x, eps=1e-3, fast_mode=True)
    torch.library.opcheck(torch.ops.ctkernels.max_pool2d.default, (x, *sizes))
    y, indices = torch.ops.ctkernels.max_pool2d(x, *sizes)
    dy = torch.randn_like(y, requires_grad=True)
    last = layout == torch.channels_last
    torch.library.opcheck(torch.ops.ctkernels.max_pool2d_backward.default, (dy, indices, list(x.shape), last, *sizes))


def targets(model, x):
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=backend)(x)
    return [target for target in seen if "max_pool2d" in target]


def test_the_compiler_sees_an_op_where_a_gradient_flows_through():
    model, x = network(nn.MaxPool2d(2)), torch.randn(2, 3, 9, 8)
    ctkernels.fuse(model)
    assert all("ctkernels" in target for target in targets(model, x.requires_grad_()))
    assert targets(model, x)
    with torch.no_grad():
        assert not any("ctkernels" in target for target in targets(model, x))
    program = torch.export.export(model, (x,))
    assert not any("ctkernels.max_pool2d" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("pooling", [nn.MaxPool2d(2), nn.MaxPool2d((3, 2), 2, (1, 0), ceil_mode=True)])
def test_compiled_networks_agree(pooling):
    model, x = network(pooling), torch.randn(2, 3, 9, 8)
    plain = with_gradient(model, x)
    with ctkernels.fuse(model):
        torch._dynamo.reset()
        for ours, theirs in zip(with_gradient(torch.compile(model, fullgraph=True), x), plain):
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert vars(twin[3])["forward"].module is twin[3]
            assert torch.equal(twin(x), model(x))
    assert "forward" not in vars(model[3])


def test_pooling_of_the_users_own_is_left_alone():
    class Pool(nn.MaxPool2d):
        def forward(self, x):
            return super().forward(x) + 1

    model, x = network(Pool(2)), torch.randn(2, 3, 9, 8, requires_grad=True)
    before = model(x)
    ctkernels.fuse(model)
    assert "forward" not in vars(model[3])
    torch.testing.assert_close(model(x), before)
    assert not any("ctkernels" in target for target in targets(model, x))
