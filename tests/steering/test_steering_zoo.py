"""Steering the models people use: every activation call is found, and at the neutral point nothing changes."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import ctkernels
from ctkernels.steering.activations import ACTIVATIONS, RELU_FAMILY, SIGNATURES

TABLE = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))


class Calls(TorchFunctionMode):
    """Counts the calls to activation functions, whoever makes them, but for those inside the unit."""

    def __init__(self, activations):
        super().__init__()
        self.activations, self.plain, self.units, self._inside = activations, 0, 0, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        form = SIGNATURES.get(getattr(function, "__name__", "").rstrip("_"))
        if form is not None and not self._inside:
            call = form.read(*args, **kwargs)
            self.plain += call is not None and (call.activation or form.activation) in self.activations
        return function(*args, **kwargs)

    def unit(self, ctu):
        def counted(*args, **kwargs):
            self.units += 1
            self._inside = True
            try:
                return ctu(*args, **kwargs)
            finally:
                self._inside = False

        return counted


def count(run, activations, monkeypatch):
    """(output, plain activation calls, unit calls) of one forward pass."""
    calls = Calls(activations)
    with monkeypatch.context() as patch, calls, torch.no_grad():
        patch.setattr(ctkernels.functional, "ctu", calls.unit(ctkernels.functional.ctu))
        return run(), calls.plain, calls.units


def first_tensor(output):
    if isinstance(output, torch.Tensor):
        return output
    return first_tensor(next(iter(output.values())) if isinstance(output, dict) else output[0])


def neutral(handle):
    """The neutral point of every site by name, so that the units run there."""
    used = {site.activation for site in handle.sites}
    return ({f"*:{name}": getattr(ACTIVATIONS[name], knob) for name in used} for knob in ("beta", "coeff"))


def check(model, run, monkeypatch, activations=RELU_FAMILY, rtol=0.0, atol=0.0):
    """Steer at the neutral point: the same output, one unit call for every activation call, and no activation call.

    With nothing named: the same calls as before, and the same bits. Removed: the very objects.
    """
    model.eval()
    expected, plain, _ = count(run, activations, monkeypatch)
    state = {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "num_" in key}
    modules = list(model.modules())
    handle = ctkernels.steer(model, {}, {}, activations=activations)
    output, rest, units = count(run, activations, monkeypatch)
    assert (rest, units) == (plain, 0)
    assert torch.equal(first_tensor(output), first_tensor(expected))
    handle.beta, handle.coeff = neutral(handle)
    output, rest, units = count(run, activations, monkeypatch)
    assert (rest, units) == (0, plain)
    assert not handle.missed
    if rtol == atol == 0.0:
        assert torch.equal(first_tensor(output), first_tensor(expected))
    else:
        torch.testing.assert_close(first_tensor(output), first_tensor(expected), rtol=rtol, atol=atol)
    now = model.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in state.items())
    handle.remove()
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    return handle


@pytest.fixture
def cheap_init(monkeypatch):
    """Weights copied from a small table: the zoo has ten billion bytes of them."""

    def fill(tensor, *args, **kwargs):
        fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else tensor.numel()
        row = TABLE / math.sqrt(fan_in)
        with torch.no_grad():
            flat, whole = tensor.view(-1), tensor.numel() // len(row) * len(row)
            flat[:whole].view(-1, len(row)).copy_(row)
            flat[whole:].copy_(row[: tensor.numel() - whole])
        return tensor

    for name in ("normal_", "uniform_", "trunc_normal_", "xavier_uniform_", "kaiming_uniform_", "kaiming_normal_"):
        monkeypatch.setattr(nn.init, name, fill)
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------- torchvision

SHARED = 3  # a torchvision ResNet block has one ReLU module, called twice (18, 34) or three times
SMALLEST = {"maxvit_t": 224, "inception_v3": 75}


def vision_models():
    try:
        import torchvision
    except ImportError:
        return []
    return torchvision.models.list_models(module=torchvision.models)


def vision_model(name):
    import torchvision

    small = {"image_size": 28 if name == "vit_h_14" else 32} if name.startswith("vit") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, **small).eval()
    size = small.get("image_size", SMALLEST.get(name, 64))
    return model, torch.randn(1, 3, size, size)


@pytest.mark.slow
@pytest.mark.skipif(not vision_models(), reason="needs torchvision")
@pytest.mark.parametrize("name", vision_models())
def test_torchvision(name, cheap_init, monkeypatch):
    model, x = vision_model(name)
    _, plain, _ = count(lambda: model(x), RELU_FAMILY, monkeypatch)
    if plain:
        handle = check(model, lambda: model(x), monkeypatch)
        extra = len(handle.sites) - plain
        if name == "googlenet":
            assert extra == 4  # two auxiliary heads, which only training runs
        elif name == "inception_v3":
            assert extra == 2
        elif "resne" in name:
            assert plain - 1 in (2 * (len(handle.sites) - 1), SHARED * (len(handle.sites) - 1))
        else:
            assert extra == 0
    else:
        with pytest.raises(ValueError, match=r"(?s)got these near misses:.*(gelu|silu)"):
            ctkernels.steer(model, 0.9)
    # SiLU and GELU are neutral to rounding, which deep networks with random weights amplify: to all digits in one case.
    if name.startswith("efficientnet"):
        model, x = model.double(), x.double()
    check(model, lambda: model(x), monkeypatch, list(ACTIVATIONS), rtol=1e-3, atol=1e-4)


def test_torchvision_functional_calls(cheap_init):
    pytest.importorskip("torchvision", reason="needs torchvision")
    expected = {"googlenet": (0, 61), "inception_v3": (0, 96), "densenet121": (120, 1)}
    for name, kinds in expected.items():
        handle = ctkernels.steer(vision_model(name)[0], 0.9)
        found = [site.kind for site in handle.sites]
        assert (found.count("module"), found.count("functional")) == kinds


# --------------------------------------------------------------------------------------------------------- transformers


def language(cls, config, **sizes):
    def build(transformers):
        made = getattr(transformers, config)(vocab_size=99, bos_token_id=0, eos_token_id=2, **sizes)
        model = getattr(transformers, cls)(made)
        return model, lambda: model(input_ids=torch.arange(8)[None])

    return build


def vision(cls, config, size, **sizes):
    def build(transformers):
        model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
        x = torch.randn(1, 3, size, size)
        return model, lambda: model(pixel_values=x)

    return build


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
COMPOSED = {"clip", "gpt2", "bloom"}  # activations of more than one call to torch, which are not counted
TRANSFORMERS = {
    "bert": (language("BertForMaskedLM", "BertConfig", **TINY), "gelu", 3),
    # The head calls a module that is a global of the library.
    "roberta": (language("RobertaForMaskedLM", "RobertaConfig", pad_token_id=1, **TINY), "gelu", 3),
    "llama": (language("LlamaForCausalLM", "LlamaConfig", **TINY), "silu", 2),
    "opt": (language("OPTForCausalLM", "OPTConfig", **OPT), "relu", 2),
    "clip": (language("CLIPTextModel", "CLIPTextConfig", **TINY), "quick_gelu", 2),
    "vit": (vision("ViTForImageClassification", "ViTConfig", 32, image_size=32, patch_size=16, **TINY), "gelu", 2),
    "gemma": (language("GemmaForCausalLM", "GemmaConfig", head_dim=16, num_key_value_heads=2, **TINY), "gelu_tanh", 2),
    "gpt2": (language("GPT2LMHeadModel", "GPT2Config", **GPT2), "gelu_tanh", 2),
    "bloom": (language("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=2), "gelu_tanh", 2),
    "siglip": (
        vision("SiglipVisionModel", "SiglipVisionConfig", 32, image_size=32, patch_size=16, **TINY),
        "gelu_tanh",
        3,
    ),
    "nemotron": (
        language("NemotronForCausalLM", "NemotronConfig", num_key_value_heads=2, **TINY),
        "relu",
        2,
    ),  # its square is taken of the unit
    "resnet": (
        vision("ResNetModel", "ResNetConfig", 32, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        "relu",
        7,
    ),
    "convnext": (
        vision("ConvNextModel", "ConvNextConfig", 32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        "gelu",
        2,
    ),
    "mobilevitv2": (vision("MobileViTV2Model", "MobileViTV2Config", 64, width_multiplier=0.25), "relu", 9),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    build, activation, sites = TRANSFORMERS[name]
    torch.manual_seed(0)
    model, run = build(transformers)
    if name in COMPOSED:
        model.eval()
        with torch.no_grad():
            expected = first_tensor(run())
            handle = ctkernels.steer(model, {}, {}, activations=activation)
            assert torch.equal(first_tensor(run()), expected)
            handle.beta, handle.coeff = neutral(handle)
            torch.testing.assert_close(first_tensor(run()), expected, rtol=1e-4, atol=1e-5)
    else:
        tolerance = {} if activation == "relu" else {"rtol": 1e-4, "atol": 1e-5}
        handle = check(model, run, monkeypatch, [activation], **tolerance)
    assert len(handle.sites) == sites


# ----------------------------------------------------------------------------------------------------------------- timm

TIMM = {
    "resnet18": ("relu", 64),
    "resnetv2_50": ("relu", 64),
    "pnasnet5large": ("relu", 64),  # functional calls between the cells
    "mobilenetv3_small_050": ("relu", 64),
    "mobilevitv2_050": ("all", 64),  # functional ReLU in its attention, SiLU modules elsewhere
    "efficientnet_b0": ("all", 64),
    "convnext_atto": ("gelu", 64),  # a GELU class of its own, with a functional call
    "darknet53": ("leaky_relu", 64),
    "test_convnext": ("gelu_tanh", 64),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, cheap_init, monkeypatch):
    timm = pytest.importorskip("timm", reason="needs timm")
    activations, size = TIMM[name]
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, size, size)
    tolerance = {} if activations in RELU_FAMILY else {"rtol": 1e-3, "atol": 1e-4}
    chosen = list(ACTIVATIONS) if activations == "all" else [activations]
    check(model, lambda: model(x), monkeypatch, chosen, **tolerance)
