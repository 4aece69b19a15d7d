"""A joint adapter on disk: what is saved is what is loaded, and what does not fit changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from jola_families import build, inputs, output
from test_joint import config, joint, shaken

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = {
    "plain": {},
    "lora": {"lora": ["q_proj", "o_proj"]},
    "parts": {
        "jola": adapters.JolaConfig(heads={"0": {"m": [1], "a": [0, 2]}}, edit="both"),
        "curvature": adapters.CurvatureConfig(granularity="shared"),
    },
}


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    model = joint(**KINDS[request.param])
    adapters.measure_units(model, [VALUES])
    adapters.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", output(model, VALUES)


def _load(folder, **options):
    return peft.PeftModel.from_pretrained(build("llama"), folder, **options).eval()


def test_what_is_saved_is_what_is_loaded_bit_for_bit(saved, tmp_path):
    folder, expected = saved
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        again = _load(folder, **options)
        assert torch.equal(output(again, VALUES), expected)
        assert any(p.requires_grad for p in again.parameters()) == ("is_trainable" in options)
        again.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        first, second = (json.loads((place / CONFIG).read_text()) for place in (folder, tmp_path / "again"))
        assert first == second
    again.load_adapter(folder, "second")
    again.set_adapter("second")
    assert torch.equal(output(again.eval(), VALUES), expected)


def test_the_configuration_comes_back_with_its_parts(saved):
    folder, _ = saved
    loaded = peft.PeftConfig.from_pretrained(folder)
    assert isinstance(loaded, adapters.JointConfig)
    assert loaded.jola.gate_rate == 10.0
    assert set(loaded.curvature.layout) == {f"model.layers.{i}.mlp.act_fn" for i in range(2)}
    assert loaded.lora is None or loaded.lora.target_modules == {"q_proj", "o_proj"}


def test_heads_trained_beside_it_are_saved_too(tmp_path):
    torch.manual_seed(2)
    base = transformers.LlamaForSequenceClassification(build("llama").config).eval()
    given = config(lora=["q_proj"])
    given.task_type = "SEQ_CLS"
    model = shaken(peft.get_peft_model(base, given)).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.mul_(2)
    expected = output(model, VALUES)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base.__class__(base.config), tmp_path)
    again.base_model.model.model.load_state_dict(model.base_model.model.model.state_dict())
    assert torch.equal(output(again, VALUES), expected)


def test_the_tensors_are_those_of_the_methods_files(tmp_path):
    jola = peft.get_peft_model(build("llama"), adapters.JolaConfig(init_std=0.3)).eval()
    units = peft.get_peft_model(build("llama"), adapters.CurvatureConfig(init_beta=0.3)).eval()
    tensors = {}
    for name, alone in (("jola", jola), ("units", units)):
        alone.save_pretrained(tmp_path / name)
        tensors |= peft.load_peft_weights(str(tmp_path / name))
    model = joint()
    peft.set_peft_model_state_dict(model, tensors)
    for own, alone in zip(("jola_", "curvature_"), (jola, units)):
        theirs = alone.state_dict()
        both = {name: value for name, value in model.state_dict().items() if own in name}
        assert both.keys() == {name for name in theirs if own in name}
        assert all(torch.equal(value, theirs[name]) for name, value in both.items())
    before = output(model, VALUES)
    with pytest.raises(ValueError, match=r"The adapter is incomplete: missing \[.*curvature_raw_beta"):
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(tmp_path / "jola")))
    assert torch.equal(output(model, VALUES), before)


# ---- files that do not fit ---------------------------------------------------------------------------------------------


def _first(tensors, part):
    return next(name for name in sorted(tensors) if part in name)


def _without(part, tensors):
    return {name: value for name, value in tensors.items() if part not in name}


def _cut(part, tensors):
    name = _first(tensors, part)
    return tensors | {name: tensors[name][:-1].clone()}


BROKEN = {
    "no curvature": (lambda t: _without("curvature_", t), r"expected tensors named curvature_\*"),
    "no JoLA": (lambda t: _without("jola_", t), r"expected tensors named jola_\*"),
    "no LoRA": (lambda t: _without("lora_", t), r"expected tensors named lora_\*"),
    "a site is missing": (lambda t: _without("layers.1.mlp", t), "The adapter is incomplete: missing .*layers.1.mlp"),
    "a matrix is missing": (lambda t: _without("layers.0.self_attn.q_proj.lora_A", t), "incomplete: missing .*lora_A"),
    "of a longer model": (
        lambda t: t | {name.replace("layers.1", "layers.2"): v.clone() for name, v in t.items()},
        "The adapter does not fit this model: unknown .*layers.2",
    ),
    "fewer channels": (lambda t: _cut("curvature_raw_beta", t), r"expected shape \(32,\), got \(31,\)"),
    "fewer heads": (lambda t: _cut("jola_m", t), r"expected shape \(4, 8\), got \(3, 8\)"),
    "a lower rank": (lambda t: _cut("lora_A", t), r"expected shape \(2, 32\), got \(1, 32\)"),
    "NaN": (lambda t: t | {_first(t, "jola_m"): t[_first(t, "jola_m")] * float("nan")}, "expected finite values"),
    "a weight of the base": (
        lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(32)},
        r"would overwrite model.norm.weight of the base model: expected tensors named lora_\*, jola_\*, curvature_\*",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(kind, tmp_path):
    change, message = BROKEN[kind]
    joint(lora=["q_proj", "o_proj"]).save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / WEIGHTS)
    safetensors.save_file(change(tensors), tmp_path / WEIGHTS)
    base = build("llama")
    modules, flags = dict(base.named_modules()), [p.requires_grad for p in base.parameters()]
    kinds = {name: type(module) for name, module in modules.items()}
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert dict(base.named_modules()) == modules
    assert {name: type(module) for name, module in base.named_modules()} == kinds
    assert [p.requires_grad for p in base.parameters()] == flags
    model = shaken(joint(lora=["q_proj", "o_proj"]), seed=7)
    before, keys = output(model, VALUES), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model, VALUES), before)


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if "base" not in kind])
def test_over_an_adapter_that_is_there_it_changes_nothing_either(kind, tmp_path):
    change, message = BROKEN[kind]
    joint(lora=["q_proj", "o_proj"]).save_pretrained(tmp_path)
    safetensors.save_file(change(safetensors.load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    model = shaken(joint(lora=["q_proj", "o_proj"]), seed=7)
    before = output(model, VALUES)
    with pytest.raises(ValueError, match="The adapter is incomplete: missing" if kind.startswith("no ") else message):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(output(model, VALUES), before)


def test_files_of_other_kinds_are_refused(tmp_path):
    alone = peft.get_peft_model(build("llama"), adapters.JolaConfig())
    alone.save_pretrained(tmp_path / "jola")
    joint().save_pretrained(tmp_path / "joint")
    with pytest.raises(ValueError, match="expected an adapter of type JOINT, got JOLA"):
        adapters.JointConfig.from_pretrained(tmp_path / "jola")
    with pytest.raises(ValueError, match="expected an adapter of type JOLA, got JOINT"):
        adapters.JolaConfig.from_pretrained(tmp_path / "joint")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        alone.load_adapter(tmp_path / "joint", "second")
    values = json.loads((tmp_path / "joint" / CONFIG).read_text())
    values["curvature"]["peft_type"] = "JOLA"
    (tmp_path / "joint" / CONFIG).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="curvature must be a CurvatureConfig, got JolaConfig"):
        _load(tmp_path / "joint")


def test_an_official_checkpoint_of_one_method_leaves_the_other():
    model = joint()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    official = {}
    for layer in range(2):
        for head in range(4):
            for name in ("attn_A", "attn_v"):
                official[f"model.layers.{layer}.self_attn.{name}.{head}"] = torch.randn(8, generator=generator)
        for name in ("log_g1", "log_g2"):
            official[f"model.layers.{layer}.self_attn.{name}"] = torch.randn(4, 1, generator=generator)
    adapters.load_official(model, official)
    layer = next(module for module in model.modules() if isinstance(module, adapters.JolaLayer))
    assert torch.equal(layer.vectors("m", "default")[1], official["model.layers.0.self_attn.attn_A.1"])
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "jola_" not in name)
    with pytest.raises(ValueError, match=r"expected tensors named layers\.N\.self_attn\.attn_A"):
        adapters.load_official(model, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_dtype_of_parameters(dtype, autocast, tmp_path):
    """`autocast_adapter_dtype=False` leaves them in the base's dtype; logits of beta and coeff, which have none, in float32."""

    def dtypes(model):
        found = {}
        for name, parameter in model.named_parameters():
            method = next((method for method in ("jola", "curvature", "lora") if f".{method}_" in name), None)
            if method is not None:
                adapter = "other" if ".other" in name else "default"
                found.setdefault((adapter, method), set()).add(parameter.dtype)
        return found

    own = torch.float32 if autocast else dtype
    expected = {
        (adapter, method): {torch.float32 if method == "curvature" else own}
        for adapter in ("default", "other")
        for method in ("jola", "curvature", "lora")
    }
    values = {"lora": ["q_proj", "o_proj"]}
    model = peft.get_peft_model(build("llama").to(dtype), config(**values), autocast_adapter_dtype=autocast)
    model.add_adapter("other", config(**values), autocast_adapter_dtype=autocast)
    assert dtypes(model) == expected
    model.save_pretrained(tmp_path)
    for low in (False, True):
        options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low}
        again = peft.PeftModel.from_pretrained(build("llama").to(dtype), tmp_path, **options)
        again.load_adapter(tmp_path / "other", adapter_name="other", **options)
        assert dtypes(again) == expected
