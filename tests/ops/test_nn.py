"""The layers."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ctkernels
from ctkernels.nn import CTU, Knobs, TrainableCTU

PLAIN = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "relu6": F.relu6,
}


@pytest.mark.parametrize("activation", PLAIN)
def test_ctu_at_beta_one_is_the_plain_activation(activation):
    x = torch.randn(64, dtype=torch.float32) * 4
    assert torch.equal(CTU(activation=activation, negative_slope=0.2)(x), PLAIN[activation](x))


@pytest.mark.parametrize(
    ("activation", "plain"), [("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", partial(F.gelu, approximate="tanh"))]
)
def test_ctu_at_its_neutral_point_is_the_plain_activation(activation, plain):
    x = torch.randn(64)
    torch.testing.assert_close(CTU(0.5, 1.0, activation=activation)(x), plain(x), rtol=1e-6, atol=1e-6)


def test_ctu_is_the_function():
    x, act = torch.randn(2, 3, 4), CTU(0.9, 0.3)
    assert torch.equal(act(x), ctkernels.functional.ctu(x, torch.tensor(0.9), torch.tensor(0.3)))


def test_setting_beta_keeps_the_tensor():
    act = CTU(0.9)
    tensor = act.beta
    act.beta = 0.5
    act.coeff = torch.tensor(0.25)
    assert act.beta is tensor
    assert (act.beta.item(), act.coeff.item()) == (0.5, 0.25)


def test_prelu_takes_a_parameter():
    slope = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
    act, x = CTU(activation="prelu", negative_slope=slope), torch.randn(2, 3, 4)
    assert dict(act.named_parameters()) == {"negative_slope": slope}
    assert torch.equal(act(x), F.prelu(x, slope))
    act(x).sum().backward()
    assert slope.grad is not None


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_values_are_never_cast(cast):
    net = cast(nn.Sequential(CTU(0.999), TrainableCTU(4, beta=0.999)))
    assert net[0].beta.dtype == net[1].raw_beta.dtype == torch.float32
    assert net[0].beta.item() == pytest.approx(0.999, abs=1e-7)
    assert net[1].beta[0].item() == pytest.approx(0.999, abs=1e-6)


def test_gradients_of_raw_parameters_survive_a_cast():
    act = TrainableCTU(4)
    act(torch.randn(3, 4)).sum().backward()
    before = act.raw_beta.grad.clone()
    act.bfloat16()
    assert act.raw_beta.grad.dtype == torch.float32
    assert torch.equal(act.raw_beta.grad, before)


def test_values_are_not_lost_to_the_meta_device():
    with torch.device("meta"):
        act = CTU(0.7)
    act.to("meta")
    act.to_empty(device="cpu")
    assert act.beta.item() == pytest.approx(0.7)


def test_state_dict_round_trip():
    other = CTU(0.1)
    other.load_state_dict(CTU(0.7, 0.2).state_dict())
    assert (other.beta.item(), other.coeff.item()) == (pytest.approx(0.7), pytest.approx(0.2))
    assert list(other.state_dict()) == ["knobs.beta", "knobs.coeff"]
    assert not CTU(persistent=False).state_dict()


def test_shared_knobs_have_one_entry_in_the_state_dict():
    knobs = Knobs(0.9)
    net = nn.ModuleDict({"knobs": knobs, "a": CTU(knobs=knobs), "b": CTU(knobs=knobs)})
    assert list(net.state_dict()) == ["knobs.beta", "knobs.coeff"]
    knobs.beta = 0.6
    assert net["a"].beta is net["b"].beta
    assert net["a"].beta.item() == pytest.approx(0.6)
    twin = copy.deepcopy(net)
    twin["knobs"].beta = 0.2
    assert twin["a"].beta.item() == pytest.approx(0.2)
    assert net["a"].beta.item() == pytest.approx(0.6)
    net.bfloat16()
    assert net["a"].beta is net["knobs"].beta
    with pytest.raises(ValueError, match="knobs: expected to be given without beta"):
        CTU(0.5, knobs=knobs)


def test_shared_knobs_in_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    knobs = Knobs(0.9)
    net = nn.ModuleDict({"knobs": knobs, "a": CTU(knobs=knobs), "b": CTU(knobs=knobs)})
    safetensors.save_file(net.state_dict(), tmp_path / "file.safetensors")
    safetensors.save_model(net, str(tmp_path / "model.safetensors"))
    knobs.beta = 0.1
    safetensors.load_model(net, str(tmp_path / "model.safetensors"))
    assert net["b"].beta.item() == pytest.approx(0.9)


def test_inplace_only_where_no_gradient_is_needed():
    act = CTU(0.9, inplace=True)
    x = torch.randn(8)
    expected = CTU(0.9)(x)
    y = act(x)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, expected)
    z = torch.randn(8, requires_grad=True)
    kept = z.detach().clone()
    act(z).sum().backward()
    assert torch.equal(z, kept)


def test_trainable_initial_values_and_names():
    act = TrainableCTU(5)
    assert [name for name, _ in act.named_parameters()] == ["raw_beta", "raw_coeff"]
    torch.testing.assert_close(act.beta, torch.full((5,), 0.8))
    torch.testing.assert_close(act.coeff, torch.full((5,), 0.5))
    with pytest.raises(AttributeError):
        act.beta = 0.5


@pytest.mark.parametrize(("dim", "shape"), [(1, (2, 3, 4, 5)), (-1, (2, 4, 3)), (1, (2, 3, 7)), (-1, (3,))])
def test_trainable_follows_its_channel_dimension(dim, shape):
    act = TrainableCTU(3, dim)
    with torch.no_grad():
        act.raw_beta.copy_(torch.tensor([-1.0, 0.5, 3.0]))
    x = torch.randn(shape)
    y = act(x)
    for channel in range(3):
        one = ctkernels.functional.ctu(x.select(dim, channel), act.beta[channel], act.coeff[channel])
        torch.testing.assert_close(y.select(dim, channel), one)
    y.sum().backward()
    assert act.raw_beta.grad.shape == act.raw_coeff.grad.shape == (3,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CTU(1.5), r"beta: expected a number in \[0, 1\], got 1.5"),
        (lambda: CTU(float("nan")), "beta: expected a number in"),
        (lambda: CTU("0.5"), "beta: expected a number or a 0-d tensor in"),
        (lambda: CTU(True), "beta: expected a number or a 0-d tensor in"),
        (lambda: CTU(0.5, torch.ones(2)), r"coeff: expected a number or a 0-d tensor, got a tensor of shape \(2,\)"),
        (lambda: CTU(torch.tensor(0.5, requires_grad=True)), "TrainableCTU learns its values"),
        (lambda: CTU(activation="elu"), "activation: expected one of relu, .* got 'elu'"),
        (lambda: TrainableCTU(0), "num_channels: expected a positive integer, got 0"),
        (lambda: TrainableCTU(3, beta=1.0), "beta: expected a number strictly between 0 and 1"),
        (lambda: TrainableCTU(3)(torch.randn(2, 4)), r"x: expected 3 channels in dimension 1, got shape \(2, 4\)"),
        (lambda: TrainableCTU(3)(torch.randn(3)), "x: expected 3 channels in dimension 1"),
        (lambda: setattr(CTU(), "beta", -0.1), "beta: expected a number in"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_reprs():
    assert "beta=0.9, coeff=0.5" in repr(CTU(0.9))
    assert "activation='leaky_relu', negative_slope=0.2" in repr(CTU(activation="leaky_relu", negative_slope=0.2))
    assert repr(TrainableCTU(3, -1)) == "TrainableCTU(3, channel_dim=-1)"


def test_compiled_once_for_every_value():
    from torch._dynamo.testing import CompileCounter

    counter, knobs = CompileCounter(), Knobs(0.9)
    net = nn.Sequential(CTU(knobs=knobs), TrainableCTU(4), CTU(0.8, inplace=True))
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x = torch.randn(2, 4)
    for beta in (0.9, 0.6, 1.0):
        knobs.beta = net[2].beta = beta
        assert torch.equal(compiled(x.clone()), net(x.clone()))
    assert counter.frame_count == 1


def test_pickle():
    buffer = io.BytesIO()
    torch.save(nn.Sequential(CTU(0.7), TrainableCTU(4)), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)[0].beta.item() == pytest.approx(0.7)
