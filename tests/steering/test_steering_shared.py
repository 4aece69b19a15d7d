"""Steering one model leaves alone what other models hold, and gives back the very objects."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from steered_models import assert_same, snapshot
from torch import nn

import ctkernels
from ctkernels import handle_of, steer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Swish(nn.Module):
    """An activation module of somebody's own: no weights, and the activation in its code."""

    def forward(self, x):
        return F.silu(x)


class Default(nn.Module):
    """A default argument is one object for all models."""

    def __init__(self, act=nn.ReLU()):  # noqa: B008
        super().__init__()
        self.lin, self.act = nn.Linear(8, 8), act

    def forward(self, x):
        return self.act(self.lin(x))


class ClassAttribute(nn.Module):
    default_act = nn.SiLU()

    def __init__(self):
        super().__init__()
        self.lin, self.act = nn.Linear(8, 8), self.default_act

    def forward(self, x):
        return self.act(self.lin(x))


class DirectlyFromTheClass(nn.Module):
    default_act = nn.SiLU()

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return self.default_act(self.lin(x))


class OwnKind(Default):
    def __init__(self, act=Swish()):  # noqa: B008
        super().__init__(act)


class InsideContainer(Default):
    def __init__(self, act=nn.Sequential(nn.Identity(), nn.ReLU())):  # noqa: B008
        super().__init__(act)


class WithSlope(Default):
    def __init__(self, act=nn.PReLU()):  # noqa: B008
        super().__init__(act)


class InList(nn.Module):
    """Not registered at all, or registered and listed."""

    def __init__(self, acts=(nn.ReLU(),)):  # noqa: B008
        super().__init__()
        self.lin, self.acts, self.last = nn.Linear(8, 8), acts, nn.ReLU()
        self.order = [self.lin, self.last]
        self.bound = self.last.forward

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return self.bound(self.acts[0](x - 0.1) - 0.1)


SHARING = [Default, ClassAttribute, DirectlyFromTheClass, OwnKind, InsideContainer, WithSlope, InList]


@pytest.mark.parametrize("cls", SHARING, ids=lambda cls: cls.__name__)
def test_another_model_with_the_same_activation_object_is_not_steered(cls):
    first, second, x = cls(), cls(), torch.randn(2, 8)
    plain, other = first(x), second(x)
    before = snapshot(first), snapshot(second)
    handle = steer(first, 0.7, activations="all")
    assert not handle.missed
    steered = first(x)
    assert (steered - plain).abs().max() > 1e-3
    assert torch.equal(second(x), other)
    assert_same(before[1], snapshot(second))

    beside = steer(second, 0.3, activations="all")
    assert (second(x) - other).abs().max() > 1e-3
    assert torch.equal(first(x), steered)
    handle.remove()
    assert torch.equal(first(x), plain)
    assert_same(before[0], snapshot(first))
    assert (second(x) - other).abs().max() > 1e-3
    beside.remove()
    assert torch.equal(second(x), other)
    assert_same(before[1], snapshot(second))


def test_an_activation_listed_in_every_way_is_the_steered_one():
    model, x = InList(), torch.randn(2, 8)
    handle = steer(model, 0.6)
    expected = F.linear(x, model.lin.weight, model.lin.bias)
    for shift in (0.0, 0.1, 0.1):
        expected = ctkernels.functional.ctu(expected - shift, torch.tensor(0.6))
    assert torch.equal(model(x), expected)
    assert len(handle.sites) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_a_steered_model_is_removed_on_its_own(copied):
    model, x = InsideContainer(), torch.randn(2, 8)
    plain = model(x)
    steer(model, 0.7)
    twin = copied(model)
    steered = model(x)
    assert torch.equal(twin(x), steered)
    handle_of(twin).remove()
    assert torch.equal(twin(x), plain)
    assert [type(module) for module in twin.modules()] == [type(module) for module in InsideContainer().modules()]
    assert torch.equal(model(x), steered)


def test_what_is_done_to_an_activation_while_it_is_steered_stays():
    model = nn.Sequential(nn.PReLU(), nn.LeakyReLU(0.1)).train()
    first, second = model
    handle = steer(model, 0.9)
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("put on while steered"))
    first.register_forward_hook(lambda *_: seen.append("put on the original"))
    model.eval()
    model[0].weight = nn.Parameter(torch.tensor([0.7]))
    model[1].negative_slope = 0.4
    model(torch.ones(2))
    assert len(seen) == 2
    handle.remove()
    assert model[0] is first
    assert model[1] is second
    assert not first.training
    assert not second.training
    x = torch.tensor([-1.0])
    assert first(x) == torch.tensor([0.7]) * x
    assert len(seen) == 4
    assert second(x) == 0.4 * x


def test_what_something_else_put_in_place_of_an_activation_is_kept():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    expected = model(x)
    handle = steer(model, 0.5)
    wrapper = model[1] = nn.Sequential(model[1])
    handle.remove()
    assert model[1] is wrapper
    assert torch.equal(model(x), expected)


class Overridden(nn.Module):
    """The class has one activation under the name, the instance another."""

    act = torch.relu

    def __init__(self):
        super().__init__()
        self.act = torch.tanh

    def forward(self, x):
        return self.act(x) + F.relu(x)


def test_an_instance_with_another_function_than_its_class_calls_its_own():
    model, x = Overridden(), torch.randn(8)
    handle = steer(model, 0.5)
    assert [site.name for site in handle.sites] == ["forward#2:relu"]
    assert torch.equal(model(x), torch.tanh(x) + ctkernels.functional.ctu(x, 0.5))


def test_a_part_with_weights_is_one_object_for_both_models():
    part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    first, second, x = nn.Sequential(part), nn.Sequential(part), torch.randn(2, 4)
    handle = steer(first, 0.5)
    assert torch.equal(second(x), first(x))
    handle.remove()
    assert first[0] is second[0] is part
