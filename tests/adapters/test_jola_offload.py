"""Weights that are elsewhere: models offloaded by accelerate, and models made on the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from jola_families import build, inputs, output

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama")
DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def _config(**values):
    return adapters.JolaConfig(task_type="CAUSAL_LM", **({"init_std": 0.4} | values))


def _offloaded(how, tmp_path):
    model = build("llama").eval()
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model.save_pretrained(tmp_path / "base")
    options = {"device_map": DISK, "offload_folder": tmp_path / "offload"}
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options).eval()


def _layers(model):
    return [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]


def _resident(model):
    """The same adapter on the same base, all in memory."""
    twin = peft.get_peft_model(build("llama"), _config()).eval()
    with torch.no_grad():
        for layer, other in zip(_layers(model), _layers(twin)):
            for name in layer.adapter_layer_names:
                getattr(other, name)["default"].copy_(getattr(layer, name)["default"])
    return twin


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_base_is_edited_merged_and_saved(how, tmp_path):
    base = _offloaded(how, tmp_path)
    plain = output(base, VALUES)
    model = peft.get_peft_model(base, _config()).eval()
    assert {p.device.type for n, p in model.named_parameters() if "jola_" in n} == {"cpu"}
    twin = _resident(model)
    expected = output(twin, VALUES)
    assert torch.equal(output(model, VALUES), expected)
    twin.merge_adapter()
    merged = output(twin, VALUES)
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(output(model, VALUES), merged)
        assert _layers(model)[-1].base_layer.weight.is_meta
        model.unmerge_adapter()
        assert torch.equal(output(model, VALUES), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, VALUES), plain)
    adapters.save_merged(model, tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(output(again, VALUES), merged)
    assert torch.equal(output(model, VALUES), expected)
    adapters.save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    assert torch.equal(output(loaded, VALUES), expected)
    assert torch.equal(output(model.merge_and_unload(), VALUES), merged)


def test_an_adapter_loads_onto_an_offloaded_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # peft writes the offloaded weights below the current folder
    trained = peft.get_peft_model(build("llama"), _config()).eval()
    adapters.save_adapter(trained, tmp_path / "adapter")
    model = peft.get_peft_model(_offloaded("disk", tmp_path), _config()).eval()
    peft.set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path / "adapter"))
    assert {p.device.type for n, p in model.named_parameters() if "jola_" in n} == {"cpu"}
    assert torch.equal(output(model, VALUES), output(trained, VALUES))
    device_map = {f"base_model.model.{name}": device for name, device in DISK.items()}
    options = {"device_map": device_map, "offload_folder": tmp_path / "again"}
    with pytest.raises(ValueError, match=r"offloaded to disk without their values.*set_peft_model_state_dict"):
        peft.PeftModel.from_pretrained(_offloaded("disk", tmp_path), tmp_path / "adapter", **options)


def test_a_model_offloaded_after_the_adapter_was_put_on():
    model = peft.get_peft_model(build("llama"), _config(heads=[1, 3])).eval()
    expected = output(model, VALUES)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(output(model, VALUES), expected)
    assert {p.device.type for n, p in model.named_parameters() if "jola_" in n} == {"cpu"}


def test_over_an_offloaded_base_other_methods_are_not_merged_into_nothing(tmp_path):
    model = peft.get_peft_model(_offloaded("cpu", tmp_path), _config())
    lora = peft.LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    stacked = peft.get_peft_model(model, lora).eval()
    with pytest.raises(ValueError, match=r"o_proj: cannot merge a Linear over a JolaLayer .* offloaded"):
        stacked.merge_adapter()
    assert not any(layer.merged for layer in _layers(stacked))


@pytest.mark.parametrize("heads", [{0: [1, 3], 1: [0, 2]}, [0], [3, 1], {0: {"m": [2, 3], "a": []}, 1: [0, 1, 3]}])
def test_the_heads_that_are_edited_survive_the_meta_device(heads, tmp_path):
    trained = peft.get_peft_model(build("llama"), _config(heads=heads)).eval()
    expected = output(trained, VALUES)
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(build("llama").config)
    model = peft.get_peft_model(base, _config(heads=heads))
    model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict())
    model.base_model.model.model.rotary_emb = copy.deepcopy(build("llama").model.rotary_emb)
    assert torch.equal(output(model.eval(), VALUES), expected)
    trained.save_pretrained(tmp_path)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(output(again, VALUES), expected)
    with torch.device("meta"):
        inside = peft.get_peft_model(transformers.LlamaForCausalLM(build("llama").config), _config(heads=heads))
    assert {p.device.type for p in inside.parameters()} == {"meta"}
    inside.to_empty(device="cpu")
    inside.load_state_dict(trained.state_dict())
    for layer, other in zip(_layers(inside), _layers(trained)):
        z = torch.randn(2, 3, 32)
        assert torch.equal(layer.eval().edit(z, "default"), other.edit(z, "default"))


@pytest.mark.parametrize("values", [{}, {"granularity": "layer"}])
def test_a_curvature_adapter_on_an_offloaded_network(values):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = peft.get_peft_model(copy.deepcopy(net), adapters.CurvatureConfig(**values)).eval()(x)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    model = peft.get_peft_model(net, adapters.CurvatureConfig(**values)).eval()
    assert {p.device.type for p in model.parameters() if p.requires_grad} == {"cpu"}
    assert torch.equal(model(x), expected)
    late = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), adapters.CurvatureConfig()
    )
    before = late.eval()(x)
    accelerate.cpu_offload(late, execution_device=torch.device("cpu"))
    assert torch.equal(late(x), before)
