"""Trainable Curvature Tuning as a PEFT method: sites, channels, parameters, training, switching, merging, taking out."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctkernels
from ctkernels.functional import ctu

peft = pytest.importorskip("peft")
adapters = pytest.importorskip("ctkernels.adapters")
from ctkernels.adapters import CurvatureConfig, CurvatureLayer, find_activations, parameter_groups  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": lambda: nn.PReLU(6),
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class Block(nn.Module):
    """One activation called twice, as in a ResNet; `wide` makes the calls differ in channels."""

    def __init__(self, channels: int = 6, wide: int = 6, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, wide, 3, padding=1), nn.BatchNorm2d(wide)
        self.relu = act or nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class Net(nn.Module):
    def __init__(self, act=nn.ReLU, wide: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.act = act()
        self.block = Block(wide=wide)
        self.hidden = nn.Linear(wide, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = self.block(self.act(self.stem(x)))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))


def _net(**values):
    torch.manual_seed(0)
    return Net(**values).eval()


def _x(batch: int = 4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 8, generator=generator)


def _tuned(net=None, **values):
    return peft.get_peft_model(net or _net(), CurvatureConfig(**values)).eval()


def _count(model):
    return sum(p.numel() for name, p in model.named_parameters() if "curvature_" in name)


def _shake(model):
    """Parameters unlike any others, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "curvature_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


# ---------------------------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 3968), ("resnet50", 45440), ("resnet152", 143744), ("vgg11", 21888)]
)
def test_parameter_counts_are_the_papers(name, count):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):  # the counts need no weights
        model = getattr(models, name)()
    tuned = peft.get_peft_model(model, CurvatureConfig())
    assert _count(tuned) == count
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(("name", "count"), [("swin_t", 35328), ("swin_s", 72192)])
def test_a_swin_is_tuned_by_hidden_channel_and_not_by_image_row(name, count):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = getattr(models, name)()
    config = CurvatureConfig()
    assert _count(peft.get_peft_model(model, config)) == count
    assert {dim for dim, _ in config.layout.values()} == {-1}


def test_channels_come_from_what_feeds_the_site():
    config = CurvatureConfig()
    peft.get_peft_model(_net(wide=4), config)
    assert config.layout == {
        "act": [1, 6],
        "block.relu": [1, 6],
        "block.relu#2": [1, 4],
        "forward:relu": [-1, 5],
    }


class Tour(nn.Module):
    """Ways for channels to get about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.LayerNorm(6)
        self.pointwise, self.seq = nn.Linear(6, 8), nn.Conv1d(8, 5, 1)
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(6))

    def forward(self, x):
        x = self.acts[0](self.conv(x))  # (N, 6, H, W)
        x = self.acts[1](self.norm(x.permute(0, 2, 3, 1)))  # channels last
        x = self.acts[2](self.pointwise(x).flatten(1, 2))  # (N, HW, 8)
        x = self.acts[3](torch.cat([x.mT, x.mT], 1))  # (N, 16, HW)
        x = self.acts[4](self.seq(x[:, 8:]).unsqueeze(-1))  # (N, 5, HW, 1)
        return self.acts[5](x.mean((2, 3)))  # (N, 5)


def test_channels_are_followed_through_views_and_permutations():
    config = CurvatureConfig()
    model = peft.get_peft_model(Tour(), config).eval()
    assert list(config.layout.values()) == [[1, 6], [-1, 6], [-1, 8], [1, 16], [1, 5], [-1, 5]]
    assert model(_x()).shape == (4, 5)


def test_finding_channels_leaves_the_model_alone():
    net = _net()
    net.train()
    net.block.eval()
    calls = []
    net.stem.register_forward_hook(lambda *_: calls.append(1))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    config = CurvatureConfig()
    peft.get_peft_model(net, config)
    assert config.layout
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    assert net.training
    assert not net.block.training
    assert not calls
    assert not any(type(value).__name__ == "FakeTensor" for value in (*net.parameters(), *net.buffers()))


def test_a_layout_takes_the_place_of_the_search():
    class Odd(Net):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > -1e9 else x  # looks at data: no copy without data can be run

    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"the channels of forward:relu, act, .* could not be found: .* Give input_shape"
    ):
        peft.get_peft_model(Odd(), CurvatureConfig())
    model = _tuned(Odd().eval(), layout={"act": [1, 6], "block.relu": None})
    assert _count(model) == 2 * (6 + 1)
    assert model(_x()).shape == (4, 3)
    assert _count(_tuned(Odd().eval(), granularity="layer")) == 2 * 3


def test_a_site_whose_channels_cannot_be_told_gets_one_pair():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.act = nn.Linear(6, 12), nn.ReLU()

        def forward(self, x):
            return self.act(self.q(x).view(-1, 3, 4).sum(0).flatten()[:7])

    with pytest.warns(UserWarning, match=r"no single dimension holds the channels of 1 activations.*act: \(7,\)"):
        model = peft.get_peft_model(Heads(), CurvatureConfig())
    assert _count(model) == 2


def test_parts_that_only_training_reaches_are_found():
    class Auxiliary(Net):
        def forward(self, x):
            out = super().forward(x)
            return out + F.relu(self.fc.weight.sum() * out) if self.training else out

    config = CurvatureConfig()
    peft.get_peft_model(Auxiliary(), config)
    assert config.layout["forward:relu"] == [-1, 5]
    assert config.layout["forward#2:relu"] == [-1, 3]


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_family_computes_its_unit(name):
    net = _net(act=ACTIVATIONS[name])
    model = _shake(_tuned(copy.deepcopy(net)))
    layers = {layer.site: layer for layer in model.modules() if isinstance(layer, CurvatureLayer)}

    def unit(x, site, activation="relu", **values):
        beta, coeff = layers[site].parameters_of("default")
        return ctu(x, beta, coeff, raw=True, activation=activation, **values)

    more = {"negative_slope": net.act.weight} if name == "prelu" else {}
    x = unit(net.stem(_x()), "act", name, channel_dim=1, **more)
    x = unit(net.block.bn1(net.block.conv1(x)), "block.relu", channel_dim=1)
    x = unit(net.block.bn2(net.block.conv2(x)), "block.relu#2", channel_dim=1)
    expected = net.fc(unit(net.hidden(x.mean((2, 3))), "forward:relu", channel_dim=-1))
    torch.testing.assert_close(model(_x()), expected, rtol=0, atol=0)


def test_the_start_is_the_papers_for_relu_and_the_activation_itself_for_the_others():
    for name, (beta, coeff) in {"relu": (0.8, 0.5), "silu": (0.5, 1 / (1 + math.exp(-10)))}.items():
        model = _tuned(_net(act=ACTIVATIONS[name]))
        layer = next(m for m in model.modules() if isinstance(m, CurvatureLayer) and m.site == "act")
        raws = layer.parameters_of("default")
        torch.testing.assert_close(torch.sigmoid(raws[0]), torch.full((6,), beta))
        torch.testing.assert_close(torch.sigmoid(raws[1]), torch.full((6,), coeff))
    config = CurvatureConfig(init_beta=0.9, init_coeff=0.25)
    assert config.start("gelu") == (0.9, 0.25)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_at_the_neutral_point_nothing_changes(name):
    net = _net(act=ACTIVATIONS[name])
    expected = net(_x())
    model = _tuned(net)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, CurvatureLayer):
                smooth = layer.activation in ("silu", "gelu")
                for table, value in (
                    (layer.curvature_raw_beta, 0.0 if smooth else 1e4),
                    (layer.curvature_raw_coeff, 1e4),
                ):
                    for parameter in table.values():
                        parameter.fill_(value)
    bound = (
        4 * torch.finfo(torch.float32).eps * (1 + float(expected.detach().abs().max()))
    )  # SiLU and GELU round their own way
    torch.testing.assert_close(model(_x()), expected, rtol=0, atol=0 if name not in ("silu", "gelu") else bound)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, 2 * (6 + 6 + 5)),
        ({"share": "site"}, 2 * (6 + 6 + 6 + 5)),
        ({"granularity": "layer"}, 2 * 3),
        ({"granularity": "layer", "share": "site"}, 2 * 4),
        ({"granularity": "shared"}, 2),
        ({"target_modules": ["relu"]}, 2 * 6),
        ({"target_modules": r"block\..*|act", "exclude_modules": ["relu#2"]}, 2 * (6 + 6)),
        ({"exclude_modules": ["act"]}, 2 * (6 + 5)),
    ],
)
def test_granularity_sharing_and_targets(values, count):
    model = _tuned(**values)
    assert _count(model) == count
    state = peft.get_peft_model_state_dict(model)
    assert sum(value.numel() for value in state.values()) == count  # nothing is saved twice
    model(_x()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_uses_with_other_channels_are_split_and_uses_with_the_same_are_not():
    assert _count(_tuned(_net(wide=4))) == 2 * (6 + 6 + 4 + 5)
    same = _shake(_tuned())
    first, second = (_layer(same, name) for name in ("block.relu", "block.relu#2"))
    assert first.parameters_of("default")[0] is second.parameters_of("default")[0]


def _layer(model, site):
    return adapters.curvature.model.surgery_of(model.get_base_model()).layers[site]


def test_one_module_registered_in_several_places_can_be_split():
    act = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 6), act, nn.Linear(6, 4), act)
    names = [site.name for site in find_activations(net)]
    assert names == ["1", "3", "5"]
    x = torch.randn(2, 3)
    expected = net(x)
    model = peft.get_peft_model(net, CurvatureConfig())
    assert _count(model) == 2 * (4 + 6 + 4)
    assert not torch.equal(model(x), expected)
    plain = model.unload()
    assert plain[1] is plain[3] is plain[5] is act
    assert torch.equal(plain(x), expected)


def test_mixed_families_share_a_pair_for_each_neutral_point():
    assert _count(_tuned(_net(act=nn.SiLU), granularity="shared")) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_stay_float32_when_the_model_is_cast(dtype):
    model = _tuned().to(dtype)
    assert {p.dtype for name, p in model.named_parameters() if "curvature_" in name} == {torch.float32}
    assert model(_x().to(dtype)).dtype == dtype
    fixed = _merged(model)
    assert {b.dtype for name, b in fixed.to(torch.float16).named_buffers() if "ctu" in name} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------- training


def test_training_moves_only_the_adapter_and_the_head_and_reduces_the_loss():
    net = _net()
    frozen = {name: value.clone() for name, value in net.named_parameters()}
    model = _tuned(net, modules_to_save=["fc"]).train()
    groups = parameter_groups(model)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("curvature", 0.1, 0.0),
        ("rest", 1e-3, 0.0),
    ]
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
    target = torch.arange(12) % 3
    x = _x(12) * (1 + target.view(-1, 1, 1, 1))
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


def test_gradients_are_those_of_the_expression():
    model = _shake(_tuned(share="site")).double()
    reference = copy.deepcopy(model)
    for layer in reference.modules():
        if isinstance(layer, CurvatureLayer):
            layer.forward = _textbook(layer)
    x = _x().double()
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

    model = _shake(_tuned(_net(wide=4)))
    x = _x()
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
    net = _net()
    plain = net(_x())
    model = _shake(_tuned(net, target_modules=["act"]))
    first = model(_x())
    model.add_adapter("second", CurvatureConfig(granularity="layer", share="site", init_beta=0.3))
    assert torch.equal(model(_x()), first)
    model.set_adapter("second")
    second = model(_x())
    assert not torch.equal(second, first)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    with model.disable_adapter():
        assert torch.equal(model(_x()), plain)
    model.set_adapter("default")
    assert torch.equal(model(_x()), first)
    with pytest.raises(ValueError, match="one curvature adapter can be active at a time"):
        model.base_model.set_adapter(["default", "second"])
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    assert torch.equal(model(_x()), first)


def test_a_second_adapter_by_channel_can_follow_one_by_layer():
    model = _shake(_tuned(granularity="layer"))
    model.add_adapter("second", CurvatureConfig())
    assert sum(p.numel() for name, p in model.named_parameters() if name.endswith(".second")) == 2 * (6 + 6 + 5)


def _merged(model):
    with pytest.warns(UserWarning, match="A nonlinearity cannot be folded into the weights"):
        return model.merge_and_unload()


def test_merging_leaves_fixed_units_that_need_no_peft():
    net = _net(wide=4)
    model = _shake(_tuned(net))
    expected = model(_x())
    fixed = _merged(model)
    assert not any(isinstance(m, CurvatureLayer) for m in fixed.modules())
    assert "block.relu.ctu.raw_beta" in fixed.state_dict()
    for each in (fixed, copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))):
        assert torch.equal(each(_x()), expected)
    partly = _shake(_tuned(_net(), target_modules=["act"]))
    expected = partly(_x())
    assert torch.equal(_merged(partly)(_x()), expected)


def test_merging_in_place_and_back():
    model = _shake(_tuned())
    expected = model(_x())
    model.add_adapter("second", CurvatureConfig(init_beta=0.3))
    with pytest.warns(UserWarning, match="cannot be folded"):
        model.merge_adapter()
    assert torch.equal(model(_x()), expected)
    assert not any(name.endswith("default") for name in _reached(model))
    model.unmerge_adapter()
    model.set_adapter("second")
    assert not torch.equal(model(_x()), expected)


def _reached(model):
    """The adapter parameters that a loss has a gradient in."""
    model.zero_grad()
    loss = model(_x()).sum()
    if loss.requires_grad:
        loss.backward()
    return [name for name, p in model.named_parameters() if "curvature_" in name and p.grad is not None]


def test_unloading_gives_the_same_objects_and_bits_back():
    net = _net()
    expected, kinds, state = net(_x()), [(n, id(m), type(m)) for n, m in net.named_modules()], list(net.state_dict())
    spaces = {name: dict(vars(module)) for name, module in net.named_modules()}
    model = _tuned(net)
    again = model.unload()
    assert again is net
    assert [(n, id(m), type(m)) for n, m in again.named_modules()] == kinds
    assert list(again.state_dict()) == state
    left = {
        name: set(vars(module)) - {"peft_config"} for name, module in again.named_modules()
    }  # peft 0.18 leaves that
    assert left == {name: set(space) for name, space in spaces.items()}
    assert torch.equal(again(_x()), expected)
    assert _count(peft.get_peft_model(again, CurvatureConfig())) == 2 * (6 + 6 + 5)


def test_copies_and_pickles_compute_the_same_on_their_own():
    model = _shake(_tuned(share="site"))
    expected = model(_x())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(_x()), expected)
        _shake(twin)
        with torch.no_grad():
            next(p for n, p in twin.named_parameters() if "curvature_" in n).add_(1)
        assert not torch.equal(twin(_x()), expected)
        assert torch.equal(model(_x()), expected)


def test_lora_and_curvature_train_together():
    net = _net()
    expected = net(_x())
    lora = peft.get_peft_model(net, peft.LoraConfig(r=1, target_modules=["conv1", "hidden"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft remarks on a second method
        model = peft.get_peft_model(lora, CurvatureConfig()).eval()
    trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert {"curvature_raw_beta", "curvature_raw_coeff", "default"} == trainable
    assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    model(_x()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(_x()), expected)


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
    net = _net()
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
    model = _tuned(layout={"act": [1, 7]})
    with pytest.raises(ValueError, match=r"act: expected 7 channels in dimension 1, got shape \(4, 6, 8, 8\)"):
        model(_x())


def test_steered_models_are_refused_both_ways():
    net = _net()
    with ctkernels.steer(net, 0.9), pytest.raises(ValueError, match="expected one that is not steered"):
        peft.get_peft_model(net, CurvatureConfig())
    model = _tuned(net)
    with pytest.raises(ValueError, match="expected one that is not steered"):
        ctkernels.steer(model, 0.9)


def test_a_model_without_activations_names_its_near_misses():
    with pytest.raises(ValueError, match=r"got these near misses:\n    1 \(hardswish\)"):
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Hardswish()), CurvatureConfig())
