"""Trainable Curvature Tuning as a PEFT method: training, switching, merging, taking out."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctkernels

pytest.importorskip("peft")
import peft
from curvature_networks import count_of, image, make_net, merged, reached, shaken, tuned

from ctkernels.adapters import CurvatureConfig, CurvatureLayer, parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


# ------------------------------------------------------------------------------------------------------------- training


def test_training_moves_only_the_adapter_and_the_head_and_reduces_the_loss():
    net = make_net()
    frozen = {name: value.clone() for name, value in net.named_parameters()}
    model = tuned(net, modules_to_save=["fc"]).train()
    groups = parameter_groups(model)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("curvature", 0.1, 0.0),
        ("rest", 1e-3, 0.0),
    ]
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
    target = torch.arange(12) % 3
    x = image(12) * (1 + target.view(-1, 1, 1, 1))
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, value in net.named_parameters():
        if "ctu" not in name and not name.startswith("fc."):
            assert torch.equal(value, frozen[name])


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, lr=1.0), lambda p: torch.optim.Adam(p, lr=0.1)])
def test_a_few_steps_change_every_parameter_of_the_adapter_and_no_other_and_disabling_gives_the_original(optimizer):
    net = make_net()
    plain, x = net(image()), image()
    model = tuned(net)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    started = model(x)
    steps = optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        steps.zero_grad()
        model(x).square().sum().backward()
        steps.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("curvature_" not in name)
    assert (model(x) - started).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(model(x), plain)


def test_loops_over_modules_that_look_for_weights():
    net = make_net()
    model = shaken(tuned(net))
    x = image()
    expected = model(x)
    for module in model.modules():
        if isinstance(module, CurvatureLayer):
            for name in ("weight", "bias", "in_features", "out_features", "base_layer", "qweight"):
                assert not hasattr(module, name)
    biases = []
    model.apply(lambda module: biases.append(module) if hasattr(module, "bias") and module.bias is not None else None)
    assert {type(module).__name__ for module in biases} == {"Conv2d", "BatchNorm2d", "Linear"}
    decayed = {id(p) for module in model.modules() if hasattr(module, "weight") for p in module.parameters(False)}
    assert decayed.isdisjoint(id(p) for name, p in model.named_parameters() if "curvature_" in name)
    assert torch.equal(model(x), expected)


def test_gradients_are_those_of_the_expression():
    model = shaken(tuned(share="site")).double()
    reference = copy.deepcopy(model)
    for layer in reference.modules():
        if isinstance(layer, CurvatureLayer):
            layer.forward = _textbook(layer)
    x = image().double()
    for each in (model, reference):
        each(x).square().sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), reference.named_parameters()):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)


def _textbook(layer):
    def forward(x, activation, slope, inplace):
        shape = [1] * x.dim()
        shape[layer.curvature_channels["default"].dim] = -1
        beta, coeff = (torch.sigmoid(raw.double()).view(shape) for raw in layer.parameters_of("default"))
        s = 1 - beta
        return coeff * x * torch.sigmoid(beta * x / s) + (1 - coeff) * s * F.softplus(x / s, threshold=1e3)

    return forward


def test_checkpointing_and_compiling_give_the_same():
    from torch.utils.checkpoint import checkpoint

    model = shaken(tuned(make_net(wide=4)))
    x = image()
    expected = model(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    block = model.get_base_model().block
    plain = block.forward
    block.forward = lambda value: checkpoint(plain, value, use_reentrant=False)
    got = model(x)
    got.sum().backward()
    assert torch.equal(got, expected)
    assert all(torch.equal(p.grad, g) for p, g in zip((p for p in model.parameters() if p.requires_grad), grads))
    del block.forward
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0


# --------------------------------------------------------------------------------------------------------- several, out


def test_switching_disabling_and_deleting():
    net = make_net()
    plain = net(image())
    model = shaken(tuned(net, target_modules=["act"]))
    first = model(image())
    model.add_adapter("second", CurvatureConfig(granularity="layer", share="site", init_beta=0.3))
    assert torch.equal(model(image()), first)
    model.set_adapter("second")
    second = model(image())
    assert not torch.equal(second, first)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    with model.disable_adapter():
        assert torch.equal(model(image()), plain)
    model.set_adapter("default")
    assert torch.equal(model(image()), first)
    with pytest.raises(ValueError, match="one curvature adapter can be active at a time"):
        model.base_model.set_adapter(["default", "second"])
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    assert torch.equal(model(image()), first)


def test_a_second_adapter_by_channel_can_follow_one_by_layer():
    model = shaken(tuned(granularity="layer"))
    model.add_adapter("second", CurvatureConfig())
    assert sum(p.numel() for name, p in model.named_parameters() if name.endswith(".second")) == 2 * (6 + 6 + 5)


def test_merging_leaves_fixed_units_that_need_no_peft():
    net = make_net(wide=4)
    model = shaken(tuned(net))
    expected = model(image())
    fixed = merged(model)
    assert not any(isinstance(m, CurvatureLayer) for m in fixed.modules())
    assert "block.relu.ctu.raw_beta" in fixed.state_dict()
    for each in (fixed, copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        assert torch.equal(each(image()), expected)
    partly = shaken(tuned(make_net(), target_modules=["act"]))
    expected = partly(image())
    assert torch.equal(merged(partly)(image()), expected)


def test_merging_in_place_and_back():
    model = shaken(tuned())
    expected = model(image())
    model.add_adapter("second", CurvatureConfig(init_beta=0.3))
    with pytest.warns(UserWarning, match="cannot be folded"):
        model.merge_adapter()
    assert torch.equal(model(image()), expected)
    assert not any(name.endswith("default") for name in reached(model))
    model.unmerge_adapter()
    model.set_adapter("second")
    assert not torch.equal(model(image()), expected)


def test_unloading_gives_the_same_objects_and_bits_back():
    net = make_net()
    expected, kinds, state = net(image()), [(n, id(m), type(m)) for n, m in net.named_modules()], list(net.state_dict())
    spaces = {name: dict(vars(module)) for name, module in net.named_modules()}
    model = tuned(net)
    again = model.unload()
    assert again is net
    assert [(n, id(m), type(m)) for n, m in again.named_modules()] == kinds
    assert list(again.state_dict()) == state
    left = {
        name: set(vars(module)) - {"peft_config"} for name, module in again.named_modules()
    }  # peft 0.18 leaves that
    assert left == {name: set(space) for name, space in spaces.items()}
    assert torch.equal(again(image()), expected)
    assert count_of(peft.get_peft_model(again, CurvatureConfig())) == 2 * (6 + 6 + 5)


def test_copies_and_pickles_compute_the_same_on_their_own():
    model = shaken(tuned(share="site"))
    expected = model(image())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image()), expected)
        shaken(twin)
        with torch.no_grad():
            next(p for n, p in twin.named_parameters() if "curvature_" in n).add_(1)
        assert not torch.equal(twin(image()), expected)
        assert torch.equal(model(image()), expected)


def test_lora_and_curvature_train_together():
    net = make_net()
    expected = net(image())
    lora = peft.get_peft_model(net, peft.LoraConfig(r=1, target_modules=["conv1", "hidden"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft remarks on a second method
        model = peft.get_peft_model(lora, CurvatureConfig()).eval()
    trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert {"curvature_raw_beta", "curvature_raw_coeff", "default"} == trainable
    assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    model(image()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(image()), expected)


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_units_over_lora_are_not_unloaded_halfway(way):
    lora = peft.get_peft_model(
        make_net(), peft.LoraConfig(r=1, target_modules=["conv1", "hidden"], init_lora_weights=False)
    )
    with pytest.warns(UserWarning, match="multiple adapters in the model"):
        model = peft.get_peft_model(lora, CurvatureConfig(), adapter_name="units").eval()
    modules, expected = [type(module) for module in model.modules()], model(image())
    with pytest.raises(ValueError, match="expected a model with one PeftModel around it, got one inside another"):
        getattr(model, way)()
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(model(image()), expected)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"granularity": "row"}, "granularity must be one of"),
        ({"share": "all"}, "share must be one of"),
        ({"activations": ["tanh"]}, "activations: expected 'all' or some of .*, got 'tanh'"),
        ({"init_beta": 1.0}, r"init_beta must lie strictly between 0 and 1 .*, got 1.0"),
        ({"init_coeff": float("nan")}, "init_coeff must lie strictly between"),
        ({"input_shape": [3, 0]}, r"input_shape must be positive sizes without the batch, got \[3, 0\]"),
        ({"layout": {"act": 6}}, "layout must map sites to"),
        ({"layout": {}}, "layout must name at least one site"),
    ],
)
def test_config_errors_name_the_field(values, message):
    with pytest.raises(ValueError, match=message):
        CurvatureConfig(**values)


def test_errors_leave_the_model_as_it_was():
    net = make_net()
    state, kinds = list(net.state_dict()), [type(m) for m in net.modules()]
    cases = [
        (
            CurvatureConfig(target_modules=["conv"]),
            "matched no activation. Activations of this model: forward:relu, act, block.relu",
        ),
        (CurvatureConfig(activations="gelu"), "expected Net to have an activation among gelu; got these near misses"),
        (CurvatureConfig(layout={"act2": [1, 6]}), "expected activations of this Net .*, got act2"),
        (CurvatureConfig(input_shape=(5, 8, 8)), r"calling a copy of the model stopped with RuntimeError.*5 channels"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(net, config)
        assert list(net.state_dict()) == state
        assert [type(m) for m in net.modules()] == kinds
        assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_wrong_layout_is_refused_at_the_call():
    model = tuned(layout={"act": [1, 7]})
    with pytest.raises(ValueError, match=r"act: expected 7 channels in dimension 1, got shape \(4, 6, 8, 8\)"):
        model(image())


def test_steered_models_are_refused_both_ways():
    net = make_net()
    with ctkernels.steer(net, 0.9), pytest.raises(ValueError, match="expected one that is not steered"):
        peft.get_peft_model(net, CurvatureConfig())
    model = tuned(net)
    with pytest.raises(ValueError, match="expected one that is not steered"):
        ctkernels.steer(model, 0.9)


def test_a_model_without_activations_names_its_near_misses():
    with pytest.raises(ValueError, match=r"got these near misses:\n    1 \(hardswish\)"):
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Hardswish()), CurvatureConfig())


@pytest.mark.parametrize(("size", "moves"), [(0.1, True), (90.0, False)])
def test_far_from_the_bend_a_unit_is_its_activation_and_learns_nothing(size, moves):
    """Tests that expect a step of training to change the output and every parameter need inputs near the bend."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU()).double()
    with torch.no_grad():
        base[0].weight.copy_(torch.tensor([1.0, -1.0, 0.7, -0.7]).view(4, 1, 1, 1))
    x = size * (1 + torch.rand(2, 1, 5, 5, dtype=torch.float64))
    expected = base(x)
    model = peft.get_peft_model(base, CurvatureConfig(granularity="layer"))
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad.abs().max() / expected.square().sum() for n, p in model.named_parameters() if p.requires_grad]
    assert len(grads) == 2
    assert all((grad > 1e-3) == moves for grad in grads)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5) != moves
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("merge", [False, True])
def test_a_part_named_as_pefts_own_is_left_alone(merge):
    """timm's DLA has a module `base_layer`; peft's unloading takes whatever has one for a layer of its own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

        def forward(self, x):
            return self.base_layer(x)

    net, x = nn.Sequential(Net(), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    inner, plain = net[0].base_layer, net(x)
    adapted = peft.get_peft_model(net, CurvatureConfig(input_shape=[3, 8, 8], init_beta=0.6)).eval()
    changed = adapted(x)
    assert not torch.equal(changed, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unloaded = adapted.merge_and_unload() if merge else adapted.unload()
    assert torch.equal(unloaded(x), changed if merge else plain)
    assert unloaded[0].base_layer is inner
    assert not hasattr(unloaded[0], "unload_and_optionally_merge_module")
