"""A curvature adapter of its own for every sample of a batch, in one pass."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import ctkernels

pytest.importorskip("peft")
from curvature_networks import ACTIVATIONS, image, make_net, shaken, tuned

from ctkernels.adapters import CurvatureConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

NAMES = ["default", "b", "__base__", "b"]


def mixed(net=None, second=None, **values):
    model = tuned(net, **values)
    model.add_adapter("b", CurvatureConfig(**(values if second is None else second)))
    return shaken(model).eval()


def one_by_one(model, x):
    """Every sample by itself, with its adapter active."""
    rows = []
    for row, name in zip(x, NAMES):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]))
        else:
            model.set_adapter(name)
            rows.append(model(row[None]))
    model.set_adapter("default")
    return torch.cat(rows)


CONFIGS = {
    "channel": ({}, None),
    "layer": ({"granularity": "layer"}, None),
    "shared": ({"granularity": "shared"}, None),
    "channel beside layer": ({}, {"granularity": "layer"}),
    "other sites": ({"target_modules": ["act"]}, {"exclude_modules": ["act"]}),
    "the head, too": ({"modules_to_save": ["fc"]}, None),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_sample_gets_its_adapter(config):
    values, second = CONFIGS[config]
    model, x = mixed(None, second, **values), image()
    expected = one_by_one(model, x)
    assert min((expected[i] - expected[j]).abs().max() for i, j in ((0, 1), (1, 2), (0, 2))) > 1e-3
    torch.testing.assert_close(model(x, adapter_names=NAMES), expected)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x, adapter_names=["__base__"] * 4), base)
    model.set_adapter("b")  # what is active has no say
    torch.testing.assert_close(model(x, adapter_names=NAMES), expected)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_family(act):
    model, x = mixed(make_net(act=ACTIVATIONS[act])), image()
    torch.testing.assert_close(model(x, adapter_names=NAMES), one_by_one(model, x))


def test_one_pass_for_each_activation(monkeypatch):
    model, x = mixed(), image()
    calls = []
    ctu = ctkernels.functional.ctu
    monkeypatch.setattr(ctkernels.functional, "ctu", lambda *a, **k: calls.append(a[0].shape[0]) or ctu(*a, **k))
    model(x, adapter_names=NAMES)
    assert calls == [4] * 4


def test_gradients_are_those_of_every_sample_by_itself():
    model, x = mixed().double(), image().double()
    model.set_adapter("default")
    parameters = [p for n, p in model.named_parameters() if "curvature_" in n]
    for parameter in parameters:
        parameter.requires_grad_()
    weights = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((model(x, adapter_names=NAMES) * weights).sum(), parameters)
    whole = torch.zeros((), dtype=torch.float64)
    for row, weight, name in zip(x, weights, NAMES):
        if name != "__base__":
            model.set_adapter(name)
            for parameter in parameters:
                parameter.requires_grad_()
            whole = whole + (model(row[None]) * weight).sum()
    for value, expected in zip(found, torch.autograd.grad(whole, parameters)):
        torch.testing.assert_close(value, expected)


def test_compiled():
    model, x = mixed(), image()
    expected = model(x, adapter_names=NAMES)
    inner = model.get_base_model()
    plain = model(x)
    inner.compile(backend="eager")
    assert torch.equal(model(x), plain)
    assert torch.equal(model(x, adapter_names=NAMES), expected)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("values", [{}, {"modules_to_save": ["fc"]}], ids=["units", "and a head"])
def test_another_thread_is_not_concerned(values):
    model, x = mixed(None, values, **values), image()
    plain, expected = model(x), model(x, adapter_names=NAMES)
    inside, done, seen = threading.Event(), threading.Event(), []

    def other():
        inside.wait(30)
        seen.append(model(x))
        done.set()

    def wait(*_):
        if not inside.is_set():
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    handle = model.get_base_model().block.register_forward_pre_hook(wait)
    assert torch.equal(model(x, adapter_names=NAMES), expected)
    thread.join()
    handle.remove()
    assert torch.equal(seen[0], plain)


class Tokens(nn.Module):
    """The samples as (batch, tokens), or folded into one dimension with the tokens, or behind them."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.up, self.act, self.down = layout, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x):
        shape = x.shape
        if self.layout == "folded":
            x = x.flatten(0, 1)
        elif self.layout == "behind":
            x = x.transpose(0, 1)
        x = self.down(self.act(self.up(x)))
        return x.transpose(0, 1) if self.layout == "behind" else x.reshape(*shape[:2], 2)


@pytest.mark.parametrize("layout", ["plain", "folded", "behind"])
def test_where_the_samples_are_is_found_out_and_not_guessed(layout):
    torch.manual_seed(0)
    model, x = mixed(Tokens(layout).eval(), input_shape=[4, 6]), torch.randn(4, 4, 6)  # as many tokens as samples
    if layout == "behind":
        with pytest.raises(ValueError, match=r"act: adapter_names gives 4 samples .* does not grow with the batch"):
            model(x, adapter_names=NAMES)
    else:
        torch.testing.assert_close(model(x, adapter_names=NAMES), one_by_one(model, x))


def test_a_model_that_cannot_be_called_to_find_out_needs_as_many_rows_as_samples():
    torch.manual_seed(0)
    net = Tokens("folded").eval()
    layout = {"act": [-1, 8]}
    model = mixed(net, input_shape=[6], layout=layout)  # the shape is wrong: the search fails
    with pytest.raises(ValueError, match=r"dimension 0 .* must be those samples, got shape \(16, 8\)"):
        model(torch.randn(4, 4, 6), adapter_names=NAMES)


def test_generate_with_beams():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    net = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    model = mixed(net, task_type="CAUSAL_LM")
    ids = torch.randint(3, 60, (2, 5))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    rows = []
    for row, name in zip(ids, ["default", "b"]):
        model.set_adapter(name)
        rows.append(model.generate(input_ids=row[None], **options))
    assert not torch.equal(rows[0][:, 5:], rows[1][:, 5:])
    both = model.generate(input_ids=ids, adapter_names=["default", "b"], **options)
    assert torch.equal(both, torch.cat(rows))


def test_a_fused_block_gives_every_sample_its_adapter():
    model, x = mixed(), image()
    expected = model(x, adapter_names=NAMES)
    ctkernels.fuse(model.get_base_model())
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=NAMES), expected.detach())


def test_errors_come_before_anything_runs():
    model, x = mixed(), image()
    for names, message in (
        (["default", "b"], "Length of `adapter_names` should be the same as the number of inputs, but got 2 and 4"),
        (["default"] * 8, "Length of `adapter_names` should be the same as the number of inputs, but got 8 and 4"),
        (["default", "c", "b", "b"], r"must be among \['__base__', 'b', 'default'\], got \['c'\]"),
        ("default", "must be a list of names"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, adapter_names=names)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model.train()(x, adapter_names=NAMES)
    model.eval()
    with pytest.warns(UserWarning, match="cannot be folded"):
        model.merge_adapter(["b"])
    with pytest.raises(
        ValueError, match=r"act: Cannot pass `adapter_names` when there are merged adapters, .*Merged: \['b'\]"
    ):
        model(x, adapter_names=NAMES)


def test_adapters_with_channels_in_two_places_cannot_share_a_batch():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = tuned(net, layout={"1": [1, 6]})
    model.add_adapter("b", CurvatureConfig(layout={"1": [2, 6]}))
    with pytest.raises(ValueError, match="1: adapters in one batch must have their channels in one place"):
        model.eval()(torch.randn(2, 6, 6), adapter_names=["default", "b"])


def test_rows_of_knobs_are_those_of_the_samples():
    ctu = ctkernels.functional.ctu
    generator = torch.Generator().manual_seed(0)
    beta, coeff = torch.rand(3, 5, generator=generator), torch.rand(3, 5, generator=generator)
    index = torch.tensor([2, 0, 2, 1])
    for shape, dim in (((4, 5), 1), ((4, 3, 5), -1), ((4, 5, 2, 3), 1)):
        x = torch.randn(shape, generator=generator)
        rows = [ctu(x[i : i + 1], beta[k], coeff[k], channel_dim=dim) for i, k in enumerate(index)]
        torch.testing.assert_close(ctu(x, beta, coeff, channel_dim=dim, index=index), torch.cat(rows))
    x = torch.randn(4, 5, generator=generator)
    ones = ctu(x, beta[:, :1], coeff[:, :1], index=index)
    torch.testing.assert_close(
        ones, torch.cat([ctu(x[i : i + 1], beta[k, 0], coeff[k, 0]) for i, k in enumerate(index)])
    )
    for values, error, message in (
        ({"index": index[:3]}, ValueError, r"one entry per sample, shape \(4,\), got \(3,\)"),
        ({"index": index.float()}, TypeError, "index must be an int64 or int32 tensor"),
        ({"index": index, "beta": 0.5}, ValueError, r"with index, beta must be a tensor of shape \(rows, channels\)"),
        ({"index": index, "coeff": coeff[:, :4]}, ValueError, "coeff"),
        ({"index": index, "channel_dim": 0}, ValueError, "channel_dim must not be 0"),
    ):
        with pytest.raises(error, match=message):
            ctu(x, **{"beta": beta, "coeff": coeff, "channel_dim": 1, **values})
