"""Saved networks with CT units: they come back as what they are, and nothing else takes them for a plain network."""

from __future__ import annotations

import copy

import pytest
import torch
from test_portable import Net
from torch import nn

import ctkernels

safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

FILE = "ctkernels.safetensors"


class Tied(nn.Module):
    """Two names for one weight, two activations, and numbers of another dtype."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.relu, self.silu = nn.ReLU(), nn.SiLU()
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return self.silu(self.second(self.relu(self.first(x))))


def steered(beta=0.9, coeff=0.5):
    model = Tied().eval()
    ctkernels.steer(model, beta, coeff, activations="all")
    return model


def rewritten(folder, change):
    """Save the file anew, with ``change`` done to its tensors and its header."""
    with safetensors.safe_open(folder / FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / FILE)
    change(tensors, metadata)
    save_file(tensors, folder / FILE, metadata)


def trained(granularity):
    peft = pytest.importorskip("peft")
    from ctkernels.adapters import CurvatureConfig

    config = CurvatureConfig(granularity=granularity, input_shape=(3, 6, 6))
    model = peft.get_peft_model(Net(nn.ReLU(inplace=True)), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "curvature" in name:
                parameter += torch.randn_like(parameter)
    with pytest.warns(UserWarning, match="nonlinearity cannot be folded"):
        return model.merge_and_unload()


@pytest.mark.parametrize(
    ("beta", "coeff"), [(0.9, 0.25), ({"relu": 0.3, "*:silu": 0.6}, {"silu": 0.5}), ({"relu": 1 - 1e-6}, 0.1)]
)
def test_a_steered_model_comes_back(beta, coeff, tmp_path):
    model, base = steered(beta, coeff), Tied()
    assert ctkernels.save_pretrained(model, tmp_path / "model") == tmp_path / "model" / FILE
    loaded = ctkernels.load_pretrained(tmp_path / "model", base)
    x = torch.randn(5, 4)
    assert loaded is base
    assert torch.equal(loaded(x), model(x))
    handle = ctkernels.handle_of(loaded)
    assert handle.values() == ctkernels.handle_of(model).values()
    assert loaded.first.weight is loaded.second.weight
    handle.remove()
    ctkernels.handle_of(model).remove()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("granularity", ["channel", "layer", "shared"])
def test_merged_curvature_comes_back(granularity, tmp_path):
    model, base = trained(granularity), Net(nn.ReLU(inplace=True))
    ctkernels.save_pretrained(model, tmp_path)
    loaded, x = ctkernels.load_pretrained(tmp_path, base), torch.randn(2, 3, 6, 6)
    assert torch.equal(loaded(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    again = copy.deepcopy(loaded)
    ctkernels.save_pretrained(again, tmp_path)
    twice = ctkernels.load_pretrained(tmp_path, Net(nn.ReLU(inplace=True)))
    assert torch.equal(twice(x), model(x))


def test_models_of_transformers_and_timm_are_made_anew(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    llama = transformers.LlamaForCausalLM(config).bfloat16().eval()
    ctkernels.steer(llama, 0.7, activations="silu")
    with pytest.raises(ValueError, match="a steered LlamaForCausalLM would be saved, and loaded, as the plain network"):
        llama.save_pretrained(tmp_path / "plain")
    ctkernels.save_pretrained(llama, tmp_path / "llama")
    loaded, tokens = ctkernels.load_pretrained(tmp_path / "llama"), torch.arange(6)[None]
    assert torch.equal(loaded(tokens).logits, llama(tokens).logits)
    with pytest.raises((OSError, ValueError), match=r"config.json"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    ctkernels.handle_of(llama).remove()
    llama.save_pretrained(tmp_path / "plain")

    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t", num_classes=7).eval()
    ctkernels.steer(net, 0.9)
    ctkernels.save_pretrained(net, tmp_path / "net")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(ctkernels.load_pretrained(tmp_path / "net")(x), net(x))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        timm.models.load_checkpoint(timm.create_model("resnet10t", num_classes=7), str(tmp_path / "net" / FILE))


def _class(tensors, metadata):
    metadata["ctkernels"] = metadata["ctkernels"].replace('"format": 1', '"format": 2')


def _nan(tensors, metadata):
    tensors["steered.first.bias"][2] = float("nan")


def _missing(tensors, metadata):
    del tensors["steered.first.bias"]


def _extra(tensors, metadata):
    tensors["steered.third.bias"] = torch.zeros(2)


def _shape(tensors, metadata):
    tensors["steered.first.bias"] = torch.zeros(3)


def _sites(tensors, metadata):
    metadata["ctkernels"] = metadata["ctkernels"].replace('"silu": [', '"other": [')


def _plain(tensors, metadata):
    del metadata["ctkernels"]
    metadata["format"] = "pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_class, "expected a file of save_pretrained, format 1, got format 2"),
        (_plain, "expected a file of save_pretrained, format 1, got format None"),
        (_nan, "expected weights without NaN, got NaN in first.bias"),
        (_missing, "base: expected the weights of .*, got one that has beyond the file's first.bias"),
        (_extra, "base: expected the weights of .*, got one that has no third.bias"),
        (_shape, r"base: expected first.bias of shape \(3,\), as in .*, got \(4,\)"),
        (_sites, "base: expected the activations of .*, got others: other, silu"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_the_base_stays(change, message, tmp_path):
    ctkernels.save_pretrained(steered(), tmp_path)
    rewritten(tmp_path, change)
    base = Tied()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ctkernels.load_pretrained(tmp_path, base)
    assert type(base.relu) is nn.ReLU
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    ctkernels.save_pretrained(steered(), tmp_path)
    for base, message in (
        (None, "base: expected the plain network, as .* is of none that transformers or timm make"),
        (3, "base: expected a torch.nn.Module, got int"),
        (nn.Linear(2, 2), "base: expected a .*Tied, as in .*, got a torch.nn.modules.linear.Linear"),
        (steered(), "base: expected the plain network, got one with CT units"),
        (Tied().double(), r"base: expected .* of dtype torch.float32, as in .*, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ctkernels.load_pretrained(tmp_path, base)  # type: ignore[arg-type]
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:-10])
    with pytest.raises(ValueError, match="expected a safetensors file, got one that is corrupt or cut short"):
        ctkernels.load_pretrained(tmp_path, Tied())
    with pytest.raises(ValueError, match=f"path: expected a folder with {FILE}, found none"):
        ctkernels.load_pretrained(tmp_path / "nothing", Tied())


def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(tmp_path):
    ctkernels.save_pretrained(steered(), tmp_path)
    before = (tmp_path / FILE).read_bytes()
    broken = steered()
    with torch.no_grad():
        broken.first.bias[0] = float("nan")
    for model, message in (
        (Tied(), "model: expected one with CT units .* got a Tied without"),
        (broken, "model: expected weights without NaN, got NaN in first.bias"),
        (nn.Sequential(steered()), "call steer.. on the whole model"),
    ):
        pytest.importorskip("peft")
        with pytest.raises(ValueError, match=message):
            ctkernels.save_pretrained(model, tmp_path)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        ctkernels.save_pretrained(3, tmp_path)  # type: ignore[arg-type]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", FILE]
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"path: expected a folder without another model, got .* with config.json"):
        ctkernels.save_pretrained(steered(), tmp_path)
