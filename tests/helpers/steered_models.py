"""Models that call activations in every way that steering supports."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import relu as imported_relu

import ctkernels

SHARED = nn.ReLU()


def helper(x):
    return F.relu(x)


def method_helper(x):
    return (x + 0).relu() if x.dim() else x.relu()


@torch.no_grad()
def decorated_helper(x):
    return helper(x)


def recursive(x, depth):
    return F.relu(x) if depth == 0 else recursive(x - 0.1, depth - 1)


def wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class FunctionalRelu(nn.Module):
    def forward(self, x):
        return F.relu(x)


class TorchRelu(nn.Module):
    def forward(self, x):
        return torch.relu(x)


class Overload(nn.Module):
    def forward(self, x):
        return torch.ops.aten.relu.default(x)


class OfTheTensorClass(nn.Module):
    def forward(self, x):
        return torch.Tensor.relu(x)


class OfTheType(nn.Module):
    act = F.leaky_relu

    def forward(self, x):
        return type(self).act(x, 0.1)


class OfTheClass(nn.Module):
    act = F.leaky_relu

    def forward(self, x):
        return self.__class__.act(x, 0.1)


class ModuleOfTheClass(nn.Module):
    act = nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.act(x)


class PartialOfTheClass(nn.Module):
    half = functools.partial(F.leaky_relu, negative_slope=0.5)

    def forward(self, x):
        return PartialOfTheClass.half(x)


class ByLiteralName(nn.Module):
    def forward(self, x):
        return getattr(torch, "relu")(x)  # noqa: B009


PARTIAL = functools.partial(F.leaky_relu, negative_slope=0.3)


class GlobalPartial(nn.Module):
    def forward(self, x):
        return PARTIAL(x)


class MethodRelu(nn.Module):
    def forward(self, x):
        return (x + 0).relu()


class InplaceMethod(nn.Module):
    def forward(self, x):
        x = x + 0
        x.relu_()
        return x


class Imported(nn.Module):
    def forward(self, x):
        return imported_relu(x)


class LocalImport(nn.Module):
    def forward(self, x):
        from torch.nn import functional

        return functional.relu(x, inplace=False)


class Leaky(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, negative_slope=0.2)


class Relu6(nn.Module):
    def forward(self, x):
        return F.relu6(4 * x)


class HardTanh(nn.Module):
    def forward(self, x):
        return F.hardtanh(4 * x, 0.0, 6.0)


class FunctionalPrelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x):
        return F.prelu(x, self.slope)


class Helper(nn.Module):
    def forward(self, x):
        return helper(x)


class Recursive(nn.Module):
    def forward(self, x):
        return recursive(x, 2)


class StaticHelper(nn.Module):
    @staticmethod
    def act(x):
        return torch.relu(x)

    def forward(self, x):
        return self.act(x)


class ClassAttribute(nn.Module):
    act = staticmethod(F.relu)

    def forward(self, x):
        return self.act(x)


class OtherMethod(nn.Module):
    def __activate(self, x):  # a mangled name
        return F.relu(x)

    def forward(self, x):
        return self.__activate(x)


class Inherited(FunctionalRelu):
    def forward(self, x):
        return super().forward(x) + 1


class Unbound(FunctionalRelu):
    def forward(self, x):
        return FunctionalRelu.forward(self, x)


class Nested(nn.Module):
    def forward(self, x):
        def inner(y):
            return F.relu(y)

        return inner(x) + sum(F.relu(y) for y in [x]) + (lambda y: F.relu(y))(x)


class Chosen(nn.Module):
    def forward(self, x):
        act = F.relu if x.dim() > 0 else F.gelu
        return act(x)


class Decorated(nn.Module):
    @wrapped
    def forward(self, x, *, shift=0.0):
        return F.relu(x + shift)


class NoGrad(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return F.relu(x)


class OldSuper(FunctionalRelu):
    def forward(self, x):
        return super(OldSuper, self).forward(x) + 1  # noqa: UP008


class MethodHelper(nn.Module):
    def forward(self, x):
        return method_helper(x)


class DecoratedHelper(nn.Module):
    def forward(self, x):
        return decorated_helper(x)


class BoundMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = self._act

    def _act(self, x):
        return F.relu(x)

    def forward(self, x):
        return self.act(x)


class Property(nn.Module):
    @property
    def act(self):
        return F.relu

    def forward(self, x):
        return self.act(x)


class Attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = F.relu

    def forward(self, x):
        return self.act(x)


class PartialAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = functools.partial(F.leaky_relu, negative_slope=0.2)

    def forward(self, x):
        return self.act(x)


class GlobalModule(nn.Module):
    def forward(self, x):
        return SHARED(x)


class ReluSubclass(nn.ReLU):
    def forward(self, input):
        return 2 * super().forward(input)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.acts = [nn.ReLU()]

    def forward(self, x):
        return self.acts[0](x)


class Containers(nn.Module):
    """The same module in several places and in every container, with other modules of its kind."""

    def __init__(self):
        super().__init__()
        shared = nn.ReLU(inplace=True)
        self.sequence = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
        self.items = nn.ModuleList([nn.LeakyReLU(0.2), nn.ReLU6()])
        self.named = nn.ModuleDict({"p": nn.PReLU(4), "h": nn.Hardtanh(0, 6), "t": nn.Threshold(0, 0)})
        self.again = shared

    def forward(self, x):
        x = self.sequence(x)
        for act in (*self.items, *self.named.values()):
            x = act(x - 0.1)
        return self.again(x - 0.1)


class ConvNet(nn.Module):
    """A small network with BatchNorm, a module and a functional call."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.prelu = nn.PReLU(4)
        self.act = F.leaky_relu
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = self.act(self.prelu(x - 0.2) - 0.1)
        return self.head(F.relu(x - 0.1, inplace=True).mean((2, 3)))


FUNCTIONAL = {
    FunctionalRelu: 1,
    TorchRelu: 1,
    Overload: 1,
    OfTheTensorClass: 1,
    OfTheType: 1,
    OfTheClass: 1,
    ModuleOfTheClass: 1,
    PartialOfTheClass: 1,
    ByLiteralName: 1,
    GlobalPartial: 1,
    MethodRelu: 1,
    InplaceMethod: 1,
    Imported: 1,
    LocalImport: 1,
    Leaky: 1,
    Relu6: 1,
    HardTanh: 1,
    FunctionalPrelu: 1,
    Helper: 1,
    Recursive: 1,
    StaticHelper: 1,
    ClassAttribute: 1,
    OtherMethod: 1,
    Inherited: 1,
    Unbound: 1,
    Nested: 3,
    Chosen: 1,
    Decorated: 1,
    NoGrad: 1,
    OldSuper: 1,
    MethodHelper: 2,
    DecoratedHelper: 1,
    BoundMethod: 1,
    Property: 1,
    Attribute: 1,
    PartialAttribute: 1,
    GlobalModule: 1,
    ReluSubclass: 1,
    Listed: 1,
}


def count_units(monkeypatch):
    """Record calls of the unit in the returned list, as (activation, beta)."""
    calls, ctu = [], ctkernels.functional.ctu

    def counted(x, beta, *args, **kwargs):
        calls.append((kwargs["activation"], round(float(beta), 6)))
        return ctu(x, beta, *args, **kwargs)

    monkeypatch.setattr(ctkernels.functional, "ctu", counted)
    return calls


def snapshot(model):
    """The full state of a model: objects by identity, in order, and the bits of its tensors."""
    found = {}
    for name, module in model.named_modules():
        held = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        found[name] = (id(module), type(module), list(held), {k: id(v) for k, v in vars(module).items()})
        found[f"{name}._"] = {k: [(n, id(o)) for n, o in v.items()] for k, v in held.items() if isinstance(v, dict)}
    return found, {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(before, after):
    assert before[0] == after[0]
    assert list(before[1]) == list(after[1])
    assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])
