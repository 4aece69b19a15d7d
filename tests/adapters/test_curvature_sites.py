"""Trainable Curvature Tuning as a PEFT method: sites, channels, and what is computed there."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctkernels.functional import ctu

pytest.importorskip("peft")
import peft
from curvature_networks import ACTIVATIONS, Block, Net, count_of, image, layer_at, make_net, merged, shaken, tuned

from ctkernels._copying import copy_module
from ctkernels.adapters import CurvatureConfig, CurvatureLayer, find_activations
from ctkernels.steering import scan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


# ---------------------------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 3968), ("resnet50", 45440), ("resnet152", 143744), ("vgg11", 21888)]
)
def test_parameter_counts_are_the_papers(name, count):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):  # the counts need no weights
        model = getattr(models, name)()
    tuned = peft.get_peft_model(model, CurvatureConfig())
    assert count_of(tuned) == count
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(("name", "count"), [("swin_t", 35328), ("swin_s", 72192)])
def test_a_swin_is_tuned_by_hidden_channel_and_not_by_image_row(name, count):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = getattr(models, name)()
    config = CurvatureConfig()
    assert count_of(peft.get_peft_model(model, config)) == count
    assert {dim for dim, _ in config.layout.values()} == {-1}


def test_channels_come_from_what_feeds_the_site():
    config = CurvatureConfig()
    peft.get_peft_model(make_net(wide=4), config)
    assert config.layout == {
        "act": [1, 6],
        "block.relu": [1, 6],
        "block.relu#2": [1, 4],
        "forward:relu": [-1, 5],
    }


class Tour(nn.Module):
    """Ways for channels to get about."""

    def __init__(self):
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
    assert model(image()).shape == (4, 5)


def test_finding_channels_leaves_the_model_alone():
    net = make_net()
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


def test_finding_channels_calls_nobodys_hooks():
    net = make_net(act=nn.ReLU)
    seen = []

    def note(*values):
        seen.extend(values)

    for module in net.modules():
        module.register_forward_pre_hook(note)
        module.register_forward_pre_hook(note, with_kwargs=True)
        module.register_forward_hook(note, always_call=True)
    everywhere = nn.modules.module.register_module_forward_pre_hook(note)
    after = nn.modules.module.register_module_forward_hook(note)
    try:
        config = CurvatureConfig()
        model = peft.get_peft_model(net, config)
        assert seen == []
        assert set(config.layout) == {"act", "block.relu", "block.relu#2", "forward:relu"}
        model(image())
        assert seen
    finally:
        everywhere.remove()
        after.remove()


class RunsItsItems(nn.Sequential):
    def forward(self, x):
        return F.relu(super().forward(x) - 0.1)


class CountsItsItems(nn.ModuleList):
    def forward(self, x):
        for i in range(len(self)):
            x = self[i](x)
        return F.relu(self[-1](x) + len(self[:2]) - 2)


class NamesItsItems(nn.ModuleDict):
    def forward(self, x):
        for name, layer in self.items():
            x = layer(x) if name in self else x * float("nan")
        for layer in (*self.values(), *(self[name] for name in self), *(self[name] for name in self.keys())):
            x = layer(x)
        return F.relu(x + len(self) - 3)


class HasItsOwnWay(nn.Sequential):
    def __iter__(self):
        return (self._modules[name] for name in reversed("012"))

    def forward(self, x):
        return F.relu(super().forward(x))


CONTAINERS = {
    "own iteration": lambda layers: HasItsOwnWay(*layers),
    "sequential": lambda layers: RunsItsItems(*layers),
    "list": lambda layers: CountsItsItems(layers),
    "dict": lambda layers: NamesItsItems({str(i): layer for i, layer in enumerate(layers)}),
}


@pytest.mark.parametrize("inside", [True, False], ids=["part", "model"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_with_an_activation_in_its_code(kind, inside):
    torch.manual_seed(0)
    container, x = CONTAINERS[kind]([nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]), torch.randn(4, 8)
    net = nn.Sequential(container, nn.Linear(8, 2)) if inside else container
    expected, names = net(x), [name for name, _ in net.named_modules()]
    model = peft.get_peft_model(net, CurvatureConfig(input_shape=[8]))
    site = "0.forward:relu" if inside else "forward:relu"
    assert find_activations(net)[0].name == site
    assert count_of(model) == 16
    start = model(x)
    assert (start - expected).abs().max() > 1e-4
    layer = layer_at(model, site)
    assert [list(p.shape) for p in layer.parameters_of("default")] == [[8], [8]]
    compiled = torch.compile(net, backend="eager")
    assert torch.equal(compiled(x), start)
    shaken(model)
    output = model(x)
    assert (output - start).abs().max() > 1e-4
    output.sum().backward()
    assert all(p.grad is not None for p in layer.parameters_of("default"))
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    fixed = merged(copy.deepcopy(model))
    assert torch.equal(fixed(x), output)
    plain = model.unload()
    assert torch.equal(plain(x), expected)
    assert [name for name, _ in plain.named_modules()] == names


def test_a_layout_takes_the_place_of_the_search():
    class Odd(Net):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > -1e9 else x  # looks at data: no copy without data can be run

    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"the channels of forward:relu, act, .* could not be found: .* Give input_shape"
    ):
        peft.get_peft_model(Odd(), CurvatureConfig())
    model = tuned(Odd().eval(), layout={"act": [1, 6], "block.relu": None})
    assert count_of(model) == 2 * (6 + 1)
    assert model(image()).shape == (4, 3)
    assert count_of(tuned(Odd().eval(), granularity="layer")) == 2 * 3


def test_a_site_whose_channels_cannot_be_told_gets_one_pair():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.act = nn.Linear(6, 12), nn.ReLU()

        def forward(self, x):
            return self.act(self.q(x).view(-1, 3, 4).sum(0).flatten()[:7])

    with pytest.warns(UserWarning, match=r"no single dimension holds the channels of 1 activations.*act: \(7,\)"):
        model = peft.get_peft_model(Heads(), CurvatureConfig())
    assert count_of(model) == 2


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
    net = make_net(act=ACTIVATIONS[name])
    model = shaken(tuned(copy.deepcopy(net)))
    layers = {layer.site: layer for layer in model.modules() if isinstance(layer, CurvatureLayer)}

    def unit(x, site, activation="relu", **values):
        beta, coeff = layers[site].parameters_of("default")
        return ctu(x, beta, coeff, raw=True, activation=activation, **values)

    more = {"negative_slope": net.act.weight} if name == "prelu" else {}
    x = unit(net.stem(image()), "act", name, channel_dim=1, **more)
    x = unit(net.block.bn1(net.block.conv1(x)), "block.relu", channel_dim=1)
    x = unit(net.block.bn2(net.block.conv2(x)), "block.relu#2", channel_dim=1)
    expected = net.fc(unit(net.hidden(x.mean((2, 3))), "forward:relu", channel_dim=-1))
    torch.testing.assert_close(model(image()), expected, rtol=0, atol=0)


def test_the_start_is_the_papers_for_relu_and_the_activation_itself_for_the_others():
    for name, (beta, coeff) in {"relu": (0.95, 0.5), "silu": (0.5, 1 / (1 + math.exp(-10)))}.items():
        model = tuned(make_net(act=ACTIVATIONS[name]))
        layer = next(m for m in model.modules() if isinstance(m, CurvatureLayer) and m.site == "act")
        raws = layer.parameters_of("default")
        torch.testing.assert_close(torch.sigmoid(raws[0]), torch.full((6,), beta))
        torch.testing.assert_close(torch.sigmoid(raws[1]), torch.full((6,), coeff))
    config = CurvatureConfig(init_beta=0.9, init_coeff=0.25)
    assert config.start("gelu") == (0.9, 0.25)


SMOOTH = ("silu", "gelu", "gelu_tanh")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_at_the_neutral_point_nothing_changes(name):
    net = make_net(act=ACTIVATIONS[name])
    expected = net(image())
    model = tuned(net)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, CurvatureLayer):
                smooth = layer.activation in SMOOTH
                for table, value in (
                    (layer.curvature_raw_beta, 0.0 if smooth else 1e4),
                    (layer.curvature_raw_coeff, 1e4),
                ):
                    for parameter in table.values():
                        parameter.fill_(value)
    bound = (
        4 * torch.finfo(torch.float32).eps * (1 + float(expected.detach().abs().max()))
    )  # SiLU and GELU round their own way
    torch.testing.assert_close(model(image()), expected, rtol=0, atol=0 if name not in SMOOTH else bound)


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
    model = tuned(**values)
    assert count_of(model) == count
    state = peft.get_peft_model_state_dict(model)
    assert sum(value.numel() for value in state.values()) == count  # nothing is saved twice
    model(image()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_uses_with_other_channels_are_split_and_uses_with_the_same_are_not():
    assert count_of(tuned(make_net(wide=4))) == 2 * (6 + 6 + 4 + 5)
    same = shaken(tuned())
    first, second = (layer_at(same, name) for name in ("block.relu", "block.relu#2"))
    assert first.parameters_of("default")[0] is second.parameters_of("default")[0]


def test_one_module_registered_in_several_places_can_be_split():
    act = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 6), act, nn.Linear(6, 4), act)
    names = [site.name for site in find_activations(net)]
    assert names == ["1", "3", "5"]
    x = torch.randn(2, 3)
    expected = net(x)
    model = peft.get_peft_model(net, CurvatureConfig())
    assert count_of(model) == 2 * (4 + 6 + 4)
    assert not torch.equal(model(x), expected)
    plain = model.unload()
    assert plain[1] is plain[3] is plain[5] is act
    assert torch.equal(plain(x), expected)


def test_mixed_families_share_a_pair_for_each_neutral_point():
    assert count_of(tuned(make_net(act=nn.SiLU), granularity="shared")) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_stay_float32_when_the_model_is_cast(dtype):
    model = tuned().to(dtype)
    assert {p.dtype for name, p in model.named_parameters() if "curvature_" in name} == {torch.float32}
    assert model(image().to(dtype)).dtype == dtype
    fixed = merged(model)
    assert {b.dtype for name, b in fixed.to(torch.float16).named_buffers() if "ctu" in name} == {torch.float32}


def test_each_class_is_read_once_for_an_adapter(monkeypatch):
    read = []

    class Counting(scan.ClassCode):
        def __init__(self, cls, *args):
            read.append(cls)
            super().__init__(cls, *args)

    monkeypatch.setattr(scan, "ClassCode", Counting)
    model = tuned()
    assert len(read) == len(set(read))
    assert set(read) >= {Net, Block}
    assert count_of(model) == 2 * (6 + 6 + 5)  # as of another model that is read again
    read.clear()
    find_activations(make_net())
    assert set(read) >= {Net, Block}


def test_adapters_have_their_sites_and_their_gradients_apart():
    model = tuned(target_modules=["act"])
    model.add_adapter("second", CurvatureConfig(target_modules=["act", "block.relu"]))
    act, relu = layer_at(model, "act"), layer_at(model, "block.relu")

    def trained(layer):
        return {name for name, p in layer.named_parameters(recurse=True) if p.requires_grad}

    assert act.active_adapters == relu.active_adapters == ["default"]
    assert act.active
    assert not relu.active
    raw = {f"curvature_raw_{kind}" for kind in ("beta", "coeff")}
    assert trained(act) == {f"{name}.default" for name in raw}
    assert not trained(relu)
    model.set_requires_grad("second")
    assert trained(act) == {f"{name}.{adapter}" for name in raw for adapter in ("default", "second")}
    assert trained(relu) == {f"{name}.second" for name in raw}
    model.set_requires_grad(["default", "second"], requires_grad=False)
    assert not trained(act)
    assert not trained(relu)
    model.set_adapter("second")
    assert act.active_adapters == relu.active_adapters == ["second"]
    assert relu.active
    assert trained(act) == trained(relu) == {f"{name}.second" for name in raw}


def test_channels_of_a_float16_model_that_looks_for_overflow():
    class Clamping(Net):
        def forward(self, x):
            x = self.act(self.stem(x))
            if x.dtype == torch.float16 and not torch.isfinite(x).all():
                x = x.clamp(-65000, 65000)
            return self.fc(F.relu(self.hidden(self.block(x).mean((2, 3)))))

    model = tuned(Clamping().half())
    assert model.peft_config["default"].layout == tuned().peft_config["default"].layout
    assert model.get_base_model().stem.weight.dtype == torch.float16
    batch = peft.get_peft_model(Clamping().half(), CurvatureConfig()).eval()
    assert batch(image().half(), adapter_names=["default", "__base__"] * 2).dtype == torch.float16


def test_a_traced_network_in_peft_wrappers_is_reached():
    """A GraphModule copies itself by a method that peft's wrappers pass on: their copies would lack them."""
    network = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    lora = peft.get_peft_model(network, peft.LoraConfig(r=1, target_modules=["0"]))
    assert type(copy_module(lora)) is type(lora)
    assert all("__deepcopy__" not in vars(module) for module in lora.modules())
    adapted = peft.get_peft_model(lora, CurvatureConfig(input_shape=(3, 8, 8)))
    assert count_of(adapted) == 2 * 4
