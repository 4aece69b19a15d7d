"""Merged models for runtimes: where additive edits go, what is refused, and that every save is checked."""

from __future__ import annotations

import copy

import pytest
import torch
from jola_families import build, inputs, output

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

from ctkernels.adapters import saving  # noqa: E402
from ctkernels.adapters.jola import layer as jola_layer  # noqa: E402
from ctkernels.adapters.jola import runtimes  # noqa: E402
from ctkernels.adapters.serving import engines, placement, verify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama")


def _model(family="qwen3", base=None, **values):
    torch.manual_seed(2)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", **({"init_std": 0.4} | values))
    return peft.get_peft_model(build(family) if base is None else base, config).eval()


def _wide_heads(family):
    """As many heads of values as there are heads."""
    config = copy.deepcopy(build(family).config)
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model


def _reloaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def _unchanged(model, before, config):
    assert {name: value.shape for name, value in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


# family, what is merged, the place, the architecture that is saved
PLACES = [
    ("llama", {}, "biases of the output projections", "LlamaForCausalLM"),
    ("gemma2", {"target": "vllm"}, "biases of the output projections", "Gemma2ForCausalLM"),
    ("gemma2", {"additive": "kv_group"}, "biases of the value projections", "Gemma2ForCausalLM"),
    ("granite", {}, "biases of the output projections", "GraniteForCausalLM"),
    ("qwen3", {"additive": "kv_group"}, "biases of the value projections", "Qwen3ForCausalLM"),
    ("qwen3", {"target": "transformers"}, "biases of the output projections", "Qwen3ForCausalLM"),
    ("qwen3", {"edit": "multiplicative"}, "the weights alone", "Qwen3ForCausalLM"),
    ("qwen2", {"additive": "kv_group"}, "biases of the value projections", "Qwen2ForCausalLM"),
    ("qwen2", {}, "biases of the output projections of a llama model", "LlamaForCausalLM"),
    ("mistral", {}, "biases of the output projections of a llama model", "LlamaForCausalLM"),
    ("glm4", {"additive": "kv_group"}, "biases of the value projections", "Glm4ForCausalLM"),
    ("stablelm", {"additive": "kv_group", "target": "vllm"}, "biases of the value projections", "StableLmForCausalLM"),
    ("opt", {}, "the weights alone", "OPTForCausalLM"),
]


def _mistral_without_window(base):
    base.config.sliding_window = None
    return base


@pytest.mark.parametrize(("family", "values", "place", "architecture"), PLACES)
def test_where_additive_edits_go(tmp_path, family, values, place, architecture):
    base = build(family)
    if family == "mistral":
        base = _mistral_without_window(base)
    target = values.get("target")
    model = _model(base=base, **{key: value for key, value in values.items() if key != "target"})
    expected = output(model, VALUES)
    plain = model.get_base_model()
    before, config = {k: v.clone() for k, v in plain.state_dict().items()}, plain.config.to_dict()
    merged = adapters.save_merged(model, tmp_path / "out", target=target)
    assert merged.place == place
    assert merged.checked_in == "transformers"
    assert merged.error <= merged.tolerance < merged.edit / 100
    assert f"additive edits in {place}; run in transformers, it is off by" in str(merged)
    again = _reloaded(tmp_path / "out")
    assert type(again).__name__ == architecture
    assert (output(again, VALUES) - expected).abs().max() <= 2 * merged.tolerance
    _unchanged(plain, before, config)
    assert torch.equal(output(model, VALUES), expected)


def test_as_many_heads_of_values_as_heads_need_no_groups(tmp_path):
    model = _model(base=_wide_heads("qwen3"))
    expected = output(model, VALUES)
    merged = adapters.save_merged(model, tmp_path / "out")
    assert merged.place == "biases of the value projections"
    assert merged.targets == ("transformers", "vllm", "llama.cpp")
    assert (output(_reloaded(tmp_path / "out"), VALUES) - expected).abs().max() <= 2 * merged.tolerance


def test_a_folder_for_the_converter_of_llama_cpp_has_no_tensors_that_llama_cpp_refuses(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = _model(additive="kv_group")
    expected = output(model, VALUES)
    for target, present in ((None, True), ("llama.cpp", False)):
        folder = tmp_path / str(target)
        merged = adapters.save_merged(model, folder, target=target)
        names = safetensors.load_file(folder / "model.safetensors")
        assert any(name.endswith("o_proj.bias") for name in names) is present
        assert any(name.endswith("v_proj.bias") for name in names)
        assert (output(_reloaded(folder), VALUES) - expected).abs().max() <= 2 * merged.tolerance


def test_what_no_runtime_would_read_is_refused_and_said_which_would(tmp_path):
    model = _model()
    expected = output(model, VALUES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    message = (
        r"no place that transformers, vLLM, llama\.cpp would read\. as biases of the output projections: vLLM builds .* "
        r"as biases of the value projections: .*2 heads share values, and their offsets differ.* "
        r"Ways out: target='transformers', training with additive='kv_group'"
    )
    with pytest.raises(ValueError, match=message):
        adapters.save_merged(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"target: expected one of transformers, vllm, llama\.cpp, got 'tgi'"):
        adapters.save_merged(model, tmp_path / "out", target="tgi")
    for target, words in (("vllm", "vLLM builds"), ("llama.cpp", "llama.cpp refuses the file")):
        with pytest.raises(ValueError, match=f"as biases of the output projections: {words}"):
            adapters.save_merged(model, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(model, VALUES), expected)


def test_attention_that_sees_a_part_is_not_that_of_llama(tmp_path):
    config = copy.deepcopy(build("mistral").config)
    config.sliding_window = 16
    base = transformers.MistralForCausalLM(config).eval()
    with pytest.raises(ValueError, match="its attention sees 16 tokens back, and that of 'llama' sees all"):
        adapters.save_merged(_model(base=base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attention_with_sinks_has_no_place_in_its_values(tmp_path):
    """gpt_oss has a bias in its output projection; without it, what remains is refused."""
    model = _model("gpt_oss", additive="kv_group")
    (layer, *_) = [m for m in model.modules() if isinstance(m, adapters.JolaLayer)]
    edited = [placement.EditedSite(layer.site, layer, True)]
    plain = model.unload()
    found = placement._in_value(plain, edited, ("transformers",), lambda target: False)
    assert "has sinks, so that its weights do not sum to 1" in found


def test_gated_attention_is_found_out_by_running_it(tmp_path, monkeypatch):
    """qwen3_next multiplies what attention puts out by a gate: an offset of the values is another thing there."""
    model = _model("qwen3_next", additive="kv_group")
    with monkeypatch.context() as patch:
        patch.setattr(placement, "_in_output", lambda *_: "not to be taken")
        with pytest.raises(ValueError, match=r"The merged model is not what was adapted, so it was not saved"):
            adapters.save_merged(model, tmp_path / "out", target="transformers")
        with pytest.raises(ValueError, match=r"verify must be True where additive edits become biases of the value"):
            adapters.save_merged(model, tmp_path / "out", target="transformers", verify=False)
    assert not (tmp_path / "out").exists()
    assert adapters.save_merged(model, tmp_path / "out", target="transformers", verify=False).checked_in == ""


def test_a_wrong_merge_is_not_saved(tmp_path, monkeypatch):
    """As large an error as leaving the additive edits out is noticed, and as small as a few ulps of one weight."""
    model = _model("llama", init_std=0.05)
    expected = output(model, VALUES)

    def forgetful(base, weight, bias, p, q, output):
        return weight * p, None

    def rough(base, weight, bias, p, q, output):
        new = weight * p
        new[0, 0] += 1e-3
        return new, weight @ q

    for wrong in (forgetful, rough):
        with monkeypatch.context() as patch:
            patch.setattr(jola_layer, "folded", wrong)
            with pytest.raises(ValueError, match=r"it was not saved\. .*off by .* where rounding allows"):
                adapters.save_merged(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert torch.equal(output(model, VALUES), expected)
    adapters.save_merged(model, tmp_path / "out")


def test_adapters_over_jola_keep_its_offset_out_of_the_values(tmp_path):
    lora = peft.LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(_model(additive="kv_group"), lora, adapter_name="over").eval()
    with pytest.raises(
        ValueError, match=r"another adapter wraps the JoLA adapter of .*o_proj, and would see the offset"
    ):
        adapters.save_merged(model, tmp_path / "out")
    below = peft.get_peft_model(build("qwen3"), lora)
    torch.manual_seed(2)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.4, additive="kv_group")
    model = peft.get_peft_model(below, config, adapter_name="jola").eval()
    expected = output(model, VALUES)
    merged = adapters.save_merged(model, tmp_path / "out")
    assert merged.place == "biases of the value projections"
    assert (output(_reloaded(tmp_path / "out"), VALUES) - expected).abs().max() <= 2 * merged.tolerance


def test_a_projection_with_a_bias_of_its_own_keeps_its_edit_beside_others_that_have_none():
    base = build("qwen3")
    base.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.randn(32))
    model = _model(base=base, additive="kv_group")
    expected, bare = output(model, VALUES), model.get_base_model()
    with saving.plain(bare, saving.tuner_stacks(bare), "vllm") as (chosen, zeros):
        assert list(chosen.values) == ["model.layers.1.self_attn.o_proj"]
        assert len(zeros) == 6  # of queries and keys twice, the values of layer 0, the output of layer 1
        torch.testing.assert_close(output(bare, VALUES), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(output(model, VALUES), expected)


def test_a_lora_on_the_values_is_merged_beside_the_offset(tmp_path):
    lora = peft.LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    below = peft.get_peft_model(build("qwen2"), lora)
    torch.manual_seed(2)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.4, additive="kv_group")
    model = peft.get_peft_model(below, config, adapter_name="jola").eval()
    expected = output(model, VALUES)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    merged = adapters.save_merged(model, tmp_path / "out")
    assert merged.place == "biases of the value projections"
    assert (output(_reloaded(tmp_path / "out"), VALUES) - expected).abs().max() <= 2 * merged.tolerance
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(model, VALUES), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_held_to_its_own_rounding(tmp_path, dtype):
    model = _model("llama", base=build("llama").to(dtype), init_std=0.1)
    merged = adapters.save_merged(model, tmp_path / "out")
    assert merged.tolerance > 50 * torch.finfo(torch.float32).eps
    assert _reloaded(tmp_path / "out").dtype == dtype


def test_a_monitor_does_not_see_the_inputs_that_a_save_is_checked_on(tmp_path):
    model = _model("llama")
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer))
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args))
    adapters.save_merged(model, tmp_path / "out")
    assert not seen
    output(model, VALUES)
    assert len(seen) == 1
    handle.remove()


def test_a_save_can_be_checked_on_inputs_of_ones_own(tmp_path):
    model = _model("llama")
    merged = adapters.save_merged(model, tmp_path / "out", inputs=VALUES)
    base = model.get_base_model()
    with model.disable_adapter():
        plain = output(base, VALUES)
    assert merged.edit == pytest.approx(float((output(model, VALUES) - plain).abs().max()), rel=1e-5)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        adapters.save_merged(model, tmp_path / "other", inputs={"pixels": torch.zeros(1)})


def test_training_mode_comes_back(tmp_path):
    model = _model("llama").train()
    adapters.save_merged(model, tmp_path / "out")
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["vit", "clip", "bart", "t5", "wav2vec2", "whisper", "bert", "swin", "dinov2"])
def test_random_inputs_fit(family):
    model = build(family)
    values = verify.random_inputs(model)
    assert verify.run(model, values).isfinite().all()
    assert all(torch.equal(value, again) for value, again in zip(values.values(), verify.random_inputs(model).values()))


# ------------------------------------------------------------------------------------------------------------ the table


def _finds(family, find, additive):
    """What a way of placing additive edits finds for a family, whatever runtimes read."""
    base = build(family)
    if family == "mistral":
        base.config.sliding_window = None
    model = _model(base=base, additive=additive).get_base_model()
    stacks = saving.tuner_stacks(model)
    for owner, name, layer in saving._wrappers(model):  # as `plain` does before it asks
        setattr(owner, name, layer.get_base_layer())
    return find(model, saving._edited(model, stacks), ("transformers",), lambda target: False)


@pytest.mark.parametrize("family", runtimes.READS)
def test_every_row_of_the_table_is_a_family_whose_biases_transformers_has(family):
    """That a runtime reads a bias is of use only if transformers can have it."""
    has = set()
    for projection, find, additive in (
        ("output", placement._in_output, "head"),
        ("value", placement._in_value, "kv_group"),
    ):
        found = _finds(family, find, additive)
        if isinstance(found, placement.Placement):
            has.add(projection)
    rows = runtimes.READS[family]
    assert list(rows) == ["vllm", "llama.cpp"]
    if not has:
        assert isinstance(_finds(family, placement._in_other_family, "head"), placement.Placement)
        return
    for target, read in rows.items():
        unread = has - set(read)
        assert {projection for projection in has if not runtimes.reads(family, target, projection)} == unread
    assert bool(runtimes.losses(family)) is any("output" not in read for read in rows.values())


def test_families_without_a_row_are_for_transformers_alone(tmp_path, monkeypatch):
    model = _model("qwen3_next")
    assert adapters.save_merged(model, tmp_path / "out").targets == ("transformers",)
    monkeypatch.setattr(engines, "installed", lambda target: False)
    with pytest.raises(
        ValueError, match=r"nothing is known of llama\.cpp with this family, and it is not installed here"
    ):
        adapters.save_merged(model, tmp_path / "other", target="llama.cpp")
