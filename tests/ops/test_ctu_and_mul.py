"""The gated product beyond its samples: one pass, what it keeps, extremes, and its packed form."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ctkernels
from ctkernels.functional import ctu, ctu_and_mul

MEMBERS = ("relu", "leaky_relu", "prelu", "relu6", "silu", "gelu")


@pytest.mark.parametrize("activation", MEMBERS)
def test_is_the_unit_times_up(backend, activation):
    gate, up = (torch.randn(3, 7, 40, dtype=torch.float64) for _ in range(2))
    beta, coeff = torch.rand(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    for knobs, options in (((beta, coeff), {"channel_dim": -1}), ((0.7, 0.3), {}), ((2.0, -1.0), {"raw": True})):
        expected = ctu(gate, *knobs, activation=activation, **options) * up
        found = ctu_and_mul(gate, up, *knobs, activation=activation, **options)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_swiglu_geglu_and_reglu_at_their_neutral_points(backend):
    gate, up = torch.randn(5, 33), torch.randn(5, 33)
    torch.testing.assert_close(ctu_and_mul(gate, up, 0.5, 1.0), F.silu(gate) * up, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ctu_and_mul(gate, up, 0.5, 1.0, activation="gelu"), F.gelu(gate) * up, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(ctu_and_mul(gate, up, 1.0, activation="relu"), torch.relu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [2, 5, 16, 33, 300])
def test_packed_has_the_bits_of_its_halves(backend, channels, dtype):
    """By the element, of knobs per channel: the order of sums, and the arithmetic with common knobs, depend on the layout."""
    packed = torch.randn(9, 4, 2 * channels).to(dtype).requires_grad_()
    halves = [t.detach().contiguous().requires_grad_() for t in packed.chunk(2, -1)]
    dy = torch.randn(9, 4, channels).to(dtype)
    knobs = [torch.rand(channels).requires_grad_() for _ in range(2)]
    one, two = ctu_and_mul(packed, None, *knobs), ctu_and_mul(*halves, *knobs, channel_dim=-1)
    assert torch.equal(one, two)
    assert one.is_contiguous()
    d_packed, *d_knobs = torch.autograd.grad(one, (packed, *knobs), dy)
    d_gate, d_up, *expected = torch.autograd.grad(two, (*halves, *knobs), dy)
    assert torch.equal(d_packed, torch.cat([d_gate, d_up], -1))
    torch.testing.assert_close(d_knobs, expected)
    torch.testing.assert_close(ctu_and_mul(packed, None, 0.4, 0.9), ctu_and_mul(*halves, 0.4, 0.9))


def test_gate_and_up_are_all_that_is_kept(backend):
    gate, up = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    packed = torch.randn(64, 64, requires_grad=True)
    for inputs in ((gate, up), (packed, None)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
            ctu_and_mul(*inputs, torch.rand(32, requires_grad=True), 0.5, channel_dim=1)
        large = [t for t in saved if t.numel() > 32]
        assert len({t.data_ptr() for t in large}) == len(large)
        assert {t.data_ptr() for t in large} == {t.data_ptr() for t in inputs if t is not None}


def test_infinities_and_nan(backend):
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-40])
    gate, up = (torch.tensor(t) for t in zip(*itertools.product(values.tolist(), values.tolist())))
    for knobs in ((0.7, 0.4), (1.0, 0.5), (0.5, 1.0), (0.0, 0.0)):
        for dtype in (torch.float64, torch.float32):
            torch.testing.assert_close(
                ctu_and_mul(gate.to(dtype), up.to(dtype), *knobs, activation="relu"),
                ctu(gate.to(dtype), *knobs, activation="relu") * up.to(dtype),
                equal_nan=True,
            )
    poisoned = torch.rand(4)
    poisoned[2] = float("nan")
    y = ctu_and_mul(torch.randn(6, 8), None, poisoned, 0.5)
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
def test_function_transforms(backend, packed):
    gate, up = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    beta, coeff = 0.1 + 0.8 * torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)

    def plain(gate, up, beta):
        s = 1 - beta
        soft = s * F.softplus(gate / s, threshold=1e9)
        return (coeff * gate * torch.sigmoid(beta * gate / s) + (1 - coeff) * soft) * up

    def ours(gate, up, beta):
        both = (torch.cat([gate, up], -1), None) if packed else (gate, up)
        return ctu_and_mul(*both, beta, coeff, channel_dim=-1)

    inputs = (gate, up, beta)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    transforms = {
        "vmap": lambda f: torch.func.vmap(f, (0, 0, None))(*inputs),
        "vmap of knobs": lambda f: torch.func.vmap(f, (None, None, 0))(gate, up, torch.stack([beta, beta.flip(0)])),
        "jacrev": lambda f: torch.func.jacrev(f, (0, 1, 2))(*inputs),
        "jacfwd": lambda f: torch.func.jacfwd(f, (0, 1, 2))(*inputs),
        "jvp": lambda f: torch.func.jvp(f, inputs, tangents),
        "hessian": lambda f: torch.func.hessian(lambda *t: f(*t).square().sum(), (0, 1, 2))(*inputs),
        "per-sample gradients": lambda f: torch.func.vmap(
            torch.func.grad(lambda *t: f(*t).square().sum(), (0, 1, 2)), (0, 0, None)
        )(*inputs),
    }
    for name, transform in transforms.items():
        found, expected = (torch.utils._pytree.tree_leaves(transform(f)) for f in (ours, plain))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    gate = torch.randn(3, 8 if packed else 4, requires_grad=True)
    up = None if packed else torch.randn(3, 4, requires_grad=True)
    beta, coeff = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    torch.library.opcheck(torch.ops.ctkernels.ctu_and_mul.default, (gate, beta, coeff, None, up, 1, 0, False, 0.0))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled(packed):
    torch._dynamo.reset()
    gate, beta = torch.randn(6, 32, requires_grad=True), torch.rand(16 if packed else 32, requires_grad=True)
    up = None if packed else torch.randn(6, 32, requires_grad=True)

    def step(gate, up, beta):
        return ctu_and_mul(gate * 2, up, beta, 0.5, channel_dim=-1).sin()

    leaves = [t for t in (gate, up, beta) if t is not None]
    for name in (None, "reference"):
        with ctkernels.use_backend(name) if name else torch.enable_grad():
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            found, expected = (torch.autograd.grad(f(gate, up, beta).sum(), leaves) for f in (compiled, step))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)


def test_errors():
    gate, up = torch.randn(2, 6), torch.randn(2, 6)
    cases = {
        "gate must be a tensor": ((1.0, up, 0.5), {}),
        "up must be a tensor": ((gate, 2.0, 0.5), {}),
        r"up must have gate's shape \(2, 6\), got \(2, 3\)": ((gate, up[:, :3], 0.5), {}),
        "up must be float32, float64, bfloat16 or float16, got int64": ((gate, up.long(), 0.5), {}),
        r"even size; gate.shape\[1\] is 5": ((gate[:, :5], None, 0.5), {}),
        "inplace=True needs up": ((gate, None, 0.5), {"inplace": True}),
        "activation must be one of": ((gate, up, 0.5), {"activation": "tanh"}),
        "beta must be between 0 and 1, got 1.5": ((gate, up, 1.5), {}),
        "channel_dim is needed": ((gate, up, torch.rand(6)), {}),
        "must have 1 value or": ((gate, None, torch.rand(6)), {}),
        "up must have gate's dtype": ((gate, up.double(), 0.5), {"inplace": True}),
        "channel_dim must not be 0": ((gate, up, torch.rand(2, 2)), {"index": torch.tensor([0, 1]), "channel_dim": 0}),
    }
    for message, (args, kwargs) in cases.items():
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            ctu_and_mul(*args, **kwargs)
        assert str(caught.value).startswith("ctu_and_mul: "), message
    with pytest.raises(RuntimeError, match="overwrite gate"):
        ctu_and_mul(gate.clone().requires_grad_(), up, 0.5, inplace=True)
    buffer = torch.randn(20)
    with pytest.raises(ValueError, match="up must not share memory with gate"):
        ctu_and_mul(buffer[:10], buffer[5:15], 0.5, inplace=True)
