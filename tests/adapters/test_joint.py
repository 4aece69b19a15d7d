"""JoLA, curvature and LoRA as one adapter: what it computes, its life, and what it is beside other adapters."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from jola_families import build, inputs, output

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")
ctkernels = pytest.importorskip("ctkernels")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:A nonlinearity cannot be folded"),
]
FAMILIES = ("llama", "bert", "vit")  # SwiGLU's SiLU; GELU; GELU in images
JOLA = {"init_std": 0.3}
CURVATURE = {"init_beta": 0.3, "init_coeff": 0.4}
LORA = {"r": 2, "init_lora_weights": False}


def config(lora=None, seed=None, **values):
    parts = {"jola": adapters.JolaConfig(**JOLA), "curvature": adapters.CurvatureConfig(**CURVATURE)} | values
    return adapters.JointConfig(lora=None if lora is None else peft.LoraConfig(target_modules=lora, **LORA), **parts)


def shaken(model, name="default", seed=2):
    """Parameters of an adapter unlike any others, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}" in key and any(f".{method}_" in key for method in ("jola", "curvature", "lora")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def joint(family="llama", **values):
    return shaken(peft.get_peft_model(build(family), config(**values))).eval()


def layers(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


# ---- what it computes --------------------------------------------------------------------------------------------------


def _unit(x, raw_beta, raw_coeff, activation):
    """Curvature Tuning's equation 8; with the normal distribution in the place of the logistic one for GELU."""
    beta, c = torch.sigmoid(raw_beta), torch.sigmoid(raw_coeff)
    s = 1 - beta
    u = x / s
    if activation == "silu":
        return c * x * torch.sigmoid(beta * u) + (1 - c) * s * F.softplus(u, threshold=1e3)
    normal = torch.distributions.Normal(0.0, 1.0)
    return c * x * normal.cdf(beta * u) + (1 - c) * s * (u * normal.cdf(u) + normal.log_prob(u).exp())


def _by_hand(family, model):
    """The base model with plain code at its heads and activations, and the adapter's values by parameter name."""
    base = build(family).double()
    values = {}
    for layer in layers(model, adapters.JolaLayer):
        rows = {kind: layer.vectors(kind, "default").detach().requires_grad_() for kind in "ma"}
        gates = layer.gates("default", training=False)
        values |= {f"{layer.site}.jola_{kind}": rows[kind] for kind in "ma"}

        def edit(module, args, rows=rows, gates=gates, layer=layer):
            z = args[0].unflatten(-1, (layer.num_heads, layer.head_dim))
            return ((z + gates["m"][:, None] * rows["m"] * z + gates["a"][:, None] * rows["a"]).flatten(-2),)

        base.get_submodule(layer.site).register_forward_pre_hook(edit)
    for layer in layers(model, adapters.CurvatureLayer):
        raw = [value.detach().double().requires_grad_() for value in layer.parameters_of("default")]
        values |= dict(zip((f"{layer.site}.ctu.curvature_raw_{knob}" for knob in ("beta", "coeff")), raw))
        base.get_submodule(layer.site).forward = lambda x, raw=raw, layer=layer: _unit(x, *raw, layer.activation)
    return base, values


@pytest.mark.parametrize("family", FAMILIES)
def test_both_methods_and_their_gradients_as_computed_by_hand(family):
    model = joint(family).double()
    inside = {key: value.double() if value.is_floating_point() else value for key, value in inputs(family).items()}
    base, by_hand = _by_hand(family, model)
    assert len(by_hand) == 2 * (2 + 2)  # m, a and beta, coeff of two layers
    results = []
    for module in (model, base):
        result = module(**inside)
        result = getattr(result, "logits", None) if hasattr(result, "logits") else result.last_hidden_state
        result.square().sum().backward()
        results.append(result)
    torch.testing.assert_close(*results)
    trained = {
        name.removeprefix("base_model.model.").removesuffix(".default"): p for name, p in model.named_parameters()
    }
    for name, value in by_hand.items():
        assert value.grad.any()
        grad = trained[name].grad.double()  # of logits: rounded to float32
        torch.testing.assert_close(grad, value.grad, rtol=torch.finfo(torch.float32).eps, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_one_adapter_over_the_other_computes(family):
    model = joint(family)
    over = peft.get_peft_model(build(family), adapters.JolaConfig(**JOLA))
    over = peft.get_peft_model(over, adapters.CurvatureConfig(**CURVATURE), adapter_name="above").eval()
    own = {name: value for name, value in model.state_dict().items() if ".default" in name}
    theirs = {
        name.replace("base_model.model.base_model.model.", "base_model.model.").replace(".above", ".default"): value
        for name, value in over.state_dict().items()
    }
    assert own.keys() <= theirs.keys()
    for name, value in own.items():
        theirs[name].copy_(value)
    assert torch.equal(output(over, inputs(family)), output(model, inputs(family)))


def test_lora_lies_below_the_edit_of_the_heads():
    model = joint(lora=["q_proj", "o_proj"])
    expected, base = output(model, inputs("llama")), build("llama")
    weights = dict(model.named_parameters())
    for i, layer in enumerate(base.model.layers):
        for name, inner in (("q_proj", "q_proj"), ("o_proj", "o_proj.base_layer")):
            a, b = (
                weights[f"base_model.model.model.layers.{i}.self_attn.{inner}.lora_{k}.default.weight"] for k in "AB"
            )
            getattr(layer.self_attn, name).weight.data += 8 / 2 * b @ a  # lora_alpha / r
    plain = peft.get_peft_model(base, config()).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    torch.testing.assert_close(output(plain, inputs("llama")), expected)


def test_names_are_those_of_the_methods_alone(capsys):
    model = joint()
    names = {name.split(".layers.0.")[1] for name, p in model.named_parameters() if p.requires_grad and ".0." in name}
    attention, mlp = "self_attn.o_proj.jola_", "mlp.act_fn.ctu.curvature_raw_"
    assert names == {
        *(f"{attention}{name}.default" for name in ("m", "a", "log_alpha_m", "log_alpha_a")),
        *(f"{mlp}{name}.default" for name in ("beta", "coeff")),
    }
    model.print_trainable_parameters()
    assert "trainable params: 272 " in capsys.readouterr().out  # 2 layers x (4 heads x (2 x 8 + 2) + 2 x 32 channels)
    assert model.peft_type == "JOINT"


# ---- its life ----------------------------------------------------------------------------------------------------------


def _two(**values):
    model = joint(**values)
    model.add_adapter("second", config(**values))
    return shaken(model, "second", seed=5).eval()


@pytest.mark.parametrize("lora", [None, ["o_proj", "up_proj"]], ids=["", "lora"])
def test_switching_disabling_mixing_and_deleting(lora):
    values, plain = inputs("llama", batch=3), output(build("llama"), inputs("llama", batch=3))
    model = _two(lora=lora)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".default" in name for name in trained)
    outputs = {"__base__": plain, "default": output(model, values)}
    model.set_adapter("second")
    outputs["second"] = output(model, values)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".second" in name for name in trained)
    assert len(trained) == 2 * (4 + 2) + (0 if lora is None else 2 * 2 * 2)
    assert (outputs["second"] - outputs["default"]).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(output(model, values), plain)
    assert torch.equal(output(model, values), outputs["second"])
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        mixed = model(**values, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], outputs[name][row], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one curvature adapter can be active at a time"):
        model.base_model.set_adapter(["default", "second"])
    assert torch.equal(output(model, values), outputs["second"])
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model, values), outputs["default"])


def test_a_mixed_batch_of_adapters_with_and_without_lora():
    values = inputs("llama", batch=3)
    model = joint()
    model.add_adapter("second", config(lora=["o_proj"]))
    shaken(model, "second", seed=5).eval()
    outputs = {"default": output(model, values)}
    assert torch.equal(outputs["default"], output(joint(), values))
    model.set_adapter("second")
    outputs["second"] = output(model, values)
    assert torch.equal(outputs["second"], output(shaken(joint(lora=["o_proj"]), seed=5), values))
    names = ["second", "default", "second"]
    with torch.no_grad():
        mixed = model(**values, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], outputs[name][row], rtol=1e-5, atol=1e-5)


def test_wrong_names_for_a_batch_are_refused():
    model = _two()
    with pytest.raises(ValueError, match=r"adapter_names must be among .*got \['third'\]"):
        model(**inputs("llama"), adapter_names=["default", "third"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**inputs("llama"), adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs("llama"), adapter_names=["default", "second"])


def test_generation_mixes_adapters_too():
    values, options = inputs("llama"), {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    model = _two(lora=["o_proj"])
    mixed = model.generate(**values, adapter_names=["second", "default"], **options)
    for row, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(**values, **options)[row])


def test_adding_an_adapter_leaves_what_is_trained_as_it_was():
    model = joint()
    model.base_model.model.get_input_embeddings().weight.requires_grad_(True)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_adapter("second", config(lora=["o_proj"]))
    after = {
        name.replace("o_proj.base_layer.base_layer", "o_proj.base_layer"): p for name, p in model.named_parameters()
    }
    assert {name: after[name].requires_grad for name in flags} == flags
    assert not any(p.requires_grad for name, p in after.items() if "second" in name)


def test_one_configuration_for_two_adapters_is_not_shared():
    given = config()
    model = peft.get_peft_model(build("llama"), given)
    model.add_adapter("second", given)
    adapters.freeze_gates(model)
    configs = model.peft_config
    assert [configs[name].jola.freeze_gates for name in ("default", "second")] == [True, False]
    assert [given.jola.target_modules, given.curvature.layout] == [None, None]


def test_copies_and_pickles_have_their_own():
    model, values = joint(lora=["q_proj"]), inputs("llama")
    expected = output(model, values)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, values), expected)
        shaken(twin, seed=9)
        assert not torch.equal(output(twin, values), expected)
        twin.unload()
    assert torch.equal(output(model, values), expected)


def test_compiled_it_computes_the_same():
    model, values = joint(), inputs("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, values), output(model, values))


# ---- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, True], ids=["", "lora"])
def test_merging_and_unmerging(family, lora):
    values = inputs(family)
    model = joint(family, lora=lora and r".*(o_proj|attention\.output\.dense|attention\.o_proj)")
    weights = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    expected = output(model, values)
    model.merge_adapter()
    assert all(layer.merged for layer in layers(model, (adapters.JolaLayer, adapters.CurvatureLayer)))
    torch.testing.assert_close(output(model, values), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(output(model, values), expected)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unloaded_it_is_saved_and_loaded(family, tmp_path):
    values = inputs(family)
    model = joint(family)
    expected = output(model, values)
    merged = model.merge_and_unload()
    assert not layers(merged, (adapters.JolaLayer, adapters.CurvatureLayer))
    torch.testing.assert_close(output(merged, values), expected, rtol=1e-4, atol=1e-4)
    ctkernels.save_pretrained(merged, tmp_path)
    assert torch.equal(output(ctkernels.load_pretrained(tmp_path), values), output(merged, values))
    with pytest.raises(ValueError, match="with CT units cannot be saved as a plain one"):
        merged.save_pretrained(tmp_path / "plain")


def test_an_adapter_that_is_not_active_is_merged_by_name():
    model, values = _two(), inputs("llama")
    model.set_adapter("second")
    expected = output(model, values)
    model.set_adapter("default")
    torch.testing.assert_close(
        output(model.merge_and_unload(adapter_names=["second"]), values), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("broken", ["layers.1.self_attn.o_proj.jola_m", "layers.1.mlp.act_fn.ctu.curvature_raw_beta"])
def test_what_cannot_be_merged_changes_nothing(broken):
    model = joint(lora=["o_proj"])
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if broken in name).fill_(float("nan"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
        assert not any(layer.merged for layer in layers(model, peft.tuners.tuners_utils.BaseTunerLayer))
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, after[name]) or value.isnan().any() for name, value in before.items())


def test_a_second_merge_that_is_refused_leaves_the_first():
    model, values = _two(), inputs("llama")
    model.merge_adapter()
    expected = output(model, values)
    with pytest.raises(ValueError, match="one adapter can be merged"):
        model.merge_adapter(["second"])
    assert {tuple(layer.merged_adapters) for layer in layers(model, peft.tuners.tuners_utils.BaseTunerLayer)} == {
        ("default",)
    }
    assert torch.equal(output(model, values), expected)


@pytest.mark.parametrize("lora", [None, ["q_proj", "o_proj"]], ids=["", "lora"])
def test_unloading_gives_the_model_back(lora):
    base = build("llama")
    modules = [(name, type(module), id(module)) for name, module in base.named_modules()]
    expected, keys = output(base, inputs("llama")), base.state_dict().keys()
    model = peft.get_peft_model(base, config(lora=lora)).unload()
    assert model is base
    assert [(name, type(module), id(module)) for name, module in base.named_modules()] == modules
    assert base.state_dict().keys() == keys
    assert torch.equal(output(base, inputs("llama")), expected)
    assert not any(name.startswith(("_ctu", "peft_config", "save_pretrained")) for name in vars(base))


def test_save_merged_says_why_not_and_the_way_out(tmp_path):
    model = joint()
    expected = output(model, inputs("llama"))
    way = re.escape("ctkernels.save_pretrained(model.merge_and_unload(), path)")
    with pytest.raises(ValueError, match=rf"a CurvatureLayer cannot be folded into weights.*{way}"):
        adapters.save_merged(model, tmp_path / "merged")
    ctkernels.save_pretrained(model.merge_and_unload(), tmp_path / "kept")
    kept = ctkernels.load_pretrained(tmp_path / "kept")
    torch.testing.assert_close(output(kept, inputs("llama")), expected, rtol=1e-4, atol=1e-4)


# ---- beside other adapters ---------------------------------------------------------------------------------------------


def test_adapters_of_other_kinds_are_refused_by_name():
    lora = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    before = output(lora, inputs("llama"))
    with pytest.raises(ValueError, match=r"got a PeftModel; give its base model, and LoRA as JointConfig\(lora="):
        peft.get_peft_model(lora, config())
    assert isinstance(lora.peft_config["default"], peft.LoraConfig)
    assert torch.equal(output(lora, inputs("llama")), before)
    base = build("llama")
    peft.inject_adapter_in_model(adapters.JolaConfig(**JOLA), base)
    with pytest.raises(ValueError, match="got one with a JolaConfig"):
        peft.inject_adapter_in_model(config(), base, "joint")
    assert list(base.peft_config) == ["default"]
    model = joint()
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", adapters.JolaConfig())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_injected_into_a_model_without_a_peft_model_around_it():
    base, values = build("llama"), inputs("llama")
    peft.inject_adapter_in_model(config(), base)
    peft.inject_adapter_in_model(config(lora=["o_proj"]), base, "second")
    assert list(base.peft_config) == ["default", "second"]
    shaken(base)
    second = output(shaken(base, "second", seed=5), values)
    assert torch.equal(second, output(shaken(joint(lora=["o_proj"]), seed=5), values))
    tensors = peft.get_peft_model_state_dict(base, adapter_name="second")
    halves = {name: value / 2 for name, value in tensors.items()}
    peft.set_peft_model_state_dict(base, halves, "second")
    loaded = peft.get_peft_model_state_dict(base, adapter_name="second")
    assert all(torch.equal(loaded[name], value) for name, value in halves.items())
    for layer in layers(base, peft.tuners.tuners_utils.BaseTunerLayer):
        layer.set_adapter("default")
    assert torch.equal(output(base, values), output(joint(), values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"jola": adapters.CurvatureConfig()}, "jola must be a JolaConfig, got CurvatureConfig"),
        ({"curvature": None}, "curvature must be a CurvatureConfig, got None"),
        ({"lora": adapters.JolaConfig()}, "lora must be a LoraConfig or None, got JolaConfig"),
        ({"jola": {"edit": "none"}}, "JolaConfig: edit must be one of"),
        (
            {"jola": {"modules_to_save": ["lm_head"]}},
            r"give modules_to_save to JointConfig itself, got \['lm_head'\] in jola",
        ),
        (
            {"curvature": {"task_type": "CAUSAL_LM"}},
            "give task_type to JointConfig itself, got 'CAUSAL_LM' in curvature",
        ),
        ({"lora": {"bias": "all"}}, r"lora\.bias must be 'none', got 'all'"),
    ],
)
def test_config_errors_name_the_field(values, message):
    with pytest.raises(ValueError, match=message):
        adapters.JointConfig(**values)


def test_an_older_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.1")
    with pytest.raises(ImportError, match=r"JointConfig needs peft >= 0\.21, found 0\.20\.1"):
        adapters.JointConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"jola": {"target_modules": ["nowhere"]}}, "matched no module"),
        ({"curvature": {"target_modules": ["nowhere"]}}, "matched no activation"),
        ({"lora": {"target_modules": ["nowhere"]}}, "nowhere"),
        ({"lora": {"target_modules": ["o_proj", "act_fn"]}}, "is not supported"),
    ],
)
@pytest.mark.parametrize("beside", [False, True], ids=["first", "second"])
def test_a_method_that_finds_nothing_leaves_the_model_as_it_was(values, message, beside):
    base = build("llama")
    model = shaken(peft.get_peft_model(base, config())).eval() if beside else base
    before, keys = output(model, inputs("llama")), list(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    given = adapters.JointConfig(**values)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", given) if beside else peft.get_peft_model(base, given)
    assert torch.equal(output(model, inputs("llama")), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    if beside:
        assert list(model.peft_config) == ["default"]
        model.set_adapter("default")
        assert not any("second" in name for name in model.state_dict())
    else:
        assert list(model.state_dict()) == keys
        assert not hasattr(base, "peft_config")
        peft.get_peft_model(base, config())
