"""A vision model under everything that is done to models, in any order: steered and fused it keeps up with a twin that is not
fused, and in the end nothing is left of it."""

from __future__ import annotations

import copy
import io
import types
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis", reason="needs the test extra")
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from machines import WRITES, assert_same_state, dated, noise, parametrized, profile, toggle_parametrization

import ctkernels

CONVOLUTIONS = ("conv1", "conv2", "skip")
NORMS = ("norm1", "norm2", "norm3")
LAYERS = (*CONVOLUTIONS, *NORMS, "head")
# Three units, each off by its share of the terms (ctkernels/ops/ctu/README.md) and fed by layers whose weights are of size 1 or
# 2 at most, 36 of them a value: an error grows by less than a thousand on its way to the output.
ALLOWED = {torch.float64: 4e-13 * 3 * 1e3, torch.float32: 1e-5 * 3 * 1e2}


class Net(nn.Module):
    """Every kind of site: with a residual sum, without, in place, and a fold without a unit."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.skip, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        y += self.norm3(self.skip(x))
        return self.head(self.relu(y).mean((2, 3)))


class Louder(nn.Conv2d):
    def forward(self, x):
        return 1.5 * super().forward(x)


def tripled(module):
    """A forward of the instance's own, as other libraries put on."""
    old = type(module).forward

    def forward(self, *args):
        return 3 * old(self, *args)

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def made():
    torch.manual_seed(3)
    model = Net().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(noise(module.running_mean, 1))
            module.running_var.copy_(noise(module.running_var, 2).abs() + 0.5)
            module.weight.data.copy_(noise(module.weight, 3) + 1)
    return model


seeds = st.integers(0, 1000)


class VisionMachine(RuleBasedStateMachine):
    """``model`` may be fused, ``twin`` never is; all else is done to both."""

    def __init__(self):
        super().__init__()
        self.model, self.twin = made(), made()
        self.steering: list[ctkernels.Steering] = []
        self.fusion: ctkernels.Fusion | None = None
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.forwards: set[str] = set()  # layers with a forward of their own
        self.ran_in_training = False
        warnings.simplefilter("ignore")

    @property
    def both(self):
        return self.model, self.twin

    # ---- what the library does ----

    @precondition(lambda self: not self.steering and self.fusion is None)
    @rule(beta=st.sampled_from((0.5, 0.9, 1.0)), coeff=st.sampled_from((0.0, 0.5, 1.0)))
    def steer(self, beta, coeff):
        self.steering = [ctkernels.steer(model, beta, coeff) for model in self.both]

    @precondition(lambda self: self.steering)
    @rule(beta=st.sampled_from((0.3, 0.8, 1.0)), pattern=st.sampled_from(("", "*relu*")))
    def set_beta(self, beta, pattern):
        for handle in self.steering:
            handle.beta = {pattern: beta} if pattern else beta

    @precondition(lambda self: self.steering and self.fusion is None)
    @rule()
    def unsteer(self):
        for handle in self.steering:
            handle.remove()
        self.steering = []

    @precondition(lambda self: self.fusion is None)
    @rule()
    def fuse(self):
        try:
            self.fusion = ctkernels.fuse(self.model)
        except (
            ValueError
        ):  # hooks and parametrizations may leave nothing that can be fused: then it says so, and is not
            self.fusion = None

    @precondition(lambda self: self.fusion is not None)
    @rule()
    def unfuse(self):
        assert self.fusion is not None
        self.fusion.remove()
        self.fusion = None

    # ---- what users do to weights ----

    @rule(name=st.sampled_from(LAYERS), how=st.sampled_from(sorted(WRITES)), seed=seeds)
    def write(self, name, how, seed):
        if parametrized(getattr(self.twin, name)) or (how == "nn.init" and name in NORMS):
            return
        if how == "load_state_dict(assign=True)" and name in NORMS and seed % 2:
            return
        for model in self.both:
            layer = getattr(model, name)
            WRITES[how](layer, seed)
            if name in NORMS:  # a variance is positive
                layer.running_var.data.abs_().add_(0.5)

    @rule(name=st.sampled_from(NORMS), seed=seeds)
    def move_statistics(self, name, seed):
        for model in self.both:
            norm = getattr(model, name)
            norm.running_mean.add_(noise(norm.running_mean, seed))
            norm.running_var.data.mul_(1 + seed % 3)

    @rule(name=st.sampled_from(CONVOLUTIONS))
    def parametrize(self, name):
        if name in self.forwards:
            return
        for model in self.both:
            toggle_parametrization(getattr(model, name))

    @rule(wanted=st.booleans())
    def freeze(self, wanted):
        for model in self.both:
            model.requires_grad_(wanted)

    @rule(seed=seeds)
    def cast_there_and_back(self, seed):
        for model in self.both:
            model.float()
        self.compare()
        for model in self.both:
            model.double()

    # ---- what users do to modules ----

    @rule(name=st.sampled_from(CONVOLUTIONS), seed=seeds)
    def replace(self, name, seed):
        for model in self.both:
            old = getattr(model, name)
            if parametrized(old):
                return
            new = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, padding=old.padding).double()
            _ = [p.data.copy_(noise(p, seed)) for p in new.parameters()]
            setattr(model, name, new.train(model.training))
        self.forwards.discard(name)

    @rule(name=st.sampled_from((*LAYERS, "relu")), before=st.booleans())
    def hook(self, name, before):
        for model in self.both:
            module = getattr(model, name)
            if before:
                self.hooks.append(module.register_forward_pre_hook(lambda _, args: (1.1 * args[0],)))
            else:
                self.hooks.append(module.register_forward_hook(lambda _, args, y: y + 0.1))

    @precondition(lambda self: self.hooks)
    @rule()
    def unhook(self):
        while self.hooks:
            self.hooks.pop().remove()

    @rule(name=st.sampled_from((*LAYERS, "relu")))
    def own_forward(self, name):
        if name not in self.forwards and "forward" not in vars(getattr(self.model, name)) and name != "relu":
            for model in self.both:
                tripled(getattr(model, name))
            self.forwards.add(name)

    @precondition(lambda self: self.forwards)
    @rule()
    def class_forward_again(self):
        for name in self.forwards:
            for model in self.both:
                del getattr(model, name).forward
        self.forwards.clear()

    @rule(name=st.sampled_from(CONVOLUTIONS))
    def another_class(self, name):
        if parametrized(getattr(self.twin, name)) or name in self.forwards:
            return
        for model in self.both:
            layer = getattr(model, name)
            layer.__class__ = nn.Conv2d if type(layer) is Louder else Louder

    @rule(mode=st.booleans())
    def train(self, mode):
        for model in self.both:
            model.train(mode)

    # ---- copies ----

    @rule()
    def deepcopy(self):
        # Forwards and hooks of instances refer to the original, whoever copies them.
        if not self.forwards and not self.hooks:
            self._compare(copy.deepcopy(self.model), copy.deepcopy(self.twin))

    @rule()
    def pickle(self):
        if self.forwards or self.hooks or any(parametrized(getattr(self.twin, name)) for name in CONVOLUTIONS):
            return
        file = io.BytesIO()
        torch.save(self.model, file)
        file.seek(0)
        self._compare(torch.load(file, weights_only=False), copy.deepcopy(self.twin))

    # ---- what has to hold ----

    @invariant()
    def compare(self):
        self._compare(*self.both)

    def _compare(self, model, twin):
        dtype = next(twin.parameters()).dtype
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(dtype)
        self.ran_in_training |= twin.training
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                got, expected = model(x.clone()), twin(x.clone())
            bound = ALLOWED[dtype] * (1 + expected.detach().abs().max().item()) * 5 ** len(self.forwards)
            off = (got - expected).abs().max().item()
            assert off <= bound, f"off by {off:.3g} of {expected.abs().max().item():.3g}, allowed {bound:.3g}"

    def teardown(self):
        self.unhook()
        if self.fusion is not None:
            if self.forwards:
                self.class_forward_again()
            self.unfuse()
        if self.steering:
            self.unsteer()
        if not self.ran_in_training:  # statistics of a batch are the same within rounding
            assert_same_state(self.model, self.twin)


TestVision = dated(VisionMachine).TestCase
TestVision.settings = profile(examples=30, steps=12)
