"""Edits of the output of MLPs and of blocks: as by hand, and through everything that an adapter of heads goes through."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from jola_families import FAMILIES, build, inputs, output
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

from ctkernels.adapters.jola.blocks import find_blocks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SITES = ["mlp", "block"]
NO_BLOCKS = {"xlm", "flaubert"}  # attentions in one list, MLPs in another
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "gpt_oss", "qwen3_next", "olmoe", "granitemoe"}


def config(site, **values):
    return adapters.JolaConfig(**{"site": site, "init_std": 0.5, "freeze_gates": True} | values)


def layers(model):
    return {module.site: module for module in model.modules() if isinstance(module, adapters.JolaLayer)}


def edited_by_hand(model, edits):
    """`model` with hooks that make the edits: {module name: (p, q)}."""

    def edit(p, q, _, inputs, result):
        z = result if isinstance(result, torch.Tensor) else result[0]
        z = (z.unflatten(-1, p.shape) * p + q).flatten(-2)
        return z if isinstance(result, torch.Tensor) else type(result)((z, *result[1:]))

    for name, (p, q) in edits.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, result, p=p, q=q: edit(p, q, module, inputs, result)
        )
    return model


def edits_of(model, adapter="default"):
    """p and q of every site, of m and a themselves: gates are 1."""
    found = {}
    for site, layer in layers(model).items():
        if adapter in layer.jola_config:
            m, a = dict(layer.jola_m).get(adapter), dict(layer.jola_a).get(adapter)
            found[site] = (1 if m is None else 1 + m.detach(), 0 if a is None else a.detach())
            shape = (layer.num_heads, layer.head_dim)
            found[site] = tuple(torch.as_tensor(v).expand(shape) for v in found[site])
    return found


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_by_hand(family, site):
    values = inputs(family)
    if family in NO_BLOCKS or (site == "mlp" and family in EXPERTS):
        with pytest.raises(ValueError, match=rf"no (?i:{site}).* was recognised in this .*pass target_modules"):
            peft.get_peft_model(build(family), config(site))
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.get_peft_model(build(family), config(site)).eval()
    partly = [str(w.message) for w in said if "edits only a part" in str(w.message)]
    assert bool(partly) is (family == "deepseek_v3" and site == "mlp")  # its first layer has an MLP, the others experts
    edits = edits_of(model)
    assert len(edits) == len(find_blocks(build(family))) - bool(partly)
    assert all(p.shape[0] == 1 for p, _ in edits.values())
    expected = output(edited_by_hand(build(family), edits), values)
    got = output(model, values)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float((got - output(build(family), values)).abs().max()) > 1e-3 * float(got.abs().max())


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ({}, 2 * 32),  # RED
        ({"edit": "multiplicative"}, 32),  # scales as in (IA)3
        ({"edit": "additive"}, 32),  # biases as in BitFit
        ({"head_dim": 8, "heads": [1, 3]}, 2 * 16),
        ({"head_dim": 8, "heads": {0: {"m": [0], "a": [2]}, 1: [1]}}, None),
    ],
)
def test_forms_of_an_edit(site, values, numbers):
    model = peft.get_peft_model(build("llama"), config(site, **values)).eval()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert not any("log_alpha" in name for name, _ in trained)
    if numbers is not None:
        assert sum(p.numel() for _, p in trained) == 2 * numbers
    edits = {}
    for name, layer in layers(model).items():
        p, q = layer.factors(["default"])
        edits[name] = (p.view(layer.num_heads, -1), q.view(layer.num_heads, -1))
        width = 4 if "head_dim" in values else 1
        assert layer.num_heads == width
        if "heads" in values:
            open_heads = {head for kind in "ma" for head in layer.heads(kind, "default") if layer._of(kind)}
            for head in set(range(width)) - open_heads:
                assert bool((edits[name][0][head] == 1).all() & (edits[name][1][head] == 0).all())
    expected = output(edited_by_hand(build("llama"), edits), inputs("llama"))
    torch.testing.assert_close(output(model, inputs("llama")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", SITES)
def test_gradients_as_by_hand(site):
    model = peft.get_peft_model(build("llama"), config(site)).train()
    edits = {name: tuple(v.clone().requires_grad_() for v in pair) for name, pair in edits_of(model).items()}
    other = edited_by_hand(build("llama"), edits)
    tokens = inputs("llama")["input_ids"]
    for one in (model, other):
        one(tokens, labels=tokens).loss.backward()
    for name, layer in layers(model).items():
        for parameter, value in zip((layer.jola_m["default"], layer.jola_a["default"]), edits[name]):
            torch.testing.assert_close(parameter.grad, value.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("site", SITES)
def test_checkpointing_and_copies(site):
    values = inputs("llama")
    model = peft.get_peft_model(build("llama"), config(site, freeze_gates=False, gate_sampling="row")).train()
    model.enable_input_require_grads()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model.zero_grad()
        model(**values, labels=values["input_ids"]).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, two in zip(*grads):
        assert torch.equal(one, two)
    twin = copy.deepcopy(model).eval()
    before = output(model.eval(), values)
    with torch.no_grad():
        for layer in layers(twin).values():
            layer.jola_a["default"].add_(1)
    assert torch.equal(output(model, values), before)
    assert not torch.allclose(output(twin, values), before)


@pytest.mark.parametrize("site", SITES)
def test_saved_and_loaded(site, tmp_path):
    model = peft.get_peft_model(build("llama"), config(site, task_type="CAUSAL_LM")).eval()
    adapters.save_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(output(again, inputs("llama")), output(model, inputs("llama")))
    assert {layer.edits for layer in layers(again).values()} == {site}
    assert "the outputs of " + {"mlp": "MLPs", "block": "blocks"}[site] in (tmp_path / "README.md").read_text()
    other = adapters.JolaConfig.from_pretrained(tmp_path)
    other.site, other.target_modules = "mlp" if site == "block" else "block", None
    with pytest.raises(ValueError, match="does not fit this model: unknown"):
        peft.get_peft_model(build("llama"), other)


@pytest.mark.parametrize("site", SITES)
def test_switched_mixed_disabled_deleted_unloaded(site):
    values, plain = inputs("llama"), build("llama")
    want = output(plain, values)
    names = {id(module): name for name, module in plain.named_modules()}
    model = peft.get_peft_model(plain, config(site), "one")
    model.add_adapter("two", config(site, head_dim=32))
    model.eval()
    with model.disable_adapter():
        assert torch.equal(output(model, values), want)
    each = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        each[name] = output(model, values)
    assert not torch.allclose(each["one"], each["two"])
    mixed = output(model, values | {"adapter_names": ["two", "__base__"]})
    torch.testing.assert_close(mixed, torch.stack([each["two"][0], want[1]]), rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["one", "two"])
    both = edits_of(model, "one"), edits_of(model, "two")
    p_q = {name: (both[1][name][0] * p, both[1][name][0] * q + both[1][name][1]) for name, (p, q) in both[0].items()}
    torch.testing.assert_close(
        output(model, values), output(edited_by_hand(build("llama"), p_q), values), rtol=1e-4, atol=1e-4
    )
    model.set_adapter("one")
    model.delete_adapter("two")
    assert torch.equal(output(model, values), each["one"])
    assert model.unload() is plain
    assert {id(module): name for name, module in plain.named_modules()} == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    assert torch.equal(output(plain, values), want)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5", "bert"])
def test_an_edit_of_mlps_is_merged(family):
    values = inputs(family)
    base = build(family).double()
    values = {key: v.double() if v.is_floating_point() else v for key, v in values.items()}
    model = peft.get_peft_model(base, config("mlp"), autocast_adapter_dtype=False).double().eval()
    want, weights = output(model, values), [p.clone() for p in base.parameters()]
    model.merge_adapter()
    torch.testing.assert_close(output(model, values), want, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    assert all(torch.equal(one, two) for one, two in zip(base.parameters(), weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload()
    torch.testing.assert_close(output(plain, values), want, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, adapters.JolaLayer) for module in plain.modules())


def test_an_edit_of_blocks_is_not_merged():
    model = peft.get_peft_model(build("llama"), config("block")).eval()
    want = output(model, inputs("llama"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"model\.layers\.0: cannot merge .*a block's output.*site='mlp'"):
            merge()
    assert torch.equal(output(model, inputs("llama")), want)


@pytest.mark.parametrize("edit", ["multiplicative", "additive", "both"])
def test_merged_models_are_saved(edit, tmp_path):
    model = peft.get_peft_model(build("llama"), config("mlp", edit=edit, task_type="CAUSAL_LM")).eval()
    want = output(model, inputs("llama"))
    if edit != "multiplicative":
        with pytest.raises(ValueError, match="nothing is known of vLLM"):
            adapters.save_merged(model, tmp_path, target="vllm")
        with pytest.raises(ValueError, match=r"Ways out: target='transformers', .*training with edit='multiplicative'"):
            adapters.save_merged(model, tmp_path)
    merged = adapters.save_merged(model, tmp_path, target="transformers")
    assert merged.checked_in == "transformers"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.mlp_bias is (edit != "multiplicative")
    torch.testing.assert_close(output(plain, inputs("llama")), want, rtol=1e-4, atol=1e-4)


def test_a_merged_qwen_becomes_a_llama_with_biases(tmp_path):
    model = peft.get_peft_model(build("mistral"), config("mlp", task_type="CAUSAL_LM")).eval()
    want = output(model, inputs("mistral"))
    adapters.save_merged(model, tmp_path, target="transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (plain.config.model_type, plain.config.mlp_bias, plain.config.attention_bias) == ("llama", True, False)
    torch.testing.assert_close(output(plain, inputs("mistral")), want, rtol=1e-4, atol=1e-4)


def test_merging_says_what_may_lose_the_biases():
    model = peft.get_peft_model(build("llama"), config("mlp")).eval()
    with pytest.warns(UserWarning, match="Nothing is known of vLLM and biases of MLPs"):
        plain = model.merge_and_unload()
    assert plain.config.mlp_bias


def test_adapters_of_several_sites_on_one_model():
    values = inputs("llama")
    model = peft.get_peft_model(build("llama"), config("block"), "block")
    model.add_adapter("mlp", config("mlp"))
    model.add_adapter("head", config("head"))
    model.eval()
    kinds = [layer.edits for layer in model.modules() if isinstance(layer, adapters.JolaLayer)]
    assert sorted(kinds) == ["block", "block", "head", "head", "mlp", "mlp"]
    alone = {}
    for name in ("block", "mlp", "head"):
        model.set_adapter(name)
        alone[name] = output(model, values)
    mixed = output(model, values | {"adapter_names": ["mlp", "block"]})
    torch.testing.assert_close(mixed, torch.stack([alone["mlp"][0], alone["block"][1]]), rtol=1e-4, atol=1e-4)
    model.merge_adapter(["mlp", "head"])
    model.unmerge_adapter()
    model.set_adapter("block")
    assert torch.equal(output(model, values), alone["block"])
    with pytest.raises(ValueError, match=r"another adapter edits this module with site='mlp'"):
        model.add_adapter("more", adapters.JolaConfig(target_modules=["down_proj"], head_dim=8))
    with pytest.raises(ValueError, match="with site block and mlp"):
        model.add_weighted_adapter(["mlp", "block"], [0.5, 0.5], "sum")


@pytest.mark.parametrize("site", SITES)
def test_weighted_adapters(site):
    model = peft.get_peft_model(build("llama"), config(site), "one")
    model.add_adapter("two", config(site))
    model.add_weighted_adapter(["one", "two"], [0.25, 0.5], "sum")
    model.set_adapter("sum")
    one, two = edits_of(model, "one"), edits_of(model, "two")
    edits = {
        name: (1 + 0.25 * (p - 1) + 0.5 * (two[name][0] - 1), 0.25 * q + 0.5 * two[name][1])
        for name, (p, q) in one.items()
    }
    expected = output(edited_by_hand(build("llama"), edits), inputs("llama"))
    torch.testing.assert_close(output(model.eval(), inputs("llama")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_a_pool_serves_them(site, tmp_path):
    values = inputs("llama")
    want = {}
    for name in ("one", "two"):
        model = peft.get_peft_model(build("llama"), config(site, task_type="CAUSAL_LM")).eval()
        want[name] = output(model, values)
        adapters.save_adapter(model, tmp_path / name)
    base = build("llama")
    plain = output(base, values)
    pool = adapters.AdapterPool(base, adapters.JolaConfig(site=site), capacity=4)
    for name in want:
        pool.load(name, tmp_path / name)
    with pool.batch(["two", None]):
        got = output(base, values)
    torch.testing.assert_close(got, torch.stack([want["two"][0], plain[1]]), rtol=1e-4, atol=1e-4)
    assert torch.equal(output(base, values), plain)
    other = peft.get_peft_model(build("llama"), config("head", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=rf"expected an adapter with site='{site}' as the pool's, got site='head'"):
        pool.load("three", other)
    pool.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize("site", SITES)
def test_units_monitors_and_maps(site):
    values = inputs("llama")
    model = peft.get_peft_model(build("llama"), config(site, freeze_gates=False)).eval()
    before = output(model, values)
    seen = {}
    plain = build("llama")
    for name in layers(model):
        plain.get_submodule(name).register_forward_hook(
            lambda _, inputs, result, name=name: seen.__setitem__(
                name, result[0] if isinstance(result, tuple) else result
            )
        )
    output(plain, values)
    units = adapters.measure_units(model, [values])
    for name, unit in units.items():
        torch.testing.assert_close(torch.tensor(unit), seen[name].square().mean().sqrt().reshape(1))
    torch.testing.assert_close(output(model, values), before, rtol=1e-5, atol=1e-5)
    with adapters.EditMonitor(model, every=1) as monitor:
        output(model, values)
    first = next(iter(layers(model)))
    (p, q), z = edits_of_factors(model)[first], seen[first]
    sizes = (z * (p - 1) + q).norm(dim=-1) / z.norm(dim=-1)
    torch.testing.assert_close(monitor.statistics()[first]["mean"][0], float(sizes.mean()), rtol=1e-4, atol=0)
    gates = adapters.gate_map(model)
    assert (list(gates.sites), gates.m) == (list(layers(model)), ((1.0,), (1.0,)))
    assert all(module.reason == "its JoLA adapters edit no heads" for module in adapters.coverage(model).skipped)


def edits_of_factors(model):
    return {name: layer.factors(["default"]) for name, layer in layers(model).items()}


def test_a_joint_adapter_edits_blocks_and_mlps(tmp_path):
    values = inputs("llama")
    for site in SITES:
        made = adapters.JointConfig(task_type="CAUSAL_LM", jola=config(site), curvature={"init_beta": 0.3})
        model = peft.get_peft_model(build("llama"), made).eval()
        assert {layer.edits for layer in layers(model).values()} == {site}
        want = output(model, values)
        adapters.save_adapter(model, tmp_path / site)
        again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / site).eval()
        assert torch.equal(output(again, values), want)
        base = again.unload()
        assert torch.equal(output(base, values), output(build("llama"), values))


def test_what_knows_only_heads_refuses_by_name(tmp_path):
    model = peft.get_peft_model(build("llama"), config("mlp", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"site='head', got site='mlp'"):
        adapters.save_as_lora(model, tmp_path)
    with pytest.raises(ValueError, match="expected a model with JoLA layers that edit heads"):
        adapters.fuse_attention(model)
    names = ("attn_A", "attn_v", "log_g1", "log_g2")
    with pytest.raises(
        ValueError, match=r"down_proj: the checkpoint edits heads, and adapter 'default' has site='mlp'"
    ):
        adapters.load_official(model, {f"layers.0.self_attn.{name}": torch.zeros(4) for name in names})
    blocks = peft.get_peft_model(build("llama"), config("block", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"cannot merge .*a block's output"):
        adapters.save_merged(blocks, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


class Returning(nn.Module):
    def forward(self, x):
        return {"hidden": x}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"site": "neuron"}, r"site must be one of \('head', 'mlp', 'block'\), got 'neuron'"),
        ({"site": "mlp", "additive": "kv_group"}, r"additive must be 'head' with site='mlp'"),
        ({"site": "mlp", "head_dim": 5}, r"layers\.0\.mlp\.down_proj: head_dim must divide the 32 features"),
        ({"site": "mlp", "target_modules": ["mlp"]}, r"mlp: expected a linear projection .*, got LlamaMLP"),
        ({"site": "block", "layers_to_transform": [0, 7]}, r"name \[7\], where no module"),
        ({"site": "block", "heads": [1]}, r"layers\.0: heads must be distinct and in 0\.\.0"),
    ],
)
def test_errors_name_what_is_wrong(values, message):
    model = build("llama")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, adapters.JolaConfig(**values))
    assert [name for name, _ in model.named_modules()] == before


def test_own_modules_as_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config("block", target_modules=["1"], head_dim=6)).eval()
    assert torch.allclose(wrapped(x), edited_by_hand(model, edits_of(wrapped))(x))
    with pytest.raises(ValueError, match=r"1: cannot read the width of its output .*; set head_dim"):
        peft.get_peft_model(copy.deepcopy(model), config("block", target_modules=["1"]))
    strange = peft.get_peft_model(nn.Sequential(Returning()), config("block", target_modules=["0"], head_dim=4))
    with pytest.raises(ValueError, match="0: expected an output that is a tensor or a tuple"):
        strange(x)


def test_an_inactive_adapter_of_blocks_is_left_out_of_a_merged_model(tmp_path):
    model = peft.get_peft_model(build("llama"), config("head", edit="multiplicative", task_type="CAUSAL_LM"))
    model.add_adapter("blocks", config("block", task_type="CAUSAL_LM"))
    want = output(model.eval(), inputs("llama"))
    adapters.save_merged(model, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(output(plain, inputs("llama")), want, rtol=1e-4, atol=1e-4)
    model.set_adapter("blocks")
    assert not torch.allclose(output(model, inputs("llama")), want)


@pytest.mark.parametrize("recorded_before", [True, False])
def test_recorded_hidden_states_are_what_the_next_block_gets(recorded_before):
    base, seen = build("llama"), []
    if recorded_before:  # transformers then has its hooks on the blocks
        base(**inputs("llama"), output_hidden_states=True)
    model = peft.get_peft_model(base, config("block", task_type="CAUSAL_LM")).eval()
    base.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    states = model(**inputs("llama"), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], seen[0])
