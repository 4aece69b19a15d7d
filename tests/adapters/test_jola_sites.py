"""Finding sites: the probe for unknown models, explicit targets, and errors that name the module."""

from __future__ import annotations

import pytest
import torch
from jola_families import inputs, output
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class OwnAttention(nn.Module):
    def __init__(self, width=8, heads=2, name="out_proj", fused=0):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        setattr(self, name, nn.Linear(width + fused, width))

    def forward(self, x):
        return x + self.out_proj(self.qkv(x)[..., : x.shape[-1]])


class OwnModel(nn.Module):
    def __init__(self, **values):
        super().__init__()
        self.blocks = nn.ModuleList(OwnAttention(**values) for _ in range(2))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def _sites(model):
    return [module.site for module in model.modules() if isinstance(module, adapters.JolaLayer)]


def test_an_unknown_model_is_probed():
    model = OwnModel()
    assert adapters.find_sites(model) == ["blocks.0.out_proj", "blocks.1.out_proj"]
    x = torch.randn(2, 3, 8)
    expected = model(x)
    wrapped = peft.get_peft_model(model, adapters.JolaConfig(init_std=0.5)).eval()
    assert _sites(wrapped) == ["blocks.0.out_proj", "blocks.1.out_proj"]
    edited = wrapped(x)
    assert (edited - expected).abs().max() > 1e-3
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(x), edited)


def test_an_unknown_transformers_model_is_probed(tmp_path):
    torch.manual_seed(0)
    config = transformers.MegatronBertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=64
    )
    model = transformers.MegatronBertModel(config).eval()
    wrapped = peft.get_peft_model(model, adapters.JolaConfig(init_std=0.5)).eval()
    assert _sites(wrapped) == [f"encoder.layer.{i}.attention.output.dense" for i in range(2)]
    wrapped.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(transformers.MegatronBertModel(config), tmp_path)
    assert torch.equal(output(again, inputs("bert")), output(wrapped, inputs("bert")))


def test_explicit_targets():
    names = ["blocks.1.out_proj"]
    assert _sites(peft.get_peft_model(OwnModel(), adapters.JolaConfig(target_modules=names))) == names
    pattern = r"blocks\.\d+\.out_proj"
    wrapped = peft.get_peft_model(OwnModel(), adapters.JolaConfig(target_modules=pattern, layers_to_transform=[0]))
    assert _sites(wrapped) == ["blocks.0.out_proj"]
    config = adapters.JolaConfig(target_modules=["out_proj"], exclude_modules=["blocks.0.out_proj"])
    assert _sites(peft.get_peft_model(OwnModel(), config)) == names
    other = peft.get_peft_model(OwnModel(), adapters.JolaConfig(target_modules=["out_proj"], head_dim=2))
    layer = next(module for module in other.modules() if isinstance(module, adapters.JolaLayer))
    assert (layer.num_heads, layer.head_dim) == (4, 2)


class WithTorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (
            OwnModel,
            {"target_modules": ["nothing"]},
            r"matched no module\. Linear modules of this model: blocks\.\*\.qkv",
        ),
        (OwnModel, {"target_modules": ["qkv"]}, r"blocks\.0\.qkv: expected an attention output projection"),
        (OwnModel, {"target_modules": ["blocks"]}, r"blocks: expected a linear projection .*, got ModuleList"),
        (OwnModel, {"target_modules": ["out_proj"], "head_dim": 3}, r"blocks\.0\.out_proj: expected an input of heads"),
        (OwnModel, {"layers_to_transform": [5]}, r"layers_to_transform=\[5\] matched no module"),
        (OwnModel, {"layers_to_transform": [0, 5]}, r"layers_to_transform and heads name \[5\], where no module"),
        (OwnModel, {"heads": {1: [0], "blocks.0.proj": [0]}}, r"name \['blocks\.0\.proj'\], where no module"),
        (OwnModel, {"heads": [2]}, r"blocks\.0\.out_proj: heads must be distinct and in 0\.\.1, got \[2\]"),
        (OwnModel, {"heads": [0, 0]}, r"heads must be distinct"),
        (
            WithTorchAttention,
            {"target_modules": ["out_proj"]},
            r"attention\.out_proj: MultiheadAttention gives its weights to",
        ),
        (WithTorchAttention, {}, "is not in the table of families and no attention output projection was recognised"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"target_modules": ["0"]}, "0: cannot read the head size"),
    ],
)
def test_errors_name_the_module_and_change_nothing(model, values, message):
    model = model()
    before = [(name, id(module)) for name, module in model.named_modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, adapters.JolaConfig(**values))
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_fused_layout_is_refused():
    model = OwnModel(fused=1)
    with pytest.raises(ValueError, match=r"blocks\.0\.out_proj: .*got 9 features; a fused projection"):
        peft.get_peft_model(model, adapters.JolaConfig(target_modules=["out_proj"], head_dim=4))


@pytest.mark.parametrize("name", ["xlnet", "wavlm", "mamba"])
def test_families_without_an_editable_projection_say_why(name):
    model = nn.Module()
    model.config = transformers.AutoConfig.for_model(name)
    with pytest.raises(ValueError, match=f"model_type '{name}' cannot be edited per head: its|it has"):
        peft.get_peft_model(model, adapters.JolaConfig())


def test_a_failed_second_adapter_leaves_the_first():
    model = peft.get_peft_model(OwnModel(), adapters.JolaConfig(init_std=0.5)).eval()
    x = torch.randn(2, 3, 8)
    before = model(x)
    with pytest.raises(ValueError, match="matched no module"):
        model.add_adapter("second", adapters.JolaConfig(target_modules=["nothing"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x), before)


def test_inputs_of_another_width_are_refused():
    layer = next(m for m in peft.get_peft_model(OwnModel(), adapters.JolaConfig()).modules() if hasattr(m, "site"))
    with pytest.raises(ValueError, match=r"blocks\.0\.out_proj: expected an input of 2 heads, got 1"):
        layer(torch.randn(2, 4))
