"""Conformance: every sample x backend x dtype against float64, autograd of every kind, and the same bits on every run."""

from __future__ import annotations

import pytest
import torch
from conformance import check_against_float64, outputs, sample_named
from torch import Tensor

from ctkernels.functional import ctu
from ctkernels.ops import backends
from ctkernels.testing import gradcheck, samples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = [s.name for s in samples()]
# Small enough for finite differences, and without memory that several elements share.
SMALL = [s.name for s in samples() if s.args[0].numel() <= 70 and 0 not in s.args[0].stride()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(backend, name, dtype):
    checked = sample_named(name, dtype)
    check_against_float64(checked, outputs(checked))


@pytest.mark.parametrize("name", SMALL)
def test_finite_differences(backend, name):
    sample = sample_named(name, torch.float64)
    if name == "the plain activation":
        pytest.skip("a kink has no second derivative; its gradient is tested against the plain activation's")
    gradcheck(sample)


def test_gradient_of_the_plain_activation(backend):
    x = torch.randn(4, 50, requires_grad=True)
    dy = torch.randn(4, 50)
    for activation, plain in (("relu", torch.relu), ("relu6", torch.nn.functional.relu6)):
        (ours,) = torch.autograd.grad(ctu(x, 1.0, activation=activation), x, dy)
        (theirs,) = torch.autograd.grad(plain(x), x, dy)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_every_run_and_thread_count(name):
    sample = sample_named(name)
    threads = torch.get_num_threads()
    first = outputs(sample)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = outputs(sample)
            for key in first:
                assert torch.equal(first[key], again[key]), key
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(backends.NATIVE is None, reason="torch's own sums, in the reference, depend on the thread count")
def test_same_bits_on_large_parallel_sums():
    for shape, channel_dim in (((8, 16, 60, 60), 1), ((700, 300), 1), ((300000,), None)):
        x, dy = torch.randn(shape), torch.randn(shape)
        count = 1 if channel_dim is None else shape[channel_dim]
        threads = torch.get_num_threads()
        results = []
        try:
            for n in (1, 2, 4):
                torch.set_num_threads(n)
                beta = torch.full((count,), 0.9, requires_grad=True)
                y = ctu(x, beta, 0.5, channel_dim=channel_dim)
                results.append((y.detach(), *torch.autograd.grad(y, beta, dy)))
        finally:
            torch.set_num_threads(threads)
        for y, g in results[1:]:
            assert torch.equal(y, results[0][0])
            assert torch.equal(g, results[0][1])


def test_only_what_is_needed_is_computed_and_saved(backend):
    x = torch.randn(3, 4, 5)
    beta = torch.full((4,), 0.9, requires_grad=True)
    coeff = torch.full((4,), 0.5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ctu(x, beta, coeff, channel_dim=1)
    big = [t for t in saved if t.numel() == x.numel()]
    assert len(big) == 1
    assert big[0].data_ptr() == x.data_ptr()
    y.sum().backward()
    assert beta.grad is not None
    assert coeff.grad is None
    assert not ctu(x, 0.9).requires_grad


def test_strides_are_kept(backend):
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ctu(x, 0.9)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.ones(2, 4, 6, 6))
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert ctu(x.detach().transpose(1, 3), 0.9).stride() == x.transpose(1, 3).stride()


def test_a_gradient_that_two_inputs_share_is_computed_once(backend):
    x, residual = torch.randn(2, 3, 40, requires_grad=True), torch.randn(2, 3, 40, requires_grad=True)
    dy = torch.randn(2, 3, 40)
    scale = torch.full((3,), 1.5)
    dx, dr = torch.autograd.grad(ctu(x, 0.8, residual=residual), (x, residual), dy)
    assert dx.data_ptr() == dr.data_ptr()
    dx, apart = torch.autograd.grad(ctu(x, 0.8, residual=residual, scale=scale, channel_dim=1), (x, residual), dy)
    torch.testing.assert_close(dx, 1.5 * apart)
    alone = [torch.autograd.grad(ctu(x, 0.8, residual=residual), t, dy)[0] for t in (x, residual)]
    assert all(torch.equal(dr, t) for t in alone)
    total = (ctu(x, 0.8, residual=residual) * dy).sum()
    total.backward()  # leaves keep gradients of their own
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    assert torch.equal(x.grad, residual.grad)


def test_inplace(backend):
    for x in (torch.randn(3, 8, 5), torch.randn(8, 3).T, torch.randn(4, 6, 8)[:, ::2]):
        expected = ctu(x, 0.8, residual=x)
        y = ctu(x, 0.8, residual=x.clone(), inplace=True)
        assert y.data_ptr() == x.data_ptr()
        assert torch.equal(x, expected)


@pytest.mark.parametrize(
    "transform",
    [
        "vmap",
        "grad",
        "jacrev",
        "jacfwd",
        "hessian",
        "jvp",
        "jvp of jvp",
        "jacfwd of jacfwd",
        "jacfwd of grad of a sum",
        "vmap of grad",
        "nested vmap",
    ],
)
def test_function_transforms(backend, transform):
    x = torch.randn(3, 4, dtype=torch.float64)
    beta = 0.1 + 0.8 * torch.rand(4, dtype=torch.float64)
    coeff = torch.rand(4, dtype=torch.float64)

    def f(x, beta):
        return ctu(x, beta, coeff, channel_dim=-1)

    def eager(x, beta):  # plain torch, differentiable by torch itself
        return truth_formula(x, beta, coeff)

    total = {g: (lambda x, b, g=g: g(x, b).square().sum()) for g in (f, eager)}
    tangents = (torch.randn_like(x), torch.randn_like(beta))
    table = {
        "vmap": lambda g: torch.func.vmap(g, (0, None))(x, beta),
        "grad": lambda g: torch.func.grad(total[g], (0, 1))(x, beta),
        "jacrev": lambda g: torch.func.jacrev(g, (0, 1))(x, beta),
        "jacfwd": lambda g: torch.func.jacfwd(g, (0, 1))(x, beta),
        "hessian": lambda g: torch.func.hessian(total[g], (0, 1))(x, beta),
        "jvp": lambda g: torch.func.jvp(g, (x, beta), tangents),
        "jvp of jvp": lambda g: torch.func.jvp(lambda *at: torch.func.jvp(g, at, tangents)[1], (x, beta), tangents),
        "jacfwd of jacfwd": lambda g: torch.func.jacfwd(torch.func.jacfwd(total[g], (0, 1)), (0, 1))(x, beta),
        "jacfwd of grad of a sum": lambda g: torch.func.jacfwd(
            torch.func.grad(lambda x, b: g(x, b).sum(), (0, 1)), (0, 1)
        )(x, beta),
        "vmap of grad": lambda g: torch.func.vmap(torch.func.grad(total[g], (0, 1)), (0, None))(x, beta),
        "nested vmap": lambda g: torch.func.vmap(
            lambda b: torch.func.vmap(torch.func.grad(total[g], (0, 1)), (0, None))(x, b)
        )(torch.stack([beta, beta.flip(0)])),
    }
    ours, theirs = table[transform](f), table[transform](eager)
    flat_ours, flat_theirs = torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs)
    assert len(flat_ours) == len(flat_theirs)
    for a, b in zip(flat_ours, flat_theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def truth_formula(x, beta, coeff):
    s = 1 - beta
    return coeff * x * torch.sigmoid(beta * x / s) + (1 - coeff) * s * torch.nn.functional.softplus(
        x / s, threshold=1e9
    )


def test_more_than_two_to_the_31_elements_by_construction():
    """Offsets are 64 bits wide: a view that spans more than 2^31 elements of address space works."""
    base = torch.empty(1).expand(2**31 + 64)
    with pytest.raises(ValueError, match="overlap"):
        ctu(base, 0.9, inplace=True)
    meta = torch.empty(2**31 + 64, device="meta")
    assert ctu(meta, 0.9).shape == meta.shape
