"""Files: saving, loading, corrupt and foreign adapters, interrupted saves, official checkpoints, registration."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
import warnings
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


def test_registration_is_in_pefts_tables_and_leaves_its_enum_alone():
    adapters._peft.register("jola", adapters.JolaConfig, adapters.JolaModel)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["JOLA"] is adapters.JolaConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["JOLA"] is adapters.JolaModel
    assert "JOLA" not in peft.PeftType.__members__
    assert len(peft.PeftType.__members__) == len(list(peft.PeftType))
    key = adapters.JolaConfig().peft_type
    assert (key, key.value) == ("JOLA", "JOLA")
    assert pickle.loads(pickle.dumps(key)) == key


def test_a_method_that_peft_has_itself_is_left_alone(tmp_path):
    """As if peft had JoLA: the name is peft's, and this package's class is reached through its configuration."""
    code = """
import enum, sys
import peft, peft.utils.peft_types as types

members = {member.name: member.value for member in types.PeftType} | {"JOLA": "JOLA"}
types.PeftType = peft.PeftType = enum.Enum("PeftType", members, type=str)
peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.JOLA] = peft.LoraConfig
peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.JOLA] = peft.LoraModel
import ctkernels.adapters as adapters

assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["JOLA"] is peft.LoraConfig
config = adapters.JolaConfig(gate_rate=3.0)
assert peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type] is adapters.JolaModel
assert config.peft_type.value == config.to_dict()["peft_type"] == "JOLA"
config.save_pretrained(sys.argv[1])
(file,) = (path for path in __import__("pathlib").Path(sys.argv[1]).glob("*.json"))
values = __import__("json").loads(file.read_text())
assert values["peft_type"] == "JOLA"
loaded = adapters.JolaConfig.from_peft_type(**values)
assert type(loaded) is adapters.JolaConfig and loaded.gate_rate == 3.0 and loaded.peft_type == config.peft_type
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


# ------------------------------------------------------------------------------------------- where and over what to save

SAVERS = {"adapter": adapters.save_adapter, "merged": adapters.save_merged}


def _reads(kind, folder):
    if kind == "merged":
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return peft.PeftModel.from_pretrained(build("llama"), folder).eval()


@pytest.mark.parametrize("kind", SAVERS)
def test_saving_into_a_folder_that_is_elsewhere(tmp_path, kind):
    model, expected = _model(), output(_model(), VALUES)
    elsewhere = tmp_path / "mounted"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    SAVERS[kind](model, tmp_path / "link")
    torch.testing.assert_close(output(_reads(kind, elsewhere), VALUES), expected, rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "mounted"]
    assert not [file.name for file in elsewhere.iterdir() if file.name.startswith(".")]


def test_files_go_to_another_file_system_too(tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir=shared) as other:
        model = _model()
        model.add_adapter("second", model.peft_config["default"])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "second").symlink_to(other)
        adapters.save_adapter(model, tmp_path / "out")
        assert sorted(os.listdir(other)) == ["README.md", "adapter_config.json", WEIGHTS]
        assert torch.equal(output(_reads("adapter", tmp_path / "out"), VALUES), output(model, VALUES))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process of another user")
@pytest.mark.parametrize("kind", SAVERS)
def test_only_the_folder_itself_has_to_be_writable(kind):
    model = _model()
    with tempfile.TemporaryDirectory() as parent:
        Path(parent, "out").mkdir()
        os.chmod(Path(parent, "out"), 0o777)
        os.chmod(parent, 0o555)
        child = os.fork()
        if child == 0:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)  # root may write anywhere
            try:
                SAVERS[kind](model, Path(parent, "out"))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        os.chmod(parent, 0o755)
        torch.testing.assert_close(
            output(_reads(kind, f"{parent}/out"), VALUES), output(model, VALUES), rtol=1e-4, atol=1e-5
        )


def test_a_used_folder_is_refused_and_overwritten_only_on_request(tmp_path):
    first, second = _model(), _model(init_std=0.6)
    adapters.save_merged(first, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"got .*out with model\.safetensors.*overwrite=True to take them out"):
        adapters.save_merged(second, tmp_path / "out", max_shard_size="20KB")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "notes.txt").write_text("kept")
    adapters.save_merged(second, tmp_path / "out", overwrite=True, max_shard_size="20KB")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "model.safetensors" not in names
    assert {"model.safetensors.index.json", "notes.txt"} < names
    torch.testing.assert_close(
        output(_reads("merged", tmp_path / "out"), VALUES), output(second, VALUES), rtol=1e-4, atol=1e-5
    )


def test_an_adapter_beside_a_merged_model_would_be_applied_again(tmp_path):
    model = _model()
    expected = output(model, VALUES)
    adapters.save_adapter(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"with adapter_config\.json, adapter_model\.safetensors"):
        adapters.save_merged(model, tmp_path / "out")
    adapters.save_merged(model, tmp_path / "out", overwrite=True)
    again = _reads("merged", tmp_path / "out")
    assert type(again.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    torch.testing.assert_close(output(again, VALUES), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected a folder without a model in it"):
        adapters.save_adapter(model, tmp_path / "out")


def test_an_error_between_two_renames_puts_the_old_files_back(tmp_path, monkeypatch):
    adapters.save_merged(_model(), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    replace, left = os.replace, list(range(3))

    def failing(source, destination):
        if "new" in Path(source).parts and not left:
            left.append("once")
            raise OSError("disk full")
        if left:
            left.pop()
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        adapters.save_merged(_model(init_std=0.6), tmp_path / "out", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["a/b", "..", "/abs", "", " ", "a.b", "a\\b", "C:x", "a\nb", "values", "__base__"])
@pytest.mark.parametrize("config", [adapters.JolaConfig, adapters.CurvatureConfig])
def test_names_of_adapters_are_no_paths(name, config):
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()) if config is not adapters.JolaConfig else None
    base = build("llama") if base is None else base
    before = list(base.state_dict())
    with pytest.raises(ValueError, match="adapter_name must"):
        peft.get_peft_model(base, config(), adapter_name=name)
    assert list(base.state_dict()) == before
    model = peft.get_peft_model(base, config())
    with pytest.raises(ValueError, match="adapter_name must"):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["default"]


def test_names_of_foreign_adapters_are_no_paths_when_saved(tmp_path):
    lora = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(build("llama"), lora, adapter_name="up/there")
    with pytest.raises(ValueError, match="adapter_name must not contain '/', got 'up/there'"):
        adapters.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ loads all or nothing


def _state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["layers", "overwrites", "nan", "infinity", "shape", "incomplete", "saved module"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_failed_load_leaves_the_model_as_it_was(tmp_path, kind, trainable):
    made = _model(modules_to_save=["lm_head"])
    made.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / WEIGHTS)
    name = next(key for key in sorted(tensors) if "jola_m" in key)
    if kind == "layers":
        tensors[name.replace("layers.0", "layers.2")] = tensors[name].clone()
    elif kind == "overwrites":
        tensors["base_model.model.model.norm.weight"] = torch.zeros(32)
    elif kind in ("nan", "infinity"):
        tensors[name][0, 0] = float("nan" if kind == "nan" else "inf")
    elif kind == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif kind == "incomplete":
        del tensors[name]
    else:
        tensors["base_model.model.lm_head.weight"] = torch.zeros(3, 32)
    safetensors.save_file(tensors, tmp_path / WEIGHTS)
    message = {
        "layers": r"does not fit this model: unknown \['model\.layers\.2",
        "overwrites": r"would overwrite model\.norm\.weight of the base model",
        "nan": "expected finite values, got NaN or infinity in .*jola_m",
        "infinity": "expected finite values, got NaN or infinity in .*jola_m",
        "shape": r"o_proj\.jola_m: expected shape \(4, 8\), got \(3, 8\)",
        "incomplete": r"is incomplete: missing .*jola_m",
        "saved module": r"lm_head\.weight: expected shape \(64, 32\), got \(3, 32\)",
    }[kind]
    base = build("llama")
    state, flags = _state(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=trainable)
    assert {type(module) for module in base.modules()} == {type(module) for module in build("llama").modules()}
    assert [p.requires_grad for p in base.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    model = _model(init_std=0.7)
    state = _state(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second", is_trainable=trainable)
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_configuration_can_be_used_without_its_weights(saved):
    folder, _ = saved
    config = adapters.JolaConfig.from_pretrained(folder)
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**build("llama").config.to_dict() | {"num_hidden_layers": 3})
    )
    with pytest.raises(ValueError, match="is incomplete"):
        peft.get_peft_model(other, config)
    model = peft.get_peft_model(other, dataclasses.replace(config))
    assert sum(isinstance(module, adapters.JolaLayer) for module in model.modules()) == 3


def test_resized_embeddings_are_loaded_with_a_warning(tmp_path):
    base = build("llama")
    base.resize_token_embeddings(70)
    model = peft.get_peft_model(base, adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.3)).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    expected = output(model, VALUES)
    again = build("llama")
    again.resize_token_embeddings(70)
    with pytest.warns(UserWarning, match="replaces the base model's embeddings"):
        loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    assert torch.equal(output(loaded, VALUES), expected)


# ------------------------------------------------------------------------------------------------------------ runtimes


def test_unloading_names_a_runtime_that_would_lose_the_additive_edits():
    def unload(family, **values):
        torch.manual_seed(2)
        config = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.3, **values)
        peft.get_peft_model(build(family), config).eval().merge_and_unload()

    with pytest.warns(UserWarning, match=r"vLLM builds .* without a bias .* do not serve this merged model with it"):
        unload("qwen3")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(vLLM|llama.cpp).*")
        unload("qwen3", edit="multiplicative")
        unload("llama")


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
