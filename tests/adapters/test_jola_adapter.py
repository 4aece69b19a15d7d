"""A JoLA adapter's life: several adapters, switching, mixing in a batch, restricting, dropping heads, dtypes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from jola_families import build, inputs, output

from ctkernels.functional import hard_concrete

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama", batch=3)


def _config(**values):
    return adapters.JolaConfig(task_type="CAUSAL_LM", **({"init_std": 0.3} | values))


def _two(name="llama"):
    model = build(name)
    plain = output(model, VALUES)
    torch.manual_seed(2)
    model = peft.get_peft_model(model, _config())
    model.add_adapter("second", _config(init_std=0.5))
    return model.eval(), plain


def _layers(model):
    return [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]


def _set(model, kind, values, adapter="default"):
    with torch.no_grad():
        for layer in _layers(model):
            unit = layer.jola_unit_log_alpha[adapter]
            getattr(layer, f"jola_log_alpha_{kind}")[adapter].copy_(torch.tensor(values) / unit)


def test_parameters_are_those_of_the_paper(capsys):
    model = peft.get_peft_model(build("llama"), _config())
    model.print_trainable_parameters()
    assert "trainable params: 144 " in capsys.readouterr().out  # L * H * (2 d + 2)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trainable} == {"jola_m", "jola_a", "jola_log_alpha_m", "jola_log_alpha_a"}
    assert len(trainable) == 8


def test_the_start_is_open_and_near_the_identity():
    torch.manual_seed(0)
    layer = _layers(peft.get_peft_model(build("llama"), adapters.JolaConfig()))[0]
    assert 0.5e-3 < layer.jola_m["default"].std() < 1.5e-3
    gates = layer.gates("default", training=False)
    assert all(torch.equal(gate, torch.ones(4)) for gate in gates.values())
    model = build("llama")
    expected = output(model, VALUES)
    assert torch.equal(output(peft.get_peft_model(model, _config(init_std=0.0)).eval(), VALUES), expected)


def test_switching_disabling_and_deleting():
    model, plain = _two()
    first = output(model, VALUES)
    model.set_adapter("second")
    second = output(model, VALUES)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(output(model, VALUES), plain)
    assert torch.equal(output(model, VALUES), second)
    model.set_adapter("default")
    assert torch.equal(output(model, VALUES), first)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, VALUES), plain)
    model.delete_adapter("second")
    assert "second" not in _layers(model)[0].jola_m
    assert not any("second" in name for name in model.state_dict())
    assert torch.equal(output(model, VALUES), first)
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")


def test_two_active_adapters_apply_in_order_and_merge_so():
    model, _ = _two()
    tuner = model.base_model
    outputs = {}
    for names in (["default", "second"], ["second", "default"]):
        tuner.set_adapter(names)
        outputs[names[0]] = output(model, VALUES)
        tuner.merge_adapter()
        torch.testing.assert_close(output(model, VALUES), outputs[names[0]], rtol=1e-4, atol=1e-4)
        tuner.unmerge_adapter()
    assert (outputs["default"] - outputs["second"]).abs().max() > 1e-3
    tuner.set_adapter(["default", "second"])
    tuner.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        tuner.merge_adapter(["second"])
    torch.testing.assert_close(output(model, VALUES), outputs["default"], rtol=1e-4, atol=1e-4)


def test_a_batch_of_mixed_adapters_equals_one_run_each():
    model, plain = _two()
    names = ["second", "__base__", "default"]
    expected = {"__base__": plain}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = output(model, VALUES)
    with torch.no_grad():
        mixed = model(**VALUES, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    mixed = model.generate(**VALUES, adapter_names=names, **options)
    model.set_adapter("second")
    assert torch.equal(mixed[0], model.generate(**VALUES, **options)[0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("inside", [False, True], ids=["arguments", "generation_config"])
def test_beams_of_a_sample_keep_its_adapter_in_modules_trained_beside(options, inside):
    torch.manual_seed(2)
    model = peft.get_peft_model(build("llama"), _config(modules_to_save=["lm_head"]))
    model.add_adapter("second", _config(init_std=0.5, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    values: dict = {"max_new_tokens": 4, "do_sample": False} | options
    if inside:
        values = {"generation_config": transformers.GenerationConfig(**values, pad_token_id=0)}
    names = ["second", "__base__", "default"]
    together = model.eval().generate(**VALUES, adapter_names=names, **values)
    count = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in VALUES.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**alone, **values)
        else:
            model.set_adapter(name)
            expected = model.generate(**alone, **values)
        assert torch.equal(together[row * count : (row + 1) * count, : expected.shape[1]], expected)


def test_rows_of_the_base_model_alone_and_of_one_adapter_alone():
    model, plain = _two()
    expected = output(model, VALUES)
    with torch.no_grad():
        assert torch.equal(model(**VALUES, adapter_names=["__base__"] * 3).logits, plain)
        repeated = model(**VALUES, adapter_names=[model.active_adapter] * 3).logits
    torch.testing.assert_close(repeated, expected, rtol=1e-5, atol=1e-5)


def test_names_for_one_call_do_not_reach_a_call_in_another_thread():
    model, plain = _two()
    expected, seen = output(model, VALUES), []

    def meanwhile(module, args):
        if not seen:
            seen.append(None)
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(output, model, VALUES).result())

    model.get_input_embeddings().register_forward_pre_hook(meanwhile)
    with torch.no_grad():
        assert torch.equal(model(**VALUES, adapter_names=["__base__"] * 3).logits, plain)
    assert torch.equal(seen[1], expected)


def test_mixed_adapters_need_known_names_eval_and_one_name_a_row():
    model, _ = _two()
    with pytest.raises(ValueError, match=r"adapter_names must be among .*, got \['third'\]"):
        model(**VALUES, adapter_names=["third"] * 3)
    for count in (0, 1, 2, 6):
        with pytest.raises(ValueError, match=rf"same as the number of inputs, but got {count} and 3 respectively"):
            model(**VALUES, adapter_names=["default"] * count)
    with pytest.raises(ValueError, match="same as the number of inputs, but got 1 and 3 respectively"):
        model.generate(**VALUES, adapter_names=["default"])
    with pytest.raises(ValueError, match=r"list of names, got \[0, 0, 0\]"):
        model(**VALUES, adapter_names=[0, 0, 0])
    with pytest.raises(ValueError, match="list of names, got 'default'"):
        model(**VALUES, adapter_names="default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        model(**VALUES, adapter_names=["default"] * 3)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model(**VALUES, adapter_names=["default"] * 3)


def test_layers_and_heads_can_be_restricted(tmp_path):
    heads = {0: {"m": [1], "a": [3, 0]}}
    model = peft.get_peft_model(build("llama"), _config(heads=heads)).eval()
    (layer,) = _layers(model)
    assert layer.jola_m["default"].shape == (1, 8)
    assert layer.jola_a["default"].shape == (2, 8)
    z = torch.randn(2, 3, 32)
    moved = (layer.edit(z, "default") != z).view(2, 3, 4, 8).any(-1)
    assert moved.all((0, 1)).tolist() == [True, True, False, True]
    full = z.view(2, 3, 4, 8)
    expected = full.clone()
    expected[:, :, 1] += layer.jola_m["default"][0] * full[:, :, 1]
    expected[:, :, 0] += layer.jola_a["default"][0]
    expected[:, :, 3] += layer.jola_a["default"][1]
    torch.testing.assert_close(layer.edit(z, "default"), expected.view(2, 3, 32))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(output(again, VALUES), output(model, VALUES))

    one = peft.get_peft_model(build("llama"), _config(layers_to_transform=1, heads=[2]))
    assert [layer.site for layer in _layers(one)] == ["model.layers.1.self_attn.o_proj"]
    assert _layers(one)[0].jola_m["default"].shape == (1, 8)
    decoder = adapters.JolaConfig(layers_to_transform=[0], layers_pattern="decoder.block")
    seq2seq = peft.get_peft_model(build("t5"), decoder)
    assert [layer.site for layer in _layers(seq2seq)] == [
        "decoder.block.0.layer.0.SelfAttention.o",
        "decoder.block.0.layer.1.EncDecAttention.o",
    ]


def test_adapters_may_cover_different_layers():
    model = peft.get_peft_model(build("llama"), _config(layers_to_transform=[0]))
    model.add_adapter("second", _config(layers_to_transform=[1], edit="additive"))
    model.eval()
    assert len(_layers(model)) == 2
    model.set_adapter("second")
    second = output(model, VALUES)
    with torch.no_grad():
        mixed = model(**VALUES, adapter_names=["second", "default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], second[0], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], output(model, VALUES)[2], rtol=1e-5, atol=1e-5)


def test_dropping_closed_heads_keeps_the_function_and_shrinks_the_file(tmp_path):
    model = peft.get_peft_model(build("llama"), _config()).eval()
    _set(model, "m", [3.0, -9.0, -9.0, -9.0])
    _set(model, "a", [-9.0, 0.3, -9.0, 2.0])
    with torch.no_grad():
        layer = _layers(model)[1]
        layer.jola_log_alpha_m["default"].fill_(-9)
        layer.jola_log_alpha_a["default"].fill_(-9)
    before = output(model, VALUES)
    model.save_pretrained(tmp_path / "whole")
    opened = adapters.open_heads(model)
    assert opened["model.layers.0.self_attn.o_proj"] == {"m": [0], "a": [1, 3]}
    assert opened["model.layers.1.self_attn.o_proj"] == {"m": [], "a": []}
    assert adapters.drop_closed_heads(model) == 13
    assert adapters.drop_closed_heads(model) == 0
    assert torch.equal(output(model, VALUES), before)
    model.save_pretrained(tmp_path / "small")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "small")]
    assert sizes[1] < sizes[0] / 2
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "small")
    assert len(_layers(again)) == 1
    assert torch.equal(output(again, VALUES), before)
    assert again.peft_config["default"].freeze_gates
    model.train()
    assert torch.equal(output(model, VALUES), before)
    model.merge_adapter()
    torch.testing.assert_close(output(model, VALUES), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="dropping heads needs it unmerged"):
        adapters.drop_closed_heads(model)


def test_dropping_refuses_to_leave_nothing():
    model = peft.get_peft_model(build("llama"), _config())
    for kind in "ma":
        _set(model, kind, [-9.0] * 4)
    with pytest.raises(ValueError, match="every gate is closed"):
        adapters.drop_closed_heads(model)
    assert _layers(model)[0].jola_m["default"].shape == (4, 8)
    assert not model.peft_config["default"].freeze_gates


def test_frozen_gates_stay_frozen_through_switching():
    model, _ = _two()
    adapters.freeze_gates(model, "default")
    for names in ("second", "default"):
        model.set_adapter(names)
    model.base_model.set_requires_grad("default", True)
    layer = _layers(model)[0]
    assert layer.jola_m["default"].requires_grad
    assert not layer.jola_log_alpha_m["default"].requires_grad
    model.train()
    assert torch.equal(output(model, VALUES), output(model, VALUES))
    model.set_adapter("second")
    _set(model, "m", [0.0] * 4, "second")
    assert not torch.equal(output(model, VALUES), output(model, VALUES))


@pytest.mark.parametrize("estimator", ["clip", "mean"])
def test_eval_gates_follow_the_estimator(estimator):
    model = peft.get_peft_model(build("llama"), _config(gate_estimator=estimator)).eval()
    _set(model, "m", [-1.0, 0.0, 1.0, 5.0])
    layer = _layers(model)[0]
    gates = layer.gates("default", training=False)["m"]
    assert torch.equal(gates, hard_concrete(torch.tensor([-1.0, 0.0, 1.0, 5.0]), training=False, estimator=estimator))
    before = output(model, VALUES)
    model.merge_adapter()
    torch.testing.assert_close(output(model, VALUES), before, rtol=1e-4, atol=1e-4)


def test_training_samples_once_a_forward_or_once_a_row():
    z = torch.ones(3, 2, 32)
    for sampling, same in (("forward", True), ("row", False)):
        model = peft.get_peft_model(build("llama"), _config(gate_sampling=sampling)).train()
        for kind in "ma":
            _set(model, kind, [0.0] * 4)
        layer = _layers(model)[0]
        torch.manual_seed(0)
        edited = layer.edit(z, "default")
        assert torch.equal(edited[:, 0], edited[:, 1])
        assert torch.equal(edited[0], edited[1]) is same
        assert not torch.equal(edited, layer.edit(z, "default"))
        edited.sum().backward()
        assert layer.jola_log_alpha_m["default"].grad.abs().sum() > 0
        layer.eval()
        assert torch.equal(layer.edit(z, "default"), layer.edit(z, "default"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_bases_keep_fp32_parameters(dtype):
    model = peft.get_peft_model(build("llama").to(dtype), _config()).eval()
    layer = _layers(model)[0]
    assert layer.jola_m["default"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    before = output(model, VALUES)
    assert before.dtype == dtype
    model.merge_adapter()
    assert layer.base_layer.weight.dtype == layer.base_layer.bias.dtype == dtype
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-12}[dtype]
    merged = output(model, VALUES)
    assert (merged - before).abs().max() <= tolerance * before.abs().max()
    plain = peft.get_peft_model(build("llama").to(dtype), _config(), autocast_adapter_dtype=False)
    assert _layers(plain)[0].jola_m["default"].dtype == dtype


def test_autocast_runs_and_stays_close():
    model = peft.get_peft_model(build("llama"), _config()).eval()
    exact = output(model, VALUES)
    with torch.autocast("cpu", torch.bfloat16):
        cast = output(model, VALUES)
    assert (cast - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_shared_projection_is_edited_and_restored_everywhere():
    class Attention(torch.nn.Module):
        def __init__(self, projection):
            super().__init__()
            self.num_heads, self.head_dim = 2, 4
            self.o_proj = projection

        def forward(self, x):
            return self.o_proj(x)

    shared = torch.nn.Linear(8, 8, bias=False)
    model = torch.nn.Sequential(Attention(shared), Attention(shared))
    x = torch.randn(3, 8)
    wrapped = peft.get_peft_model(model, adapters.JolaConfig(target_modules=["o_proj"], init_std=0.5)).eval()
    assert model[0].o_proj is model[1].o_proj
    edited = wrapped(x)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(x), edited)
    plain = wrapped.unload()
    assert plain[0].o_proj is shared
    assert plain[1].o_proj is shared
    assert shared.bias is None


def test_a_weight_tied_to_another_module_is_untied_by_merging_only():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.head_dim = 2, 4
            self.o_proj, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.other.weight = self.o_proj.weight

        def forward(self, x):
            return self.o_proj(x) + self.other(x)

    model = Attention()
    wrapped = peft.get_peft_model(model, adapters.JolaConfig(target_modules=["o_proj"], init_std=0.5)).eval()
    x = torch.randn(3, 8)
    edited = wrapped(x)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(x), edited)
    wrapped.unmerge_adapter()
    assert model.o_proj.base_layer.weight is model.other.weight


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing():
    model = peft.get_peft_model(build("llama"), _config())
    first, last = _layers(model)
    weight = first.base_layer.weight
    with torch.no_grad():
        last.jola_a["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert first.base_layer.weight is weight
    assert first.base_layer.bias is None
    assert not first.merged
    assert not last.merged


def test_closed_additive_gates_create_no_bias():
    model = peft.get_peft_model(build("mistral"), _config()).eval()
    _set(model, "a", [-9.0] * 4)
    before = output(model, VALUES)
    merged = model.merge_and_unload()
    assert merged.model.layers[0].self_attn.o_proj.bias is None
    torch.testing.assert_close(output(merged, VALUES), before, rtol=1e-4, atol=1e-4)


def test_adapters_made_from_one_config_stay_apart():
    config = _config()
    model = peft.get_peft_model(build("llama"), config)
    model.add_adapter("second", config)
    _set(model, "m", [-9.0, 3.0, 3.0, 3.0])
    adapters.drop_closed_heads(model, "default")
    assert _layers(model)[0].jola_m["default"].shape == (3, 8)
    assert _layers(model)[0].jola_m["second"].shape == (4, 8)
    assert model.peft_config["second"].heads is None
    assert not model.peft_config["second"].freeze_gates


@pytest.fixture
def any_peft(monkeypatch):
    """transformers asks for a newer peft than there may be on the index: by its version only, not for what it has."""
    integration = pytest.importorskip("transformers.integrations.peft")
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.18.0")


def test_no_bound_of_ours_keeps_out_the_peft_that_transformers_asks_for():
    requirements = pytest.importorskip("packaging.requirements")
    wanted = pytest.importorskip("transformers.integrations.peft").MIN_PEFT_VERSION
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, listed in project["optional-dependencies"].items():
        for requirement in map(requirements.Requirement, listed):
            assert requirement.name != "peft" or requirement.specifier.contains(wanted), extra


@pytest.mark.usefixtures("any_peft")
def test_transformers_adds_an_adapter_of_its_own():
    plain = build("llama").eval()
    before = output(plain, VALUES)
    torch.manual_seed(2)
    plain.add_adapter(_config(), "mine")
    layers = _layers(plain)
    assert plain.active_adapters() == ["mine"]
    twin = peft.get_peft_model(build("llama"), _config(init_std=0)).eval()
    with torch.no_grad():
        for layer, other in zip(layers, _layers(twin)):
            for name in layer.adapter_layer_names:
                getattr(other, name)["default"].copy_(getattr(layer, name)["mine"])
    edited = output(plain, VALUES)
    assert torch.equal(edited, output(twin, VALUES))
    assert not torch.equal(edited, before)
    assert {p.requires_grad for n, p in plain.named_parameters() if "jola" not in n} == {False}
    plain.add_adapter(_config(init_std=0), "second")
    assert torch.equal(output(plain, VALUES), before)
    plain.set_adapter("mine")
    assert torch.equal(output(plain, VALUES), edited)
    plain.disable_adapters()
    assert torch.equal(output(plain, VALUES), before)
    plain.enable_adapters()
    plain.delete_adapter("second")
    assert torch.equal(output(plain, VALUES), edited)
    with pytest.raises(ValueError, match="adapter_name must not contain '/'"):
        plain.add_adapter(_config(), "a/b")


@pytest.mark.usefixtures("any_peft")
def test_transformers_own_adapter_methods_work(tmp_path):
    model, _ = _two()
    expected = output(model, VALUES)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    plain = build("llama")
    before = output(plain, VALUES)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(output(plain, VALUES), expected)
    plain.disable_adapters()
    assert torch.equal(output(plain, VALUES), before)


def test_a_copy_is_independent():
    model, _ = _two()
    twin = copy.deepcopy(model)
    _set(twin, "m", [-9.0] * 4)
    assert not torch.equal(output(twin, VALUES), output(model, VALUES))
