"""Steering: what a steered model computes, and that steering leaves no trace."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import types

import pytest
import steered_models
import torch
import torch.nn.functional as F
from steered_models import Containers, ConvNet, assert_same, count_units, snapshot
from torch import nn

import ctkernels
from ctkernels import handle_of, steer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def units(monkeypatch):
    return count_units(monkeypatch)


def images():
    return torch.randn(2, 3, 8, 8)


# -------------------------------------------------------------------------------------------------- no trace, no change


def test_remove_leaves_the_model_as_it_was():
    model, x = ConvNet(), images()
    model.relu.register_forward_hook(lambda *_: None)
    before, expected = snapshot(model), model.eval()(x)
    before = snapshot(model)
    handle = steer(model, 0.8)
    assert not torch.equal(model(x), expected)
    handle.remove()
    handle.remove()
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="beta: expected a handle in use"):
        handle.beta = 0.5


def test_steering_runs_nothing():
    model, state = ConvNet().train(), torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    steer(model, 0.8)
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_context_manager():
    model, x = ConvNet().eval(), images()
    expected = model(x)
    with steer(model, 0.8) as handle:
        assert not torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    assert "removed" in repr(handle)


def test_hooks_fire_and_types_hold():
    model, seen = ConvNet().eval(), []
    model.relu.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    removable = model.relu.register_forward_hook(lambda m, a, y: seen.append("post"))
    handle = steer(model, 0.8)
    model(images())
    assert seen == ["pre", "post"]
    assert isinstance(model.relu, nn.ReLU)
    assert isinstance(model, ConvNet)
    removable.remove()
    handle.remove()
    model(images())
    assert seen == ["pre", "post", "pre"]


def test_the_state_dict_is_the_original_one(tmp_path):
    model = ConvNet()
    original = {k: v.clone() for k, v in model.state_dict().items()}
    steer(model, 0.8)
    assert list(model.state_dict()) == list(original)
    assert model.state_dict()._metadata == ConvNet().state_dict()._metadata
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in ConvNet().named_buffers()]
    model.load_state_dict(original, strict=True)
    ConvNet().load_state_dict(model.state_dict(), strict=True)
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(ConvNet(), str(tmp_path / "model.safetensors"))


def test_prelu_keeps_its_parameter():
    model = ConvNet()
    weight = model.prelu.weight
    steer(model, 0.8)
    assert model.prelu.weight is weight
    model(images()).sum().backward()
    assert weight.grad is not None


def test_an_error_leaves_nothing_half_changed():
    class Stubborn(nn.ReLU):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("no")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.ReLU(), ConvNet(), Stubborn())
    before = snapshot(model)
    with pytest.raises(TypeError, match="no"):
        steer(model, 0.9)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 1.1}, ValueError, r"beta: expected a number in \[0, 1\], got 1.1"),
        ({"beta": 0.9, "coeff": -1}, ValueError, r"coeff: expected a number in \[0, 1\], got -1"),
        ({"beta": {"layer9.*": 0.5}}, ValueError, r"beta: expected patterns that match a site .*'layer9\.\*'"),
        ({"beta": {"relu": 2}}, ValueError, r"beta\['relu'\]: expected a number in \[0, 1\], got 2"),
        ({"beta": 0.9, "activations": "elu"}, ValueError, "activations: expected 'all' or some of relu.* got 'elu'"),
        ({"beta": 0.9, "activations": ()}, ValueError, "activations: expected at least one name"),
        ({"beta": torch.ones(2)}, ValueError, "beta: expected a number or a 0-d tensor"),
    ],
)
def test_errors_come_before_any_change(arguments, error, message):
    model = ConvNet()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        steer(model, **arguments)
    assert_same(before, snapshot(model))


def test_steering_twice_is_an_error():
    model = nn.Sequential(ConvNet())
    steer(model[0], 0.9)
    for again in (model, model[0], model[0].relu):
        with pytest.raises(ValueError, match="model: expected one that is not steered"):
            steer(again, 0.9)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        steer(F.relu, 0.9)
    with pytest.raises(ValueError, match="expected one that steer"):
        handle_of(model)


# ------------------------------------------------------------------------------------------------------------ the knobs


def test_values_by_pattern():
    model = nn.Sequential(ConvNet(), nn.Sequential(nn.GELU()), nn.SiLU())
    handle = steer(model, {"0.*": 0.9, "*:prelu": 0.8}, {"*:silu": 0.7}, activations="all")
    values = {name: (round(b, 4), round(c, 4)) for name, (b, c) in handle.values().items()}
    assert values == {
        "0.forward:relu": (0.9, 0.5),
        "0.act:leaky_relu": (0.9, 0.5),
        "0.relu": (0.9, 0.5),
        "0.prelu": (0.8, 0.5),
        "1.0": (0.5, 1.0),
        "2": (0.5, 0.7),
    }
    assert handle.beta == {"0.*": 0.9, "*:prelu": 0.8}
    handle.beta = torch.tensor(0.25)
    assert handle.beta == 0.25
    assert {b for b, _ in handle.values().values()} == {0.25}


def test_neutral_is_the_original_model():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.SiLU(), nn.ReLU()), torch.randn(3, 8)
    expected = model(x)
    handle = steer(model, 0.7, activations="all")
    assert (model(x) - expected).abs().max() > 1e-3
    handle.neutralize()
    assert torch.equal(model(x), expected)
    handle.beta, handle.coeff = {"1": 0.5, "2": 0.5, "3": 1.0}, {"1": 1.0, "2": 1.0, "3": 0.5}  # the units themselves
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


MIXED = {"0": nn.ReLU, "1": nn.SiLU, "2": nn.GELU}


@pytest.mark.parametrize("named", MIXED)
@pytest.mark.parametrize("through", ["beta", "coeff"])
def test_sites_that_no_mapping_names_keep_their_bits(named, through, units):
    model, x = nn.ModuleDict({name: act() for name, act in MIXED.items()}), torch.randn(64)
    expected = {name: act(x) for name, act in model.items()}
    handle = steer(model, {named: 0.6} if through == "beta" else {}, {named: 0.6} if through == "coeff" else 0.5, "all")
    for name, act in model.items():
        assert torch.equal(act(x), expected[name]) == (name != named or (through, named) == ("coeff", "0"))
    assert len(units) == 1
    handle.beta = 0.7
    assert not any(torch.equal(act(x), expected[name]) for name, act in model.items())
    handle.beta = {named: 0.7}
    assert sum(torch.equal(act(x), expected[name]) for name, act in model.items()) == 2
    handle.neutralize()
    assert all(torch.equal(act(x), expected[name]) for name, act in model.items())


def test_a_compiled_model_follows_which_sites_are_named():
    model, x = nn.Sequential(nn.SiLU(), nn.Linear(8, 8), nn.GELU()), torch.randn(3, 8)
    expected = model(x)
    handle = steer(model, {}, activations="all")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    for beta in (0.7, {"0": 0.7}, {"2": 0.4}):
        handle.beta = beta
        assert torch.equal(compiled(x), model(x))
        assert (compiled(x) - expected).abs().max() > 1e-3
    handle.neutralize()
    assert torch.equal(compiled(x), expected)


def test_beta_one_makes_a_relu_of_gelu():
    model, x = nn.Sequential(nn.GELU()), torch.randn(8)
    steer(model, 1.0, activations="gelu")
    assert torch.equal(model(x), F.relu(x))


def test_values_stay_float32_and_follow_the_model():
    model = ConvNet().eval()
    handle = steer(model, 0.999)
    before = handle.values()
    model.bfloat16()
    assert model(images().bfloat16()).dtype == torch.bfloat16
    assert handle.values() == before
    model.double()
    model(images().double())
    assert handle.values() == before
    model.to("meta")
    assert model(images().double().to("meta")).device.type == "meta"
    model.to_empty(device="cpu")
    assert handle.values() == before


def test_a_model_built_on_meta():
    with torch.device("meta"):
        model = ConvNet()
        handle = steer(model, 0.7)
    model.to_empty(device="cpu")
    assert all(b == pytest.approx(0.7) for b, _ in handle.values().values())


def test_integer_input_goes_to_the_original_function():
    model, x = steered_models.TorchRelu(), torch.arange(-2, 3)
    steer(model, 0.7)
    assert torch.equal(model(x), torch.relu(x))


# ------------------------------------------------------------------------------------------------------------- in-place


class SkipAfterInplace(nn.Module):
    """The skip connection sees what the in-place activation made of its tensor, as in a pix2pix U-Net."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(4, 4)
        self.relu = nn.LeakyReLU(0.2, inplace=True)
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        x = self.down(x)
        return torch.cat([x, self.up(self.relu(x))], 1)


@pytest.mark.parametrize("grad", [False, True])
def test_inplace_changes_its_input_with_and_without_gradient(grad):
    model, x = SkipAfterInplace(), torch.randn(3, 4)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        steer(model, 1.0)
        assert torch.equal(model(x), expected)


def test_gradients_at_beta_one_are_those_of_the_model():
    model, x = ConvNet().eval(), images().requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    steer(model, 1.0)
    found = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


def test_checkpointed_recomputation_is_steered(units):
    from torch.utils.checkpoint import checkpoint

    model, x = ConvNet().eval(), images().requires_grad_()
    steer(model, 0.7)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    count = len(units)
    (found,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(found, expected)
    assert len(units) == 3 * count


# --------------------------------------------------------------------------------------------- compile, copy and pickle


@pytest.mark.parametrize("cls", [ConvNet, Containers, steered_models.Helper, steered_models.Nested])
def test_compiles_once_for_every_value(cls):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = cls().eval(), CompileCounter()
    x = images() if cls is ConvNet else torch.randn(3, 4)
    handle = steer(model, 0.9)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for beta in (0.9, 0.6, 1.0):
            handle.beta = beta
            assert torch.equal(compiled(x.clone()), model(x.clone()))
        handle.coeff = 0.9
        handle.beta = {"*": 0.5}
        assert torch.equal(compiled(x.clone()), model(x.clone()))
        assert counter.frame_count == 1
        handle.remove()
        assert torch.equal(compiled(x.clone()), model(x.clone()))
        assert counter.frame_count == 2


def test_a_compiled_model_can_be_steered():
    torch._dynamo.reset()
    model, x = ConvNet().eval(), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)
        with steer(compiled, 0.7) as handle:
            assert len(handle.sites) == 4
            assert not torch.equal(compiled(x), expected)
            assert torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x), expected)


def test_export():
    model, x = ConvNet().eval(), images()
    steer(model, 0.7)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_says_what_to_do_instead():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.randn(3, 2)
    handle = steer(model, 0.9)
    with pytest.raises(TypeError, match=r"torch.jit.script: expected a model that is not steered, got a steered ReLU"):
        torch.jit.script(model)
    handle.remove()
    assert torch.equal(torch.jit.script(model)(x), model(x))


def test_a_deep_copy_has_its_own_handle():
    model, x = ConvNet().eval(), images()
    original = type(model.relu)
    plain = model(x)
    handle = steer(model, 0.7)
    twin = copy.deepcopy(model)
    expected = model(x)
    handle_of(twin).beta = 1.0
    assert torch.equal(twin(x), plain)
    assert torch.equal(model(x), expected)
    assert handle.beta == 0.7
    handle_of(twin).remove()
    assert type(twin.relu) is original
    assert type(twin) is ConvNet
    assert twin.act is F.leaky_relu
    handle.remove()
    assert torch.equal(model(x), plain)


def test_pickle_in_a_fresh_process(tmp_path):
    model, x = ConvNet().eval(), images()
    plain = model(x)
    steer(model, {"relu": 0.7, "*:leaky_relu": 0.8})
    torch.save((model, x, model(x), plain), tmp_path / "model.pt")
    code = f"""
import sys; sys.path[:0] = {[*sys.path]!r}
import torch
model, x, steered, plain = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import ctkernels
handle = ctkernels.handle_of(model)
torch.testing.assert_close(model(x), steered)
assert handle.beta == {{"relu": 0.7, "*:leaky_relu": 0.8}} and len(handle.sites) == 4
handle.remove()
torch.testing.assert_close(model(x), plain)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_pickles_at_every_protocol():
    import pickle

    model, x = ConvNet().eval(), images()
    steer(model, 0.7)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert torch.equal(pickle.loads(pickle.dumps(model, protocol))(x), model(x))


def test_a_graph_traced_from_a_steered_model_stays_steered():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    steer(model, 0.7)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))


# -------------------------------------------------------------------------------------------------- torch's own modules


@pytest.mark.parametrize("activation", ["relu", F.relu, nn.ReLU()], ids=["name", "function", "module"])
def test_the_fast_path_of_a_transformer_layer_is_left(activation, units):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 3, 8)
    before = snapshot(model)
    with torch.no_grad():
        expected = model(x)
        handle = steer(model, 1.0)
        torch.testing.assert_close(model(x), expected)
        assert len(units) == 2
        handle.beta = 0.5
        assert (model(x) - expected).abs().max() > 1e-3
        handle.remove()
        assert_same(before, snapshot(model))
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("sites", ["*", "layers.1.*"], ids=["every layer", "the second layer"])
def test_an_encoder_with_a_padding_mask_in_inference(sites):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    pad = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    before = snapshot(model)
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=pad)
        handle = steer(model, {})
        assert torch.equal(model(x, src_key_padding_mask=pad), plain)  # nobody is named: the fused path, and its bits
        handle.beta = {sites: 0.5}
        steered = model(x, src_key_padding_mask=pad)
    with torch.enable_grad():  # torch's ordinary path
        expected = model(x, src_key_padding_mask=pad)
    torch.testing.assert_close(steered[~pad], expected.detach()[~pad])
    assert (steered - plain)[~pad].abs().max() > 1e-3
    handle.remove()
    assert_same(before, snapshot(model))
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=pad), plain)


def test_a_transformer_layer_that_is_not_steered_keeps_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    handle = steer(model, 0.9)
    assert layer.activation_relu_or_gelu == 2
    assert [skipped.name for skipped in handle.skipped] == ["0.activation"]


def test_integers_go_through_a_module_as_before():
    model, x = nn.Sequential(nn.ReLU()), torch.arange(-3, 3)
    steer(model, 0.5)
    assert torch.equal(model(x), x.clamp(min=0))
    assert not torch.equal(model(x.float()), x.float().clamp(min=0))


def test_parametrized_module():
    model, x = nn.Sequential(nn.PReLU(3)), torch.randn(2, 3)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    expected = model(x)
    handle = steer(model, 1.0)
    assert [site.name for site in handle.sites] == ["0"]
    torch.testing.assert_close(model(x), expected)
    handle.remove()
    assert torch.equal(model(x), expected)


def test_remove_after_the_class_was_changed_by_others_says_so():
    model = nn.Sequential(nn.ReLU())
    handle = steer(model, 0.9)
    steered = type(model[0])
    model[0].__class__ = type("Sharded", (steered,), {})
    with pytest.raises(RuntimeError, match="first undo what was done to the model"):
        handle.remove()
    model[0].__class__ = steered
    handle.remove()
    assert type(model[0]) is nn.ReLU


def test_repr_is_a_summary():
    text = repr(steer(nn.Sequential(nn.ReLU(), nn.GELU(), steered_models.Attribute()), 0.9))
    assert text.startswith("Steering of Sequential: beta=0.9, coeff=0.5\n  2 sites: 1 modules, 1 functional calls")
    assert "1 skipped" in text
    model = ConvNet()
    steer(model, 0.9)
    assert "ReLU(inplace=True, beta=0.9, coeff=0.5)" in repr(model)
    assert isinstance(model.forward, types.MethodType)
    assert io.StringIO(text)


def test_old_names_work_and_warn():
    with pytest.warns(DeprecationWarning, match=r"ctkernels\.steering\.Miss is now ctkernels\.steering\.Unsteered"):
        assert ctkernels.steering.Miss is ctkernels.steering.Unsteered
    with pytest.warns(DeprecationWarning, match=r"ctkernels\.fusion\.Site is now ctkernels\.fusion\.FusedSite"):
        assert ctkernels.fusion.Site is ctkernels.fusion.FusedSite
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        ctkernels.steering.other  # noqa: B018
