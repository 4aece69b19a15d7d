"""Fusion: the same network within rounding, in fewer passes, and back again bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from fused_models import (
    BLOCKS,
    Overwritten,
    Residual,
    Strange,
    assert_networks_agree,
    compare,
    observe,
    prepare,
    rounded_anew,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from steered_models import assert_same, snapshot
from torch import nn

import ctkernels

MODES = ("frozen", "eval", "train")


def steered(blocks=("basic", "projected"), beta=0.8, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = prepare(Residual(blocks, **kwargs), seed).eval()
    ctkernels.steer(model, beta)
    return model


def image(batch=2, size=6, dtype=torch.float32):
    return torch.randn(batch, 3, size, size, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------- equality


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    blocks=st.lists(st.sampled_from(list(BLOCKS)), max_size=3),
    beta=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    mode=st.sampled_from(MODES),
    channels=st.integers(1, 5),
    inplace=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 3),
)
def test_small_networks(blocks, beta, mode, channels, inplace, channels_last, seed):
    model = steered(blocks, beta, seed, channels=channels, inplace=inplace)
    x = image(3)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    before = snapshot(model)
    fused = compare(model, x, ctkernels.fuse, mode)
    fused.remove()
    if mode != "train":
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block(block, mode):
    model = steered([block])
    handle = compare(model, image(3), ctkernels.fuse, mode)
    expected = {
        "basic": ["norm1 -> relu", "norm2 -> add -> relu"],
        "residual first": ["norm1 -> forward:relu", "norm2 -> add -> forward#2:relu"],
        "two branches": ["norm2 -> add -> relu", "norm1"],
        "pre-activation": ["norm1 -> forward:relu", "norm2 -> relu"],
        "no norm": ["conv1 -> relu", "conv2 -> add -> relu"],
        "projected": ["norm2 -> add -> relu", "skip.1", "norm1 -> body.2"],
        "overwritten": ["conv1 -> norm1", "conv2 -> norm2"],
        "strange": [],
    }[block]
    sites = [str(site) for site in handle.sites if "blocks.0." in str(site)]
    found = [site.replace("blocks.0.", "") for site in sites]
    assert len(found) == len(expected)
    for site in expected:
        assert any(name.endswith(site) for name in found), (site, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = steered().to(dtype).requires_grad_(False)
    plain, exact, x = copy.deepcopy(model), copy.deepcopy(model).double(), image(4, 8, dtype)
    ctkernels.fuse(model)
    with torch.no_grad():
        truth = exact(x.double())
        ours, theirs = ((m(x).double() - truth).abs().max() for m in (model, plain))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * truth.abs().max()


def test_learned_units():
    model = steered().requires_grad_(False)
    for block in model.blocks:
        block.relu = ctkernels.nn.TrainableCTU(4)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    handle = ctkernels.fuse(model)
    assert sum(site.unit.endswith("relu") for site in handle.sites) == 3
    x = image(3)
    expected, exact = rounded_anew(plain, x), observe(exact, x.double())
    fused = observe(model, x)
    assert {"grad blocks.0.relu.raw_beta", "grad blocks.1.relu.raw_coeff"} <= set(fused)
    assert_networks_agree(fused, expected, exact)


def test_second_order_and_func():
    model = steered(("basic", "pre-activation", "two branches"), inplace=False).double().requires_grad_(False)
    plain, x = copy.deepcopy(model), image(2, 4, torch.float64)
    ctkernels.fuse(model)

    def penalty(net):
        given = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(given).square().sum(), given, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), given)[0]

    torch.testing.assert_close(penalty(model), penalty(plain), rtol=1e-9, atol=1e-12)
    for f in (torch.func.vmap, torch.func.jacrev):
        ours, theirs = (
            f(lambda v, net=net: net(v[None])[0])(x) if f is torch.func.vmap else f(net)(x) for net in (model, plain)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_autocast_and_inference_mode():
    model, x = steered().requires_grad_(False), image(4)
    plain = copy.deepcopy(model)
    ctkernels.fuse(model)
    with torch.inference_mode():
        inferred = model(x)
    assert torch.equal(model(x), inferred)  # what inference left behind does not stand in the way of training
    observe(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), plain(x)
    assert ours.dtype == theirs.dtype
    truth = plain(x)
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + torch.finfo(torch.bfloat16).eps


def test_plain_model_is_folded():
    model = prepare(Residual(["basic", "projected"])).eval()
    x, before = image(), snapshot(model)
    plain = copy.deepcopy(model)
    handle = compare(model, x, ctkernels.fuse, "frozen")
    assert all(not site.unit for site in handle.sites)
    assert len(handle.sites) == 6
    handle.remove()
    assert torch.equal(model(x), plain(x))
    assert_same(before, snapshot(model))


# ----------------------------------------------------------------------------------------------------------- the handle


def test_remove_gives_back_everything():
    model, x = steered(), image()
    before, expected = snapshot(model), model(x)
    with ctkernels.fuse(model) as handle:
        assert list(model.state_dict()) == list(before[1])
        assert "sites" in repr(handle)
        model(x)
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), expected)
    handle.remove()
    assert "removed" in repr(handle)


def test_steering_keeps_working():
    model, x = steered(), image()
    steering = ctkernels.handle_of(model)
    handle = ctkernels.fuse(model)
    plain = copy.deepcopy(model)
    vars(plain)["_ctu_fusion"].remove()
    for beta in (0.5, 1.0, 0.9):
        steering.beta = beta
        ctkernels.handle_of(plain).beta = beta
        torch.testing.assert_close(model(x), plain(x))
    with pytest.raises(RuntimeError, match="fused"):
        steering.remove()
    handle.remove()
    steering.remove()
    assert type(model.stem[2]) is nn.ReLU


def test_weights_may_change():
    model, x = steered().requires_grad_(False), image()
    plain = copy.deepcopy(model)
    ctkernels.fuse(model)
    model(x)
    state = {k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    for net in (model, plain):
        net.load_state_dict(state)
    torch.testing.assert_close(model(x), plain(x))
    for net in (model, plain):
        net.train()(x)  # running statistics move
        net.eval()
    torch.testing.assert_close(model(x), plain(x))
    for net in (model, plain):
        net.stem[0].weight.data = torch.ones_like(net.stem[0].weight)
        net.blocks[0].conv1 = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    plain.blocks[0].conv1.load_state_dict(model.blocks[0].conv1.state_dict())
    torch.testing.assert_close(model(x), plain(x))
    for net in (model, plain):
        net.double()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x.double()), plain(x.double()))


def test_hooks_added_later_see_what_they_saw():
    model, x, seen = steered(), image(), {}
    ctkernels.fuse(model)
    expected = model(x)
    for name in ("blocks.0.norm1", "blocks.1.skip", "blocks.1.relu"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: seen.update({name: (i[0], o.clone())})
        )
    torch.testing.assert_close(model(x), expected)
    assert set(seen) == {"blocks.0.norm1", "blocks.1.skip", "blocks.1.relu"}
    given, made = seen["blocks.0.norm1"]
    torch.testing.assert_close(made, model.blocks[0].norm1(given))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_on_their_own(copied):
    model, x = steered().requires_grad_(False), image()
    ctkernels.fuse(model)
    expected = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), expected)
    ctkernels.handle_of(twin).beta = 0.5
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)
    twin._ctu_fusion.remove()
    assert "forward" not in vars(twin.blocks[0])
    assert "forward" in vars(model.blocks[0])


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_graph_breaks(mode):
    torch._dynamo.reset()
    model = steered(("basic", "projected")).train(mode == "train").requires_grad_(mode != "frozen")
    x, plain = image(3), copy.deepcopy(model)
    ctkernels.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = observe(compiled, x), observe(plain, x)
    for name, value in theirs.items():
        found = ours[name] if name in ours else ours[name.replace(" ", " _orig_mod.", 1)]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


def test_compiled_code_follows_the_knobs():
    torch._dynamo.reset()
    model, x = steered(), image()
    steering = ctkernels.handle_of(model)
    ctkernels.fuse(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        compiled(x)
        compilations = counter.frame_count
        for beta in (0.5, 0.9):
            steering.beta = beta
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == compilations


# ----------------------------------------------------------------------------------------------------------- left alone


def test_what_is_left_alone_is_named():
    model = steered(("strange", "overwritten"))
    handle = ctkernels.fuse(model)
    assert "blocks.0" in handle.left
    assert isinstance(model.blocks[0], Strange)
    assert isinstance(model.blocks[1], Overwritten)
    assert "forward" not in vars(model.blocks[0])
    assert "blocks.0 was left alone" in repr(handle)


class NoGrad(nn.Sequential):
    @torch.no_grad()
    def forward(self, input):
        return super().forward(input)


class Keeps(nn.Sequential):
    def forward(self, input):
        self.last = input
        return super().forward(input)


class Asks(nn.Sequential):
    def forward(self, input):
        return super().forward(input) if isinstance(self[0](input), torch.Tensor) else input


class Chooses(nn.Sequential):
    def forward(self, input, double=False):
        return super().forward(2 * input if double else input)


class Asserts(nn.Sequential):
    def forward(self, input):
        assert input.dim() in (3, 4)
        assert input.shape[0] > 0
        return super().forward(input)


@pytest.mark.parametrize("cls", [NoGrad, Keeps, Asks, Chooses, Asserts])
def test_doubtful_modules_are_left_alone(cls):
    torch.manual_seed(0)
    model = nn.Sequential(cls(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    prepare(model).eval()
    expected = model(image())
    before = snapshot(model)
    handle = ctkernels.fuse(model)
    assert list(handle.left) == ["0"]
    assert [str(site) for site in handle.sites] == ["1 -> 2"]
    handle.remove()
    assert_same(before, snapshot(model))
    assert expected.shape == (2, 4, 6, 6)


def test_types_of_arguments_and_attributes():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv, self.scale = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), 1.0

        def forward(self, x):
            x = torch.cat([x] if isinstance(x, torch.Tensor) else x, 1)
            return self.conv(F.relu(self.norm(x))) * self.scale

    model = prepare(nn.ModuleList([Layer(), Layer()])).eval()
    layer, x = model[0], torch.randn(2, 4, 3, 3)
    ctkernels.steer(model, 0.7)
    plain = copy.deepcopy(layer)
    ctkernels.fuse(model)
    for argument in (x, [x[:, :1], x[:, 1:]]):
        torch.testing.assert_close(layer(argument), plain(argument))
    layer.scale = plain.scale = 3.0
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer(x=x), plain(x))


def test_bad_input():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        ctkernels.fuse(3)
    with pytest.raises(ValueError, match="expected Linear to have"):
        ctkernels.fuse(nn.Linear(2, 2))
    model = steered()
    ctkernels.fuse(model)
    with pytest.raises(ValueError, match="expected one that is not fused"):
        ctkernels.fuse(model)
    plain = prepare(Residual(["basic"])).eval()
    ctkernels.fuse(plain)
    with pytest.raises(ValueError, match="expected one that is not fused"):
        ctkernels.steer(plain, 0.9)


def test_remove_notices_a_changed_model():
    model = steered()
    handle = ctkernels.fuse(model)
    program = vars(model.stem)["forward"]
    vars(model.stem)["forward"] = lambda x: x
    with pytest.raises(RuntimeError, match="expected every module to have the forward"):
        handle.remove()
    assert "forward" in vars(model.blocks[0])
    vars(model.stem)["forward"] = program
    handle.remove()
