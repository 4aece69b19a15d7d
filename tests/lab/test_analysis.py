"""Curvature and slope against known answers: quadratic and linear functions, autograd's own Hessians, steered networks."""

import math

import pytest
import torch
from torch import nn

import ctkernels
from ctkernels.lab.analysis.curvature import (
    CurvatureProfile,
    curvature,
    curvature_profile,
    data_directions,
    hessian_vector,
    lipschitz,
    random_directions,
    scalar_of,
)


def quadratic(seed=0, d=6):
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a + a.T


def test_a_quadratic_has_its_matrix_as_hessian():
    a = quadratic()
    x = torch.randn(5, 6, dtype=torch.float64)
    v = torch.randn(5, 6, dtype=torch.float64)

    def function(x):
        return 0.5 * torch.einsum("ni,ij,nj->n", x, a, x) + x.sum(1)

    torch.testing.assert_close(hessian_vector(function, x, v), v @ a)
    directions = torch.stack([v, 3 * v])
    rayleigh = torch.einsum("ni,ij,nj->n", v, a, v) / (v * v).sum(1)
    torch.testing.assert_close(curvature(function, x, directions), torch.stack([rayleigh, rayleigh]))


def net(activation=nn.ReLU, inplace=False):
    torch.manual_seed(0)
    acts = [activation(inplace=inplace) if activation is nn.ReLU else activation() for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), acts[0], nn.Conv2d(4, 5, 3), acts[1], nn.Flatten(), nn.Linear(20, 3)
    ).eval()


@pytest.mark.parametrize("inplace", [False, True])
def test_through_the_unit_it_is_autograds_hessian(backend, inplace):
    model = net(inplace=inplace).double()
    x, labels = torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    v = random_directions(x, 1)[0]
    with ctkernels.steer(model, 0.6, 0.3):
        function = scalar_of(model, "margin", labels)
        found = hessian_vector(function, x, v)
        slope = lipschitz(model, x, iterations=500)
        for i in range(3):
            one = scalar_of(model, "margin", labels[i : i + 1])
            hessian = torch.autograd.functional.hessian(lambda z, one=one: one(z).sum(), x[i : i + 1]).reshape(72, 72)
            torch.testing.assert_close(found[i].flatten(), hessian @ v[i].flatten())
            jacobian = torch.autograd.functional.jacobian(model, x[i : i + 1]).reshape(3, 72)
            # the iteration ends once an estimate grows by less than 1e-4; it is never above the norm
            exact = torch.linalg.matrix_norm(jacobian, 2)
            assert exact * (1 - 1e-3) <= slope[i] <= exact * (1 + 1e-12)


def test_linear_networks_are_flat_and_as_steep_as_their_matrix():
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5).double(), nn.Linear(5, 4).double()
    model = nn.Sequential(first, second)
    x = torch.randn(4, 6, dtype=torch.float64)
    bends = curvature(scalar_of(model, "logit", torch.zeros(4, dtype=torch.int64)), x, random_directions(x, 3))
    assert torch.equal(bends, torch.zeros(3, 4, dtype=torch.float64))
    norm = torch.linalg.matrix_norm(second.weight @ first.weight, 2).detach()
    torch.testing.assert_close(lipschitz(model, x, iterations=1000), norm.expand(4), rtol=1e-3, atol=0)


def test_one_unit_curves_as_its_formula_says():
    # phi''(0) = (2 c beta + 1 - c) / (4 (1 - beta))
    beta, coeff = 0.7, 0.4
    expected = (2 * coeff * beta + 1 - coeff) / (4 * (1 - beta))
    x = torch.zeros(1, 1, dtype=torch.float64)
    found = curvature(lambda x: ctkernels.functional.ctu(x, beta, coeff)[:, 0], x, torch.ones(1, 1, 1).double())
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_directions_are_of_length_one_and_lead_to_other_samples():
    x = torch.randn(5, 2, 3)
    for directions in (random_directions(x, 4, seed=1), data_directions(x, 4, seed=1)):
        assert directions.shape == (4, 5, 2, 3)
        torch.testing.assert_close(directions.flatten(2).norm(dim=2), torch.ones(4, 5))
    towards = data_directions(x, 1, seed=1)[0].flatten(1)
    for i, direction in enumerate(towards):
        to_others = x.flatten(1) - x[i].flatten()
        cosines = to_others @ direction / to_others.norm(dim=1)
        assert float(cosines[[j for j in range(5) if j != i]].max()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(random_directions(x, 2, seed=3), random_directions(x, 2, seed=3))


def test_a_profile_of_a_relu_network():
    model = net().train()
    x, labels = torch.randn(6, 2, 6, 6), torch.arange(6) % 3
    found = curvature_profile(model, x, labels, betas=[1.0, 0.5, 0.9], directions=2, batch_size=4)
    assert found.betas == (None, 0.5, 0.9, 1.0)
    plain, soft, _, one = found.rows
    assert plain["data"]["mean"] == plain["random"]["mean"] == 0
    assert one["lipschitz"] == plain["lipschitz"]
    assert one["data"]["mean"] == 0
    assert soft["data"]["mean"] > 0
    assert soft["random"]["mean"] > 0
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    whole = curvature_profile(model, x, labels, betas=[0.5], directions=2, batch_size=6)
    assert whole.rows[1]["data"]["mean"] == pytest.approx(soft["data"]["mean"], rel=1e-4)
    assert "0.5" in found.table()


@pytest.mark.parametrize("labelled", [True, False])
def test_a_lipschitz_constant_never_stands_without_its_accuracy(labelled):
    """In the table, the file, and the report's sentence; where there are no labels it is called what it is."""
    pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    model = net()
    x = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = model(x).argmax(1)
    found = curvature_profile(model, x, (own + 1) % 3 if labelled else None, betas=[0.5, 1.0], directions=1)
    name, plain = ("accuracy", 0.0) if labelled else ("agreement with the plain network", 1.0)
    assert found.table().splitlines()[0].endswith(name)
    values = found.to_dict()
    assert values["rows"][0]["accuracy"] == plain
    assert values["labelled"] == labelled
    section = CurvatureProfile.section(values)
    (sentence,) = section.verdict
    assert f"{name} from {100 * plain:.1f} % to" in sentence
    assert name in section.parts[0].alt


def test_loss_curvature_of_a_linear_classifier_is_the_softmaxs():
    weight = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]], dtype=torch.float64)
    x, labels = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([1])
    p = torch.softmax(x @ weight.T, 1)[0]
    hessian = weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight
    v = torch.tensor([[[1.0, 1.0]]], dtype=torch.float64)
    found = curvature(scalar_of(lambda x: x @ weight.T, "loss", labels), x, v)
    assert float(found) == pytest.approx(float(v[0, 0] @ hessian @ v[0, 0] / 2), rel=1e-12)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: hessian_vector(lambda x: x.sum(1), x, x[:1]), "v must have x's shape"),
        (lambda x: hessian_vector(lambda x: x, x, x), "one number per sample"),
        (lambda x: curvature(lambda x: x.sum(1), x, torch.zeros(1, *x.shape)), "must not be zero"),
        (lambda x: curvature(lambda x: x.sum(1), x, x), "directions must have the shape"),
        (lambda x: data_directions(torch.ones(3, 2), 1), "sample 0 equals all others"),
        (lambda x: lipschitz(lambda x: x, x, iterations=0), "iterations must be a whole number of at least 1, got 0"),
        (lambda x: scalar_of(lambda x: x, "slope", torch.zeros(2)), "quantity must be one of"),
        (lambda x: curvature_profile(net(), x[:1], torch.zeros(1)), "at least two samples"),
    ],
)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        bad(torch.randn(4, 3))


def test_scalars_of_a_classifier():
    logits, labels = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([2])
    assert scalar_of(lambda x: x, "logit", labels)(logits).item() == 4
    assert scalar_of(lambda x: x, "margin", labels)(logits).item() == 2.5
    expected = math.log(sum(math.exp(v - 4) for v in (1, 2, 4)))
    assert scalar_of(lambda x: x, "loss", labels)(logits).item() == pytest.approx(expected, rel=1e-6)


def test_forward_mode_through_a_unit_in_place(backend):
    """A kernel that wrote over a dual tensor's value would leave its tangent behind."""
    x, v = torch.randn(2, 7, dtype=torch.float64)

    def call(inplace):
        return lambda x: ctkernels.functional.ctu(x * 1.0, 0.6, 0.3, inplace=inplace)

    value, tangent = torch.func.jvp(call(True), (x,), (v,))
    expected = torch.func.jvp(call(False), (x,), (v,))
    torch.testing.assert_close((value, tangent), expected, rtol=0, atol=0)
    with torch.autograd.forward_ad.dual_level():
        dual = call(True)(torch.autograd.forward_ad.make_dual(x, v))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[1], rtol=0, atol=0)
    batched = torch.func.vmap(call(True))(x.reshape(7, 1))
    torch.testing.assert_close(batched, call(False)(x.reshape(7, 1)), rtol=0, atol=0)
