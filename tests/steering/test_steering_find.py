"""What steering finds, in every way to write an activation, and what it says of the rest."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import steered_models
import torch
import torch.nn.functional as F
from steered_models import FUNCTIONAL, Containers, ConvNet, assert_same, count_units, snapshot
from torch import nn

import ctkernels
from ctkernels import steer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def units(monkeypatch):
    return count_units(monkeypatch)


@pytest.mark.parametrize("cls", FUNCTIONAL, ids=lambda cls: cls.__name__)
def test_every_way_to_call_an_activation(cls, units):
    model, x = cls(), torch.randn(16)
    expected = model(x.clone())
    before = snapshot(model)
    handle = steer(model, 1.0)
    assert not handle.missed
    assert len(handle.sites) == FUNCTIONAL[cls]
    assert torch.equal(model(x.clone()), expected)
    assert len(units) == min(FUNCTIONAL[cls], 3 if cls is steered_models.Nested else 1)
    handle.beta = 0.7
    assert not torch.equal(model(x.clone()), expected)
    assert units[-1][1] == 0.7
    assert torch.equal(cls()(x.clone()) if cls is not steered_models.FunctionalPrelu else expected, expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x.clone()), model(x.clone()))
    handle.remove()
    assert torch.equal(model(x.clone()), expected)
    assert_same(before, snapshot(model))


def test_modules_in_every_container(units):
    model, x = Containers(), torch.randn(3, 4)
    expected = model(x.clone())
    handle = steer(model, 1.0)
    assert torch.equal(model(x.clone()), expected)
    assert [(s.name, s.activation) for s in handle.sites] == [
        ("sequence.1", "relu"),
        ("items.0", "leaky_relu"),
        ("items.1", "relu6"),
        ("named.p", "prelu"),
        ("named.h", "relu6"),
        ("named.t", "relu"),
    ]
    assert handle.sites[0].aliases == ("sequence.3", "again")
    assert len(units) == 8  # the shared module three times


def test_names():
    handle = steer(ConvNet(), 0.9)
    assert [(s.name, s.kind) for s in handle.sites] == [
        ("forward:relu", "functional"),
        ("act:leaky_relu", "functional"),
        ("relu", "module"),
        ("prelu", "module"),
    ]
    assert handle.sites[0].where.rpartition(":")[0] == steered_models.__file__
    assert [s.name for s in steer(steered_models.Nested(), 0.9).sites] == [
        "forward:relu",
        "forward#2:relu",
        "forward#3:relu",
    ]


def test_a_copy_of_the_source_keeps_the_signature():
    import inspect

    model = steered_models.Decorated()
    before = inspect.signature(model.forward)
    steer(model, 0.9)
    assert inspect.signature(model.forward) == before
    assert torch.equal(model(-torch.ones(1), shift=2.0), ctkernels.functional.ctu(torch.ones(1), 0.9))


def test_only_this_model_is_steered():
    first, second, x = steered_models.GlobalModule(), steered_models.Helper(), torch.randn(8)
    steer(first, 0.7)
    assert torch.equal(second(x), F.relu(x))
    assert torch.equal(steered_models.SHARED(x), F.relu(x))
    assert type(steered_models.SHARED) is nn.ReLU


def test_a_module_global_to_its_library_is_not_shared_with_other_models(monkeypatch):
    act = nn.ReLU()
    monkeypatch.setattr(torch.nn.modules.activation, "a_global_relu", act, raising=False)
    first, second, x = nn.Sequential(act), nn.Sequential(act), torch.randn(8)
    before = snapshot(first)
    handle = steer(first, 0.7)
    assert not torch.equal(first(x), second(x))
    handle.remove()
    assert_same(before, snapshot(first))


class FindsOne(nn.Module):
    """One site, and beside it something that cannot be steered."""

    def __init__(self, **held):
        super().__init__()
        self.found = nn.ReLU()
        for name, value in held.items():
            setattr(self, name, value)


class Maker(nn.Module):
    def forward(self, x):
        return nn.ReLU()(x)


class ClassMethod(nn.Module):
    @classmethod
    def act(cls, x):
        return F.relu(x)


class Hidden(nn.Module):
    def forward(self, x):
        return hiding_decorator(x)


def hiding(function):
    held = [function]

    @functools.wraps(function)
    def wrapper(x):
        return held[0](x)

    return wrapper


@hiding
def hiding_decorator(x):
    return x.relu()


class FromContainer(nn.Module):
    def forward(self, x):
        return CONTAINER["relu"](x)


CONTAINER = {"relu": F.relu, "tanh": F.tanh}


class ByName(nn.Module):
    def forward(self, x):
        return getattr(F, "re" + "lu")(x)


class ByNameInTorch(nn.Module):
    kind = "relu"

    def forward(self, x):
        x = x.to(dtype=getattr(torch, "float" + "32"))  # no function
        return getattr(torch, self.kind)(x)


class ByNameInDict(nn.Module):
    def forward(self, x):
        return vars(F)["re" + "lu"](x)


class ByMethodName(nn.Module):
    def forward(self, x):
        return getattr(x, "relu")()  # noqa: B009


class ByDefault(nn.Module):
    def forward(self, x, act=F.relu):
        return act(x)


class Out(nn.Module):
    def forward(self, x):
        return torch.ops.aten.relu.out(x, out=torch.empty_like(x))


class FromClassContainer(nn.Module):
    acts = (F.relu, F.tanh)

    def forward(self, x):
        return self.acts[0](x)


class CallsScripted(nn.Module):
    def forward(self, x):
        return scripted(x)


def calls_scripted():
    global scripted
    scripted = torch.jit.script(steered_models.helper)
    return CallsScripted()


def with_forward(module, forward):
    module.forward = forward
    return module


def without_source():
    space = {"F": F}
    exec("def forward(self, x):\n    return F.relu(x)", space)
    return type("Made", (nn.Module,), space)()


CANNOT = {
    "attribute holds a function": lambda: FindsOne(act=steered_models.helper),
    "attribute holds a lambda": lambda: FindsOne(act=lambda x: F.relu(x)),
    "container of functions": lambda: FindsOne(acts={"a": F.relu}),
    "unregistered module": lambda: FindsOne(hidden=[nn.Sequential(nn.ReLU())]),
    "scripted": lambda: FindsOne(child=torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))),
    "traced": lambda: FindsOne(child=torch.fx.symbolic_trace(steered_models.FunctionalRelu())),
    "its own forward": lambda: FindsOne(child=with_forward(nn.ReLU(), lambda x: x)),
    "code with its own forward": lambda: FindsOne(child=with_forward(steered_models.FunctionalRelu(), lambda x: x)),
    "recurrent": lambda: FindsOne(child=nn.RNN(2, 2, nonlinearity="relu")),
    "no source": lambda: FindsOne(child=without_source()),
    "made at every call": lambda: FindsOne(child=Maker()),
    "class method": lambda: FindsOne(child=ClassMethod()),
    "hiding decorator": lambda: FindsOne(child=Hidden()),
    "from a container": lambda: FindsOne(child=FromContainer()),
    "chosen by name": lambda: FindsOne(child=ByName()),
    "chosen by name in torch": lambda: FindsOne(child=ByNameInTorch()),
    "chosen by name in a dict": lambda: FindsOne(child=ByNameInDict()),
    "a tensor's method by name": lambda: FindsOne(child=ByMethodName()),
    "default of an argument": lambda: FindsOne(child=ByDefault()),
    "written to a tensor": lambda: FindsOne(child=Out()),
    "from a container of the class": lambda: FindsOne(child=FromClassContainer()),
    "container of partials": lambda: FindsOne(acts=[functools.partial(F.leaky_relu, negative_slope=0.1)]),
    "exported": lambda: FindsOne(child=torch.export.export(nn.ReLU(), (torch.zeros(2),)).module()),
    "scripted function": lambda: FindsOne(child=calls_scripted()),
    "named like one": lambda: FindsOne(child=type("MyReLU", (nn.Module,), {"forward": lambda self, x: x * (x > 0)})()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_steered_is_named(case):
    model = CANNOT[case]()
    with pytest.warns(UserWarning, match=r"steer: \d activations are not steered"):
        handle = steer(model, 0.9)
    assert [s.name for s in handle.sites] == ["found"]
    assert len(handle.missed) == 1
    missed = handle.missed[0]
    assert missed.name.split(".")[0] in ("child", "act", "acts", "hidden")
    assert missed.reason
    assert missed.name in repr(handle)


def chosen_by_name(kind, x):
    return getattr(torch, kind)(x)


class Project(nn.Module):
    """Has the same look-up in three methods: one that another module's forward calls, and two that serve no forward."""

    def project(self, x):
        return self.apply_kind(x)

    def apply_kind(self, x):
        return chosen_by_name("relu", x)

    def load(self, device):
        return getattr(torch, device).current_device()

    def save(self, device):
        return self.load(device)


class CallsProject(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.act = Project(), nn.ReLU()

    def forward(self, x):
        return self.act(self.part.project(x))


class CallsInherited(Project):
    def forward(self, x):
        return super().apply_kind(x)


@pytest.mark.parametrize("build", [CallsProject, lambda: FindsOne(child=CallsInherited())])
def test_a_function_chosen_by_name_is_an_activation_only_where_a_forward_may_choose_it(build):
    with pytest.warns(UserWarning, match=r"steer: 1 activations are not steered"):
        handle = steer(build(), 0.9)
    assert [miss.name.rpartition(".")[2] for miss in handle.missed] == ["chosen_by_name:any"]
    unreached = [skip for skip in handle.skipped if skip.reason.endswith("where no forward leads to")]
    assert [skip.name.rpartition(".")[2] for skip in unreached] == ["load:any"]


def test_recurrent_layers_are_named_only_where_their_activation_is_a_relu():
    model = nn.ModuleDict(
        {
            "act": nn.ReLU(),
            "lstm": nn.LSTM(2, 2),
            "gru": nn.GRU(2, 2),
            "cell": nn.LSTMCell(2, 2),
            "tanh": nn.RNN(2, 2),
            "relu": nn.RNN(2, 2, nonlinearity="relu"),
            "relu_cell": nn.RNNCell(2, 2, nonlinearity="relu"),
        }
    )
    with pytest.warns(UserWarning, match=r"2 activations are not steered"):
        handle = steer(model, 0.9)
    reason = "its ReLU is fused into the recurrence"
    assert [(miss.name, miss.activation, miss.reason) for miss in handle.missed] == [
        ("relu", "relu", reason),
        ("relu_cell", "relu", reason),
    ]
    handle.remove()
    model["act"] = nn.SiLU()
    assert steer(model, 0.9, activations="silu").missed == ()


def test_outside_the_family_is_skipped_without_a_warning():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.acts = nn.ModuleList(
                [nn.ELU(), nn.Hardswish(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Hardtanh(), nn.Threshold(1, 0)]
            )
            self.relu = nn.ReLU()

        def forward(self, x):
            x = F.elu(F.gelu(x, approximate="tanh")) + F.hardtanh(x) + F.silu(x) + x.clamp(min=0)
            return self.relu(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = steer(Net(), 0.9)
    assert [s.name for s in handle.sites] == ["relu"]
    names = sorted(skipped.name for skipped in handle.skipped)
    assert names == sorted(
        [
            *(f"acts.{i}" for i in range(6)),
            "forward:elu",
            "forward:gelu_tanh",
            "forward:relu6",
            "forward:silu",
            "forward:relu",
        ]
    )


def test_no_site_is_an_error_that_lists_near_misses():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.ELU())
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"(?s)expected Sequential to have an activation among relu.* 1 .*gelu.* 2 .*elu"
    ):
        steer(model, 0.9)
    with pytest.raises(ValueError, match="got none, and no near miss"):
        steer(nn.Linear(2, 2), 0.9)
    assert_same(before, snapshot(model))
