"""The reference by itself: as a graph on another runtime, where operations are made of simpler ones, and its derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import ctkernels
from ctkernels.functional import ctu, head_edit

aten = torch.ops.aten
# What a runtime without the function computes in its place.
NAIVE = {
    aten.log1p.default: lambda x: torch.log(1 + x),
    aten.expm1.default: lambda x: torch.exp(x) - 1,
    aten.logaddexp.default: lambda x, y: torch.log(torch.exp(x) + torch.exp(y)),
    aten.softplus.default: lambda x, beta=1, threshold=20: torch.log(1 + torch.exp(beta * x)) / beta,
    aten.erfc.default: lambda x: 1 - torch.erf(x),
    aten.special_erfc.default: lambda x: 1 - torch.erf(x),
}


class Runtime(torch.fx.Interpreter):
    """Runs a graph; of finite inputs, every intermediate result has to be finite."""

    def call_function(self, target, args, kwargs):
        result = NAIVE.get(target, target)(*args, **kwargs)
        for t in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(t, Tensor) and t.is_floating_point():
                assert torch.isfinite(t).all(), f"{target} of {args}: {t}"
        return result


class Unit(nn.Module):
    def __init__(self, beta, activation, raw):
        super().__init__()
        self.beta, self.activation, self.raw = nn.Parameter(beta), activation, raw

    def forward(self, x):
        given = {"activation": self.activation, "raw": self.raw, "negative_slope": 0.1}
        return ctu(x, self.beta, 0.5, channel_dim=1, **given)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "gelu", "gelu_tanh"])
def test_a_graph_overflows_nowhere(activation, raw):
    beta = torch.tensor([0.0, 0.5, 0.9, 0.999, 1 - 1e-6, 1.0])
    if raw:
        beta = torch.logit(beta.double()).clamp(-40, 40).float()
    magnitudes = torch.cat([torch.logspace(-8, 4, 300), torch.tensor([0.0, 5.0, 6.0, 8.0, 9.0, 10.0, 20.0])])
    x = torch.cat([magnitudes, -magnitudes]).unsqueeze(1).expand(-1, len(beta)).contiguous()
    unit = Unit(beta, activation, raw)
    with ctkernels.use_backend("reference"):
        program = torch.export.export(unit, (x,))
        expected = unit(x)
    assert not any("ctkernels" in str(node.target) for node in program.graph.nodes)
    for graph in (program, program.run_decompositions()):
        (y,) = [Runtime(graph.module()).run(x)]
        eps = torch.finfo(torch.float32).eps  # 1 + exp(-a) and 1 - erf(a) are good to that, times |x| or s
        assert ((y - expected).abs() <= 4 * eps * (1 + x.abs())).all()


@pytest.mark.parametrize("activation", ["relu", "prelu", "relu6", "silu", "gelu", "gelu_tanh"])
def test_derivatives_of_any_order_at_the_joints(activation):
    """At 0 and 6, where its pieces meet, the unit is as smooth as anywhere: third derivatives are the limits of those nearby."""
    knobs = [torch.tensor(v, dtype=torch.float64) for v in (0.6, 0.3)]

    def unit(x, beta, coeff):
        return ctu(x, beta, coeff, activation=activation, negative_slope=0.25)

    def derivatives(x):
        at = (torch.tensor(x, dtype=torch.float64), *knobs)
        order = unit
        found = [order(*at)]
        for _ in range(3):
            order = torch.func.grad(order)
            found.append(order(*at))
        second = torch.func.grad(torch.func.grad(unit))
        return [
            *found,
            *torch.func.grad(second, (1, 2))(*at),
            *torch.func.jacfwd(torch.func.jacfwd(unit, 0), (0, 1, 2))(*at),
        ]

    for joint in (0.0, 6.0):
        step = 1e-5
        for here, left, right in zip(*(derivatives(joint + d) for d in (0.0, -step, step))):
            assert abs(left - right) < 1e-3  # they meet there
            assert abs(here - (left + right) / 2) <= 1e-8


@pytest.mark.parametrize("activation", ["relu", "prelu", "relu6", "silu", "gelu", "gelu_tanh"])
def test_derivatives_at_infinity_are_those_of_the_plain_activation(activation):
    x = torch.tensor([float("inf"), -float("inf"), 1.0], dtype=torch.float64, requires_grad=True)
    beta, coeff = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.9, 0.3))
    with ctkernels.use_backend("reference"):
        y = ctu(x, beta, coeff, activation=activation, negative_slope=0.25)
        grads = torch.autograd.grad(y, (x, beta, coeff), torch.ones_like(y), create_graph=True)
        assert grads[0][:2].tolist() == [0.0 if activation == "relu6" else 1.0, 0.25 if activation == "prelu" else 0.0]
        assert all(g.isfinite().all() for g in grads)
        for g in grads:
            seconds = torch.autograd.grad(g.sum(), (x, beta, coeff), retain_graph=True)
            assert (seconds[0][:2] == 0).all()
            assert all(s.isfinite().all() for s in seconds)


def test_logits_narrower_than_x(backend):
    """Knobs come from float32 logits in float64 where x is float64: 1 - beta is the float64 of those logits."""
    x = torch.linspace(-3, 3, 999, dtype=torch.float64)
    for logit, activation in itertools.product((-17.0, 0.3, 5.0), ("relu", "gelu", "gelu_tanh")):
        narrow = torch.tensor(logit)
        expected = ctu(x, narrow.double(), torch.tensor(0.2).double(), raw=True, activation=activation)
        assert torch.equal(ctu(x, narrow, torch.tensor(0.2), raw=True, activation=activation), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])
def test_a_nan_in_an_edit_is_in_its_channels(backend, dtype, bits):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    z = torch.randn(5, 2 * 3).to(dtype).requires_grad_()
    names = ("m", "a", "g_m", "g_a")
    for hurt in names:
        edits = {n: torch.rand(2, 3) if n in ("m", "a") else torch.rand(2) for n in names}
        edits[hurt][0] = nan
        edits = {n: t.requires_grad_() for n, t in edits.items()}
        y = head_edit(z, **edits)
        grads = dict(zip(("z", *names), torch.autograd.grad(y, (z, *edits.values()), torch.ones_like(y))))
        assert y[:, :3].isnan().all()
        assert y[:, 3:].isfinite().all()
        assert grads["z"][:, :3].isnan().all() == (hurt in ("m", "g_m"))
        assert grads["z"][:, 3:].isfinite().all()
        for name in names:  # the other factor of a product with the one that is hurt
            other = {"m": "g_m", "g_m": "m", "a": "g_a", "g_a": "a"}[hurt]
            assert grads[name][0].isnan().all() == (name == other), (hurt, name)
            assert grads[name][1].isfinite().all()
