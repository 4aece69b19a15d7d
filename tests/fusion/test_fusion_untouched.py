"""Fusion leaves alone what is not its own: caches, other threads, code that is put on a part before or afterwards."""

from __future__ import annotations

import copy
import functools
import linecache
import random
import threading
import traceback
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from fused_models import Residual, observe, prepare
from steered_models import assert_same, snapshot
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import ctkernels
from ctkernels.fusion import leftovers


def image(batch=2, size=8):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm, self.relu = conv(3, 4, 3, padding=1), norm(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


def small(*args):
    torch.manual_seed(0)
    model = prepare(Small(*args)).eval().requires_grad_(False)
    ctkernels.steer(model, 0.9)
    return model


def agree(model, plain, x):
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ forwards that are read

GLOBAL: dict[str, torch.Tensor] = {}
HISTORY: list[torch.Tensor] = []
LAST: object = "nothing yet"


@functools.lru_cache
def doubled(x):
    return x * 2


class Caches(nn.Module):
    """``keep``: where a value is put by the forward, once."""

    shared: ClassVar[dict[str, torch.Tensor]] = {}

    def __init__(self, keep):
        super().__init__()
        self.inner, self.keep, self.cache = Small(), keep, {}
        self.act, self.bias = nn.ReLU(), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        global LAST
        y = self.act(self.inner(x))
        place = {"instance": self.cache, "class": self.shared, "global": GLOBAL}.get(self.keep)
        if place is not None:
            if "table" not in place:
                place["table"] = self.bias * 2
            return y + place["table"]
        if self.keep == "list":
            HISTORY.append(y)
        elif self.keep == "name":
            LAST = y
        elif self.keep == "memoised":
            return y + doubled(self.bias)
        return y + 2


@pytest.mark.parametrize("keep", ["instance", "class", "global", "list", "name", "memoised"])
def test_no_stand_in_stays_in_a_cache(keep):
    model = nn.Sequential(Caches(keep)).eval().requires_grad_(False)
    expected_type, before_last = type(model[0].bias), LAST
    ctkernels.steer(model, 0.9)
    before = snapshot(model)
    handle = ctkernels.fuse(model)
    assert "keeps values" in handle.left["0"]
    assert [str(site) for site in handle.sites] == ["0.inner.conv -> 0.inner.norm -> 0.inner.relu"]
    assert not model[0].cache
    assert not Caches.shared
    assert not GLOBAL
    assert not HISTORY
    assert LAST is before_last
    assert doubled.cache_info().currsize == 0
    x = image()
    fused = model(x)
    handle.remove()
    model[0].cache.clear()
    assert_same(before, snapshot(model))
    for place in (model[0].cache, Caches.shared, GLOBAL, HISTORY):
        place.clear()
    doubled.cache_clear()
    torch.testing.assert_close(fused, model(x))
    assert type(fused) is torch.Tensor
    assert expected_type is nn.Parameter
    for place in (model[0].cache, Caches.shared, GLOBAL, HISTORY):
        place.clear()
    doubled.cache_clear()


def test_what_was_overwritten_is_put_back():
    value = torch.ones(1)
    GLOBAL["table"], Caches.shared["other"] = value, value
    HISTORY.append(value)
    kept = [GLOBAL, HISTORY]

    class Overwrites(Small):
        def forward(self, x):
            y = super().forward(x)
            kept[0]["table"] = y
            kept[1].append(y)
            return y

    model = nn.Sequential(Overwrites()).eval()
    ctkernels.steer(model, 0.9)
    with pytest.raises(ValueError, match="keeps values"):
        ctkernels.fuse(model)
    assert [value] == HISTORY
    assert {"table": value} == GLOBAL
    for place in (GLOBAL, Caches.shared, HISTORY):
        place.clear()


def test_what_cannot_be_taken_back_is_an_error_that_names_the_module():
    held = []

    class Cell:
        __slots__ = ("value",)

    class Hides(Small):
        def forward(self, x):
            y = super().forward(x)
            cell = Cell()
            cell.value = y
            held.append(cell)
            return y

    model = nn.Sequential(Hides()).eval()
    ctkernels.steer(model, 0.9)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"expected a Hides whose forward keeps nothing.*Cell"):
        ctkernels.fuse(model)
    assert_same(before, snapshot(model))


def test_remove_finds_what_was_copied_elsewhere():
    model = small()
    handle = ctkernels.fuse(model)
    model.__dict__["old_forward"] = vars(model)["forward"]
    with pytest.raises(RuntimeError, match="'old_forward' of the model, a Small"):
        handle.remove()
    assert "forward" not in vars(model)


def test_remains_are_found():
    class StandIn:
        pass

    remains, kept = leftovers.StandIns(), StandIn()
    remains.watch(kept, "Module")
    assert remains.any_alive()
    del kept
    assert not remains.any_alive()


class Sized(nn.Module):
    """Its argument is a size."""

    def __init__(self):
        super().__init__()
        self.inner = Small()

    def forward(self, shape):
        return self.inner(torch.zeros(shape))


class AddsSized(nn.Module):
    def __init__(self):
        super().__init__()
        self.sized = Sized()

    def forward(self, x):
        return x + self.sized((1, 3, 8, 8))


def test_a_forward_that_takes_a_size():
    model, x = prepare(AddsSized()).eval(), torch.randn(1, 4, 8, 8)
    ctkernels.steer(model, 0.9)
    plain = copy.deepcopy(model)
    handle = ctkernels.fuse(model)
    assert "sized" in handle.left
    agree(model, plain, x)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Reverses(Small):
    def forward(self, x):
        return super().forward(Reverse.apply(x))


class ReversesInside(Small):
    def forward(self, x):
        return self.relu(self.norm(Reverse.apply(self.conv(x))))


class Types(Small):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if type(y) is torch.Tensor else y


class IsInstance(Small):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if isinstance(y, torch.Tensor) else y


class Draws(Small):
    def forward(self, x):
        return super().forward(x) * (1 if random.random() < 2 else 0)


class DrawsTorch(Small):
    def forward(self, x):
        return super().forward(x) * 3 if torch.rand(1) < 2 else x


@pytest.mark.parametrize("cls", [Reverses, ReversesInside, Types, IsInstance, Draws, DrawsTorch])
def test_what_a_graph_does_not_show(cls):
    """Gradients of its own, paths by type, random paths: the same as without fusion."""
    torch.manual_seed(0)
    model = nn.Sequential(prepare(cls()), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    ctkernels.steer(model, 0.9)
    plain, x = copy.deepcopy(model), image()
    state, torch_state = random.getstate(), torch.get_rng_state()
    handle = ctkernels.fuse(model)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert "0" in handle.left
    ours, theirs = observe(model, x), observe(plain, x)
    for name in ("output", "input"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_what_a_path_was_read_with_may_change():
    """Attributes of parts, contents of lists and mappings, parts that go or come."""

    class Chooses(Small):
        def __init__(self):
            super().__init__()
            self.steps, self.settings, self.extra = ["double"], {"add": 1.0}, None
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            y = self.relu(self.norm(self.conv(x)))
            y = y * 2 if "double" in self.steps else y
            y = y + self.settings["add"]
            y = y if self.extra is None else self.extra(y)
            return y * 5 if self.pool.kernel_size == 3 else y

    model, x = prepare(Chooses()).eval(), image()
    ctkernels.steer(model, 0.9)
    plain = copy.deepcopy(model)
    handle = ctkernels.fuse(model)
    assert not handle.left
    changes = (
        lambda m: m.steps.clear(),
        lambda m: m.settings.update(add=3.0),
        lambda m: setattr(m, "extra", nn.Hardswish()),
        lambda m: setattr(m.pool, "kernel_size", 3),
        lambda m: setattr(m, "relu", nn.Tanh()),
        lambda m: setattr(m, "extra", None),
    )
    agree(model, plain, x)
    for change in changes:
        change(model), change(plain)
        agree(model, plain, x)


# ------------------------------------------------------------------------------------------------- layers with own code


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return super()._conv_forward(x, weight, bias)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2, self.bias, padding=1)


class OwnCall(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Halves(torch.Tensor):
    """A weight of a class of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return out * 0.5 if func is F.conv2d else out


def circular(m):
    m.conv._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), w, b)


def replace_forward(part):
    def change(m):
        module = getattr(m, part)
        old = module.forward
        module.forward = lambda *args: old(*args) * 3

    return change


def replace_class(part, cls):
    return lambda m: setattr(getattr(m, part), "__class__", cls)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


CHANGES = {
    "conv._conv_forward": circular,
    "conv.forward": replace_forward("conv"),
    "norm.forward": replace_forward("norm"),
    "relu.forward": replace_forward("relu"),
    "conv.__class__, _conv_forward": replace_class("conv", Standardised),
    "conv.__class__, forward": replace_class("conv", OwnForward),
    "conv.__class__, __call__": replace_class("conv", OwnCall),
    "norm.__class__": replace_class("norm", OwnNorm),
    "weight norm": lambda m: weight_norm(m.conv),
    "spectral norm": lambda m: spectral_norm(m.conv),
    "pruning": lambda m: prune.l1_unstructured(m.conv, "weight", 0.5),
    "parametrization": lambda m: parametrize.register_parametrization(m.conv, "weight", Doubled()),
    "parametrized weight norm": lambda m: parametrizations.weight_norm(m.conv),
    "forward hook": lambda m: m.norm.register_forward_hook(lambda module, args, out: out * 2) and None,
    "another part": lambda m: setattr(m, "norm", nn.Hardswish()),
    "conv.compile": lambda m: setattr(m.conv, "_compiled_call_impl", lambda x: nn.Conv2d.forward(m.conv, x) * 2),
    "padding": lambda m: (
        setattr(m.conv, "padding_mode", "circular") or setattr(m.conv, "_reversed_padding_repeated_twice", [1, 1, 1, 1])
    ),
    "tensor of its own class": lambda m: setattr(
        m.conv, "weight", nn.Parameter(m.conv.weight.as_subclass(Halves), False)
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_code_that_is_put_on_a_part(change, when):
    model, x = small(), image()
    plain = copy.deepcopy(model)
    if when == "before":
        torch.manual_seed(1)
        CHANGES[change](model)
    with torch.no_grad():
        try:
            ctkernels.fuse(model)
        except ValueError:  # there may be nothing left to fuse
            if when == "after":
                raise
        if when == "after":
            model(x)
            torch.manual_seed(1)
            CHANGES[change](model)
        torch.manual_seed(1)
        CHANGES[change](plain)
    agree(model, plain, x)


def test_what_is_left_says_why():
    model = nn.Sequential(small(Standardised), small(), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))).eval()
    model[1].conv.register_forward_hook(lambda *_: None)
    left = ctkernels.fuse(model).left
    assert "Standardised has code of its own" in left["0.conv"]
    assert "hooks" in left["1.conv"]
    assert "no layer before it" in left["2.1"]


def test_global_hooks_see_every_module():
    model, x, seen = small(), image(), []
    ctkernels.fuse(model)
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module).__name__)):
        model(x)
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Small"]


def test_a_residual_of_another_shape_is_added_after_the_norm():
    class Broadcast(Small):
        def forward(self, x):
            return self.relu(self.norm(self.conv(x)) + x.mean((1, 2, 3), keepdim=True))

    for frozen in (True, False):
        torch.manual_seed(0)
        model, x = prepare(Broadcast()).eval().requires_grad_(not frozen), image()
        ctkernels.steer(model, 0.9)
        plain = copy.deepcopy(model)
        assert ctkernels.fuse(model).sites[0].residual
        agree(model, plain, x)


def test_channels_of_a_linear_layer_are_not_those_of_the_norm():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(self.linear(x))

    model, x = prepare(Rows()).eval().requires_grad_(False), torch.randn(7, 5, 3)
    plain = copy.deepcopy(model)
    ctkernels.fuse(model)
    agree(model, plain, x)
    with pytest.raises(ValueError, match="2D or 3D"):
        model(torch.randn(2, 2, 5, 3))


# -------------------------------------------------------------------------------------------------------------- threads


def test_other_threads_do_not_notice():
    """While a model is fused: another model is called, the same model is called, another one is fused."""
    served, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.randn(2, 8)
    torch.manual_seed(0)
    shared = prepare(Residual(["basic", "projected"])).eval()
    ctkernels.steer(shared, 0.9)
    with torch.no_grad():
        expected, expected_shared = served(x), shared(image())
    stop, errors, calls = threading.Event(), [], [0, 0]

    def serve(i, model, x, expected):
        try:
            while not stop.is_set():
                with torch.no_grad():
                    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
                assert not model.training
                calls[i] += 1
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=serve, args=(0, served, x, expected)),
        threading.Thread(target=serve, args=(1, shared, image(), expected_shared)),
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            ctkernels.fuse(shared).remove()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert min(calls) > 0


# ------------------------------------------------------------------------------------------------------------ tracebacks


class Fails(Small):
    def forward(self, x):
        y = self.relu(self.norm(self.conv(x)))
        return y.view(7, 11)  # this line is wrong


def test_a_traceback_shows_the_line_that_was_run_and_the_users_own():
    model = prepare(Fails()).eval()
    ctkernels.steer(model, 0.9)
    ctkernels.fuse(model)
    with pytest.raises(RuntimeError) as raised:
        model(image())
    frame = next(f for f in traceback.extract_tb(raised.value.__traceback__) if f.filename.startswith("<fused Fails"))
    assert ".view(7, 11)" in frame.line
    assert "return y.view(7, 11)  # this line is wrong" in frame.line
    assert __file__.rpartition("/")[2] in frame.line
    linecache.checkcache()
    assert linecache.getline(frame.filename, frame.lineno)
