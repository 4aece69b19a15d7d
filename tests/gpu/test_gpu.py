"""On a GPU: the conformance suite on a real GPU. Everything else about the GPU kernels is proven without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conformance import check_against_float64, outputs, sample_named
from torch import Tensor

import ctkernels
from ctkernels.functional import ctu, hard_concrete, head_edit
from ctkernels.ops import backends
from ctkernels.ops.hard_concrete import reference
from ctkernels.ops.registration import OPS
from ctkernels.testing import samples

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device (torch.cuda.is_available() is False)", allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = [b.name for b in backends.BACKENDS.values() if b.device == "cuda" and b.missing is None]


@pytest.fixture(params=BACKENDS, autouse=True)
def gpu_backend(request):
    """Every backend for GPUs that is here, forced."""
    with ctkernels.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [s.name for s in samples()])
def test_against_float64(name, dtype):
    sample = sample_named(name, dtype)
    moved = sample.map(lambda _, t: t.cuda())
    moved.kwargs |= {k: v.cuda() for k, v in moved.kwargs.items() if isinstance(v, Tensor)}  # an index is one
    check_against_float64(sample, outputs(moved))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gates(dtype):
    log_alpha = 2 * torch.randn(3000, dtype=dtype)
    noise = torch.rand(3000, dtype=dtype).clamp(1e-6, 1 - 1e-6)
    for kwargs in ({"training": True, "noise": noise}, {"training": False}, {"training": False, "estimator": "mean"}):
        moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        leaf = log_alpha.cuda().requires_grad_()
        gates = hard_concrete(leaf, **moved)
        (found,) = torch.autograd.grad(gates.sum(), leaf)
        with ctkernels.use_backend("reference"):
            wide = log_alpha.double().requires_grad_()
            expected = hard_concrete(wide, **{k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()})
            (slope,) = torch.autograd.grad(expected.sum(), wide)
        torch.testing.assert_close(gates.cpu().double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.cpu().double(), slope, rtol=1e-5, atol=1e-5)


def test_gates_from_a_generator():
    log_alpha = torch.zeros(500, device="cuda")
    draws = [
        hard_concrete(log_alpha, training=True, generator=torch.Generator("cuda").manual_seed(seed))
        for seed in (5, 5, 6)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    seed = torch.tensor([77], device="cuda")
    noise = reference.uniform(seed.cpu(), log_alpha.shape, log_alpha.dtype)
    found = hard_concrete(log_alpha, training=True, noise=seed)
    torch.testing.assert_close(found.cpu(), hard_concrete(log_alpha.cuda(), training=True, noise=noise.cuda()).cpu())


def test_numbers_take_no_launch():
    x = torch.randn(1000, device="cuda")
    ctu(x, 0.9)  # compiled before
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        ctu(x, 0.8)
        torch.cuda.synchronize()
    launched = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1, launched
    torch.testing.assert_close(ctu(x, 0.8).cpu(), ctu(x.cpu(), 0.8), rtol=1e-5, atol=1e-6)


def test_every_replay_draws_other_gates():
    log_alpha = torch.zeros(500, device="cuda")
    hard_concrete(log_alpha, training=True)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gates = hard_concrete(log_alpha, training=True)
    graph.replay()
    first = gates.clone()
    graph.replay()
    assert not torch.equal(first, gates)


Call = Callable[[], list[Tensor]]  # a result and all gradients


def _call(function, *tensors):
    leaves = [t.requires_grad_() for t in tensors]

    def call():
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    return call


def _ctu_call(shape, channel_dim):
    knobs = [torch.linspace(0.1, 0.9, shape[channel_dim], device="cuda") for _ in range(2)]
    return _call(lambda *leaves: ctu(*leaves, channel_dim=channel_dim), torch.randn(shape, device="cuda"), *knobs)


def _head_edit_call(*shape):
    tensors = [torch.randn(s, device="cuda") for s in (shape, (32, 128), (32, 128), (32,), (32,))]
    return _call(lambda *leaves: head_edit(*leaves, head_axis=1 if len(shape) == 4 else None), *tensors)


CALLS: dict[str, Callable[[], Call]] = {
    "planes": lambda: _ctu_call((32, 64, 56, 56), 1),
    "channels inside": lambda: _ctu_call((8, 197, 768), 2),
    "one token": lambda: _ctu_call((1, 1, 3072), 2),
    "heads side by side": lambda: _head_edit_call(4, 300, 32 * 128),
    "tokens between heads": lambda: _head_edit_call(4, 32, 300, 128),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_on_every_run_stream_and_graph_replay(name):
    call = CALLS[name]()
    first = call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(first, second, captured):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("name", CALLS)
def test_the_host_never_waits(name):
    call = CALLS[name]()
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one():
    x, beta = torch.randn(300, 40, device="cuda:1"), torch.rand(40, device="cuda:1")
    with torch.cuda.device(0):
        y = ctu(x, beta, channel_dim=1)
    assert y.device == x.device
    with ctkernels.use_backend("reference"):
        expected = ctu(x, beta, channel_dim=1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 1 << 11])
def test_more_than_two_to_the_31_elements(channels):
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free device memory")
    rows = 2**31 // channels + 4096
    x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
    beta = torch.full((channels,), 0.9, device="cuda", requires_grad=True)
    y = ctu(x, beta, channel_dim=1)
    assert torch.equal(y[-2048:].detach(), ctu(x[-2048:].clone(), beta, channel_dim=1).detach())
    (grad,) = torch.autograd.grad(y, beta, torch.ones_like(y))
    pieces = sum(
        torch.autograd.grad(ctu(part, beta, channel_dim=1).sum(dtype=torch.float32), beta)[0] for part in x.chunk(8)
    )
    torch.testing.assert_close(grad, pieces, rtol=1e-4, atol=1e-2)


def test_compiled_code_calls_the_kernels():
    x, beta = torch.randn(64, 40, device="cuda"), torch.rand(40, device="cuda")
    torch._dynamo.reset()
    found = torch.compile(lambda x: ctu(x * 2, beta, channel_dim=1) + 1, fullgraph=True)(x)
    torch.testing.assert_close(found, ctu(x * 2, beta, channel_dim=1) + 1)


def test_explain_names_the_backend(gpu_backend):
    for op in OPS:
        assert f"{gpu_backend:<10} forced: used" in ctkernels.explain(torch.ones(2, device="cuda"), op)
