"""Fusion: contiguous images run in channels last inside, where nothing but values depends on it."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_models import prepare
from torch import nn
from torch.overrides import TorchFunctionMode

import ctkernels
from ctkernels.fusion import memory_format


class Convolutions(TorchFunctionMode):
    """Whether each convolution met its images in channels last, and the strides that it made."""

    def __init__(self):
        super().__init__()
        self.last = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            self.last.append(not args[0].is_contiguous())
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm2(self.second(self.relu(self.norm1(self.first(x)))))
        return self.relu(y + x)


class Network(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.body = nn.Sequential(*(Block() for _ in range(blocks)))

    def forward(self, x):
        return self.body(self.pool(self.relu(self.norm(self.stem(x)))))


class Head(Network):
    def __init__(self):
        super().__init__()
        self.average, self.line = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 5)

    def forward(self, x):
        return self.line(torch.flatten(self.average(super().forward(x)), 1))


class Pooled(Network):
    def __init__(self):
        super().__init__()
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.average(super().forward(x))


class FlattensAndReadsAgain(Network):
    def forward(self, x):
        y = super().forward(x)
        flat = torch.flatten(y, 1)
        flat += 1
        return y


class Viewing(Network):
    def forward(self, x):
        y = super().forward(x)
        return y.view(y.shape[0], -1)


class WritesOverItsInput(Network):
    def forward(self, x):
        return super().forward(self.relu(x))


class ReturnsItsInput(Network):
    def forward(self, x):
        return super().forward(x), x


class Strange(nn.Module):
    def forward(self, x):
        return x if x.is_contiguous() else x * 2


class WithStrange(Network):
    def __init__(self):
        super().__init__()
        self.body.append(Strange())


@pytest.fixture(autouse=True)
def every_image_is_large(monkeypatch):
    monkeypatch.setattr(memory_format, "LEAST_PIXELS", 1)


def fused(network):
    torch.manual_seed(0)
    plain = prepare(network(), 0).eval()
    ctkernels.steer(plain, 0.9)
    model = copy.deepcopy(plain)
    return plain, model, ctkernels.fuse(model)


def call(model, x):
    with torch.no_grad(), Convolutions() as seen:
        return model(x), seen.last


def outputs(y):
    return list(y) if isinstance(y, tuple) else [y]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", [Network, Head, Pooled])
def test_the_inside_is_channels_last_and_results_are_as_without_fusion(network, dtype):
    plain, model, handle = (v.to(dtype) if isinstance(v, nn.Module) else v for v in fused(network))
    x = torch.randn(2, 3, 33, 33).to(dtype)
    before = x.clone()
    expected, (y, last) = plain.float()(x.float()), call(model, x)
    assert all(last)
    assert len(last) == 9
    with torch.no_grad():
        theirs = plain.to(dtype)(x)
        assert "channels last" in handle.explain(x)
    error, allowed = (y - expected).abs().max(), 2 * (theirs - expected).abs().max()
    assert error <= allowed + 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert y.stride() == theirs.stride()
    assert y.dtype == dtype
    assert torch.equal(x, before)
    assert x.is_contiguous()


@pytest.mark.parametrize("network", [Viewing, FlattensAndReadsAgain, WritesOverItsInput, ReturnsItsInput, WithStrange])
def test_code_to_which_the_format_matters_keeps_it(network):
    plain, model, handle = fused(network)
    x, same = torch.randn(2, 3, 33, 33), None
    same = x.clone()
    y, last = call(model, x)
    with torch.no_grad():
        expected = plain(same)
        assert "the format of its arguments" in handle.explain(x)
    assert not any(last)
    for a, b in zip(outputs(y), outputs(expected), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()
    assert torch.equal(x, same)


def test_a_hook_meets_what_it_would_meet_without_fusion():
    _, model, handle = fused(Network)
    seen = []
    model.body[1].register_forward_hook(lambda module, args, y: seen.append(y.is_contiguous()))
    x = torch.randn(2, 3, 33, 33)
    _, last = call(model, x)
    assert seen == [True]
    assert not any(last)
    with torch.no_grad():
        assert "a Block has hooks" in handle.explain(x)


def test_a_hook_inside_of_a_site():
    _, model, _ = fused(Network)
    seen = []
    model.body[1].first.register_forward_hook(lambda module, args, y: seen.append(y.is_contiguous()))
    _, last = call(model, torch.randn(2, 3, 33, 33))
    assert seen == [True]
    assert not any(last)


def test_a_module_that_is_replaced_is_seen():
    _, model, _ = fused(Network)
    model.body[2] = Strange()
    _, last = call(model, torch.randn(2, 3, 33, 33))
    assert not any(last)


def test_few_sites_small_images_gradients_and_channels_last(monkeypatch):
    x = torch.randn(2, 3, 33, 33)
    _, small, handle = fused(lambda: Network(1))
    assert not any(call(small, x)[1])
    with torch.no_grad():
        assert "too few" in handle.explain(x)
    _, model, handle = fused(Network)
    assert "gradients" in handle.explain(x)
    with Convolutions() as seen:
        model(x.requires_grad_())
    assert not any(seen.last)
    x = x.detach()
    y, _ = call(model, x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()
    monkeypatch.setattr(memory_format, "LEAST_PIXELS", 1 << 20)
    assert not any(call(model, x)[1])
    with torch.no_grad():
        assert "2178 pixels" in handle.explain(x)
    handle.remove()
    assert "not fused" in handle.explain(x)


def test_compiled_and_traced_calls_keep_the_format():
    _, model, _ = fused(Network)
    x = torch.randn(2, 3, 33, 33)
    formats = []

    def backend(graph, inputs):
        formats.extend(node.kwargs.get("memory_format") for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        assert torch.channels_last not in formats
        traced = torch.jit.trace(model, x, check_trace=False)
        assert "aten::contiguous" not in str(traced.inlined_graph)


def test_a_copy_of_a_fused_model_runs_so_too():
    _, model, _ = fused(Network)
    copied = copy.deepcopy(model)
    x = torch.randn(2, 3, 33, 33)
    call(copied, x)  # is read anew
    y, last = call(copied, x)
    assert all(last)
    assert torch.equal(y, call(model, x)[0])
