"""Files: saving, loading, corrupt and foreign adapters, interrupted saves, official checkpoints, registration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from jola_families import build, inputs, output

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama")
WEIGHTS = "adapter_model.safetensors"


def _model(**values):
    torch.manual_seed(2)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", **({"init_std": 0.3} | values))
    return peft.get_peft_model(build("llama"), config).eval()


@pytest.fixture
def saved(tmp_path):
    model = _model()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", output(model, VALUES)


def test_registration_is_idempotent_and_known_to_peft():
    adapters._peft.register("jola", adapters.JolaConfig, adapters.JolaModel)
    assert adapters._peft.add_peft_type("JOLA") is peft.PeftType.JOLA is peft.PeftType("JOLA")
    assert peft.PeftType.JOLA in list(peft.PeftType)
    assert adapters.JolaConfig().peft_type == "JOLA"


def test_without_peft_the_error_names_the_extra():
    code = "import sys; sys.modules['peft'] = None\nimport ctkernels\nimport ctkernels.adapters"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'ctkernels[adapters]'" in done.stderr.splitlines()[-1]


def test_config_roundtrip(tmp_path):
    config = adapters.JolaConfig(
        target_modules=["o_proj"], heads={1: [0, 2]}, stretch=(-0.2, 1.2), gate_estimator="mean", edit="additive"
    )
    config.save_pretrained(tmp_path)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, adapters.JolaConfig)
    for name in ("target_modules", "heads", "gate_estimator", "edit"):
        assert getattr(again, name) == getattr(config, name)
    assert tuple(again.stretch) == (-0.2, 1.2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"edit": "none"}, "edit must be one of"),
        ({"gate_estimator": "median"}, "gate_estimator must be one of"),
        ({"gate_sampling": "token"}, "gate_sampling must be one of"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"init_std": -1.0}, "init_std must be at least 0, got -1.0"),
        ({"stretch": (0.1, 1.1)}, r"stretch must be \(below 0, above 1\)"),
        ({"heads": "all"}, "heads must be None, a list of indices, or a dict .*, got 'all'"),
        ({"heads": {0: {"q": [1]}}}, "heads must be None, a list"),
        ({"heads": [0.5]}, "heads must be None, a list"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_config_errors_name_the_field(values, message):
    with pytest.raises(ValueError, match=message):
        adapters.JolaConfig(**values)


def test_reload_into_peft_and_autopeft(saved, tmp_path):
    folder, expected = saved
    again = peft.PeftModel.from_pretrained(build("llama"), folder, low_cpu_mem_usage=True).eval()
    assert torch.equal(output(again, VALUES), expected)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = peft.PeftModel.from_pretrained(build("llama"), folder, is_trainable=True)
    assert sum(parameter.requires_grad for parameter in trainable.parameters()) == 8
    build("llama").save_pretrained(tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(output(auto, VALUES), expected)


def test_a_second_adapter_loads_beside_the_first(saved):
    folder, expected = saved
    model = _model(init_std=0.7)
    other = output(model, VALUES)
    model.load_adapter(folder, "loaded")
    assert torch.equal(output(model.eval(), VALUES), other)
    model.set_adapter("loaded")
    assert torch.equal(output(model, VALUES), expected)


def test_other_trained_modules_are_saved_too(tmp_path):
    model = _model(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(output(again, VALUES), output(model, VALUES))


def test_other_trained_modules_are_in_the_merged_model(tmp_path):
    torch.manual_seed(2)
    base = transformers.LlamaForSequenceClassification(build("llama").config)
    config = adapters.JolaConfig(task_type="SEQ_CLS", init_std=0.3)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.mul_(2)
    expected = output(model, VALUES)
    adapters.save_merged(model, tmp_path)
    plain = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(plain, VALUES), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output(model, VALUES), expected)


def _load(folder):
    return peft.PeftModel.from_pretrained(build("llama"), folder)


def test_a_file_cut_short_is_refused(saved):
    folder, _ = saved
    whole = (folder / WEIGHTS).read_bytes()
    for length in (4, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="corrupt or cut short"):
            _load(folder)


def test_a_pickled_file_is_never_opened(saved, tmp_path):
    folder, _ = saved
    (folder / WEIGHTS).unlink()

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    torch.save({"weights": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"found adapter_model\.bin; pickled weights are not loaded"):
        _load(folder)
    assert not (tmp_path / "opened").exists()
    build("llama").save_pretrained(tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        _model().load_adapter(folder, "second")
    assert not (tmp_path / "opened").exists()
    model = _model()
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        adapters.save_adapter(model, tmp_path / "pickle", safe_serialization=False)


def test_foreign_configs_and_tensors_are_refused(saved):
    folder, _ = saved
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace('"JOLA"', '"LORA"'))
    with pytest.raises(ValueError, match="expected an adapter of type JOLA, got LORA"):
        adapters.JolaConfig.from_pretrained(folder)
    (folder / "adapter_config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="expected a JSON object with peft_type"):
        adapters.JolaConfig.from_pretrained(folder)
    (folder / "adapter_config.json").write_text(config)
    safetensors.save_file({"base_model.model.x.lora_A.weight": torch.zeros(2)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"expected tensors named jola_\*"):
        _load(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"expected adapter_config\.json, found none"):
        adapters.JolaConfig.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["foreign", "incomplete", "shape"])
def test_tensors_that_do_not_fit_change_nothing(saved, kind):
    folder, _ = saved
    tensors = safetensors.load_file(folder / WEIGHTS)
    name = next(iter(sorted(tensors)))
    value = tensors.pop(name)
    if kind == "foreign":
        tensors[name.replace("layers.0", "layers.7")] = value
    elif kind == "shape":
        tensors[name] = value[:-1].clone()
    safetensors.save_file(tensors, folder / WEIGHTS)
    model = _model(init_std=0.7)
    before = output(model, VALUES)
    message = {"foreign": "does not fit this model", "incomplete": "is incomplete", "shape": "expected shape"}[kind]
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "default")
    assert torch.equal(output(model, VALUES), before)


@pytest.mark.parametrize("save", ["adapter", "merged"])
def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch, save):
    model = _model()
    write = adapters.save_adapter if save == "adapter" else partial(adapters.save_merged, overwrite=True)
    write(model, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert any(name.endswith(".safetensors") for name in before)
    logits = output(model, VALUES)

    def interrupted(self, folder, *args, **kwargs):
        (
            folder / "model.safetensors" if save == "merged" else __import__("pathlib").Path(folder) / WEIGHTS
        ).write_bytes(b"half")
        raise KeyboardInterrupt

    owner = peft.PeftModel if save == "adapter" else type(model.get_base_model())
    monkeypatch.setattr(owner, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert torch.equal(output(model, VALUES), logits)
    with pytest.raises(ValueError, match="path must be a folder, got the file"):
        write(model, tmp_path / "out" / ("adapter_config.json" if save == "adapter" else "config.json"))


def test_save_merged_needs_unmerged_adapters(tmp_path):
    model = _model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="save_merged needs unmerged adapters"):
        adapters.save_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _official(layers=2, heads=4, size=8):
    torch.manual_seed(4)
    tensors = {}
    for layer in range(layers):
        base = f"model.layers.{layer}.self_attn"
        for head in range(heads):
            tensors[f"{base}.attn_A.{head}"] = torch.randn(size)
            tensors[f"{base}.attn_v.{head}"] = torch.randn(size)
        tensors[f"{base}.log_g1"] = torch.randn(heads, 1)
        tensors[f"{base}.log_g2"] = torch.randn(heads, 1)
        tensors[f"{base}.o_proj.weight"] = torch.zeros(1)
    return tensors


def _official_edit(tensors, layer, z):
    """The released code's eval path: clip(sigmoid(log_g) * 1.2 - 0.1), g1 on v, g2 on A."""
    base = f"model.layers.{layer}.self_attn"
    g1, g2 = ((torch.sigmoid(tensors[f"{base}.log_g{i}"]) * 1.2 - 0.1).clamp(0, 1) for i in (1, 2))
    z = z.clone()
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        scale = tensors[f"{base}.attn_A.{head}"] * g2[head] + 1
        z[..., part] = scale * z[..., part] + g1[head] * tensors[f"{base}.attn_v.{head}"]
    return z


@pytest.mark.parametrize("source", ["state dict", "file", "shards"])
def test_official_checkpoints(tmp_path, source):
    tensors = _official()
    model = _model()
    if source == "state dict":
        adapters.load_official(model, tensors)
    elif source == "file":
        safetensors.save_file(tensors, tmp_path / "model.safetensors")
        adapters.load_official(model, tmp_path / "model.safetensors")
    else:
        names = sorted(tensors)
        shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
        for file, own in shards.items():
            safetensors.save_file({name: tensors[name] for name in own}, tmp_path / file)
        index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        adapters.load_official(model, tmp_path)
    z = torch.randn(2, 3, 32)
    layers = [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]
    for index, layer in enumerate(layers):
        torch.testing.assert_close(layer.edit(z, "default"), _official_edit(tensors, index, z))


def test_official_checkpoints_that_do_not_fit(tmp_path):
    model = _model()
    before = output(model, VALUES)
    with pytest.raises(ValueError, match="got none"):
        adapters.load_official(model, {"model.layers.0.mlp.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected attn_A of 4 heads, got 2 tensors"):
        adapters.load_official(model, _official(heads=2))
    with pytest.raises(ValueError, match=r"expected attn_A of shape \(4, 8\), got \(4, 16\)"):
        adapters.load_official(model, _official(size=16))
    with pytest.raises(ValueError, match=r"edits layers \[2\], which adapter 'default' does not"):
        adapters.load_official(model, _official(layers=3))
    torch.save({}, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"pickled files are not loaded"):
        adapters.load_official(model, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"pickled checkpoints are not loaded"):
        adapters.load_official(model, tmp_path)
    assert torch.equal(output(model, VALUES), before)
