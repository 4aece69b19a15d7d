"""Merging: stacks with other methods, casts and moves while merged, several adapters, what it refuses."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from jola_families import build, inputs, output
from torch import nn

import ctkernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama")


def _jola(**values):
    return adapters.JolaConfig(task_type="CAUSAL_LM", **({"init_std": 0.4} | values))


def _lora(**values):
    options = {"r": 4, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft.LoraConfig(**options | values)


def _ia3():
    return peft.IA3Config(
        target_modules=["o_proj"], feedforward_modules=[], task_type="CAUSAL_LM", init_ia3_weights=False
    )


def _layers(model):
    return [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]


def _projections(model):
    """The innermost modules at the attention's output, whatever lies on them."""
    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    found = []
    for attention in attentions:
        module = attention.o_proj
        while hasattr(module, "base_layer"):
            module = module.base_layer
        found.append(module)
    return found


def _same(got, expected):
    # float64: the two differ by the order of a few hundred sums and products in two layers
    bound = 1e3 * torch.finfo(torch.float64).eps * expected.abs().max()
    assert (got - expected).abs().max() <= bound


def _stack(*configs):
    model = build("llama").double()
    torch.manual_seed(3)
    for number, config in enumerate(configs):
        model = peft.get_peft_model(model, config, adapter_name=f"a{number}")
    return model.eval()


STACKS = {
    "JoLA over LoRA": lambda: (_lora(), _jola()),
    "LoRA over JoLA": lambda: (_jola(), _lora()),
    "JoLA over IA3": lambda: (_ia3(), _jola()),
    "IA3 over JoLA": lambda: (_jola(), _ia3()),
    "LoRA over JoLA over LoRA": lambda: (_lora(), _jola(), _lora(r=2)),
    "JoLA over a LoRA with DoRA": lambda: (_lora(use_dora=True), _jola()),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_merges_in_its_order_and_comes_back_bit_for_bit(name):
    model = _stack(*STACKS[name]())
    expected = output(model, VALUES)
    before = [(p.weight.clone(), p.bias) for p in _projections(model)]
    model.merge_adapter()
    _same(output(model, VALUES), expected)
    assert all(layer.merged for layer in _layers(model))
    model.unmerge_adapter()
    for projection, (weight, bias) in zip(_projections(model), before):
        assert torch.equal(projection.weight, weight)
        assert projection.bias is bias is None
    assert torch.equal(output(model, VALUES), expected)


@pytest.mark.parametrize("name", STACKS)
def test_disabling_a_merged_stack_gives_the_base(name):
    model = _stack(*STACKS[name]())
    plain, expected = output(build("llama").double().eval(), VALUES), output(model, VALUES)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, VALUES), plain)
    _same(output(model, VALUES), expected)


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_saved_merged(name, tmp_path):
    model = _stack(*STACKS[name]())
    expected = output(model, VALUES)
    weights = [p.weight.clone() for p in _projections(model)]
    adapters.save_merged(model, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    _same(output(plain, VALUES), expected)
    assert all(torch.equal(p.weight, w) for p, w in zip(_projections(model), weights))
    assert torch.equal(output(model, VALUES), expected)


def test_a_stack_of_peft_models_is_not_unloaded_halfway():
    model = _stack(_lora(), _jola())
    expected = output(model, VALUES)
    for unload in (model.merge_and_unload, model.unload):
        with pytest.raises(ValueError, match="expected a model with one PeftModel around it, got one inside another"):
            unload()
        assert torch.equal(output(model, VALUES), expected)


def test_one_half_of_a_stack_is_not_merged_alone():
    for configs, alone in (((_lora(), _jola()), "a1"), ((_jola(), _lora()), "a1")):
        model = _stack(*configs)
        expected = output(model, VALUES)
        with pytest.raises(ValueError, match=r"whose active adapters \['a0'\] are not merged; merge them too"):
            model.merge_adapter(adapter_names=[alone])
        assert torch.equal(output(model, VALUES), expected)
    model.merge_adapter(adapter_names=["a0"])  # what is inside may be merged before what lies over it
    _same(output(model, VALUES), expected)
    model.merge_adapter(adapter_names=["a1"])
    _same(output(model, VALUES), expected)


def test_an_adapter_switched_on_below_a_merged_one_is_no_silent_error():
    lora = peft.get_peft_model(build("llama"), _lora())
    lora.add_adapter("later", _lora())
    model = peft.get_peft_model(lora, _jola()).eval()
    model.merge_adapter()
    for layer in _layers(model):
        layer.base_layer.set_adapter(["default", "later"])
    with pytest.raises(ValueError, match=r"over a Linear whose active adapters \['later'\] are not merged"):
        output(model, VALUES)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["cast", "meta", "half, then back"])
def test_what_is_unmerged_has_been_cast_and_moved_with_the_model(family, how):
    move = {
        "cast": lambda m: m.to(torch.bfloat16),
        "meta": lambda m: m.to("meta"),
        "half, then back": lambda m: m.half().float(),
    }[how]
    model = peft.get_peft_model(build(family), _jola()).eval()
    twin = copy.deepcopy(model)
    original = _layers(model)[0].base_layer.weight
    model.merge_adapter()
    move(model)
    model.unmerge_adapter()
    move(twin)
    for layer, expected in zip(_layers(model), _layers(twin)):
        for name in ("weight", "bias"):
            got, want = getattr(layer.base_layer, name), getattr(expected.base_layer, name)
            assert (got is None) == (want is None)
            if got is not None:
                assert (got.device, got.dtype, got.shape) == (want.device, want.dtype, want.shape)
                assert how == "meta" or torch.equal(got, want)
    if how != "meta":
        assert _layers(model)[0].base_layer.weight is original
        assert torch.equal(output(model, inputs(family)), output(twin, inputs(family)))


def test_a_merged_model_is_cast_and_switched_off():
    model = peft.get_peft_model(build("llama"), _jola()).eval()
    model.merge_adapter()
    model.to(torch.bfloat16)
    plain = output(build("llama").to(torch.bfloat16), VALUES)
    with model.disable_adapter():
        assert torch.equal(output(model, VALUES), plain)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["JoLA over LoRA", "LoRA over JoLA"])
def test_a_copy_of_a_merged_model_unmerges_by_itself(copier, name):
    model = _stack(*STACKS[name]())
    expected = output(model, VALUES)
    model.merge_adapter()
    twin = copier(model)
    twin.unmerge_adapter()
    assert torch.equal(output(twin, VALUES), expected)
    assert all(layer.merged for layer in _layers(model))
    twin.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(output(model, VALUES), expected)
    _same(output(twin, VALUES), expected)


# ------------------------------------------------------------------------------------------------- several adapters


def _two():
    torch.manual_seed(2)
    model = peft.get_peft_model(build("llama").double(), _jola())
    model.add_adapter("second", _jola(init_std=0.5))
    return model.eval()


def test_merging_twice_and_unmerging_twice():
    model = _two()
    expected = output(model, VALUES)
    model.merge_adapter()
    weight = _layers(model)[0].base_layer.weight
    model.merge_adapter()
    model.merge_adapter(["default", "default"])
    assert _layers(model)[0].base_layer.weight is weight
    assert _layers(model)[0].merged_adapters == ["default"]
    model.unmerge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="nothing is merged"):
        _layers(model)[0].unmerge()
    assert torch.equal(output(model, VALUES), expected)


def test_adapters_merged_one_after_the_other_come_back_at_once():
    model = _two()
    model.base_model.set_adapter(["default", "second"])
    expected = output(model, VALUES)
    weight = _layers(model)[0].base_layer.weight
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    _same(output(model, VALUES), expected)
    model.unmerge_adapter()
    assert _layers(model)[0].base_layer.weight is weight


def test_an_unknown_adapter_is_not_merged_silently():
    model = _two()
    with pytest.raises(ValueError, match=r"adapter_names must be among \['default', 'second'\], got \['third'\]"):
        model.merge_adapter(["third"])
    with pytest.raises(TypeError, match="list of names"):
        _layers(model)[0].merge(adapter_names="second")


def test_a_merged_adapter_is_neither_replaced_nor_deleted_nor_loaded_over(tmp_path):
    model = _two()
    expected = output(model, VALUES)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    model.merge_adapter()
    merged = output(model, VALUES)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(output(model, VALUES), merged)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"cannot load the adapters \['default'\] while they are merged"):
        model.load_adapter(tmp_path, "default")
    assert set(model.peft_config) == {"default", "second"}
    assert torch.equal(output(model, VALUES), merged)
    second = output(_switched(copy.deepcopy(model), "second"), VALUES)
    model.unmerge_adapter()
    assert torch.equal(output(model, VALUES), expected)
    model.set_adapter("second")
    assert torch.equal(output(model, VALUES), second)


def _switched(model, name):
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter(name)
    assert not any(layer.merged for layer in _layers(model))
    return model


def test_switching_below_a_merged_stack_takes_the_whole_stack_apart():
    inner = peft.get_peft_model(build("llama").double(), _jola())
    inner.add_adapter("second", _jola())
    model = peft.get_peft_model(inner, _lora(), adapter_name="lora").eval()
    weights = [p.weight.clone() for p in _projections(model)]
    expected = output(model, VALUES)
    model.merge_adapter()
    _switched(inner, "default")
    assert all(torch.equal(p.weight, w) for p, w in zip(_projections(model), weights))
    assert torch.equal(output(model, VALUES), expected)


def test_what_was_merged_without_being_active_is_so_after_disabling():
    model = _two()
    plain = output(build("llama").double(), VALUES)
    model.merge_adapter(["second"])
    merged = output(model, VALUES)
    with model.disable_adapter():
        assert torch.equal(output(model, VALUES), plain)
    assert torch.equal(output(model, VALUES), merged)
    assert _layers(model)[0].merged_adapters == ["second"]


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("configs", [(_jola(),), (_lora(), _jola()), (_jola(), _lora())])
def test_a_broken_adapter_is_refused_in_the_words_of_peft(configs):
    model = _stack(*configs)
    with torch.no_grad():
        layer = _layers(model)[-1]
        name = next(iter(layer.jola_a))
        layer.jola_a[name][0, 0] = float("inf")
    weights = [(p, p.weight, p.weight.clone()) for p in _projections(model)]
    # which peft's own tests look for
    message = rf"NaNs detected in the merged weights\. The adapter {name} seems to be broken"
    if not isinstance(model.peft_config[f"a{len(configs) - 1}"], adapters.JolaConfig):
        with pytest.raises(ValueError, match=message):
            model.merge_adapter(safe_merge=True)
        return  # there peft's own loop has merged the first layer already
    for merge in (model.merge_adapter, model.merge_and_unload)[: 3 - len(configs)]:
        with pytest.raises(ValueError, match=message):
            merge(safe_merge=True)
        for projection, weight, value in weights:
            assert projection.weight is weight
            assert torch.equal(weight, value)
            assert projection.bias is None
        assert not any(m.merged for m in model.modules() if hasattr(m, "merged_adapters"))


def test_a_weight_shared_with_another_module_is_refused_where_it_would_be_shared_again(tmp_path):
    base = build("llama")
    base.model.layers[1].self_attn.o_proj.weight = base.model.layers[0].self_attn.o_proj.weight
    model = peft.get_peft_model(base, _jola()).eval()
    expected = output(model, VALUES)
    with pytest.raises(ValueError, match=r"self_attn\.o_proj: its weight is also that of model\.layers"):
        adapters.save_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(output(model, VALUES), expected)
    projections = _projections(model)
    assert projections[0].weight is projections[1].weight


def test_embeddings_that_merging_unties_are_saved_untied(tmp_path):
    torch.manual_seed(0)
    config = copy.deepcopy(build("llama").config)
    config.tie_word_embeddings = True
    base = transformers.LlamaForCausalLM(config).eval()
    options = {"target_modules": ["lm_head"], "edit": "multiplicative", "head_dim": 8}
    model = peft.get_peft_model(base, _jola(**options)).eval()
    expected = output(model, VALUES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters.save_merged(model, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(plain, VALUES), expected, rtol=1e-5, atol=1e-6)
    assert base.config.tie_word_embeddings
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    assert torch.equal(output(model, VALUES), expected)


def test_an_activation_cannot_be_saved_as_weights(tmp_path):
    model = peft.get_peft_model(build("llama"), _jola())
    model.get_base_model().activation = adapters.CurvatureLayer("activation", "silu")
    with pytest.raises(ValueError, match="activation: a CurvatureLayer cannot be folded into weights"):
        adapters.save_merged(model, tmp_path / "out")
    with pytest.raises(ValueError, match="expected one with a JoLA adapter, got one without"):
        adapters.save_merged(peft.get_peft_model(build("llama"), _lora()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:steer:UserWarning")
def test_a_steered_model_is_not_saved_as_a_plain_one(tmp_path):
    model = peft.get_peft_model(build("llama"), _jola()).eval()
    handle = ctkernels.steer(model, 0.2, 0.8, activations=["silu"])
    steered = output(model, VALUES)
    with pytest.raises(ValueError, match=r"expected plain activations, got CT units.*remove\(\) the steering first"):
        adapters.save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert torch.equal(output(model, VALUES), steered)
    handle.remove()
    expected = output(model, VALUES)
    assert not torch.equal(expected, steered)
    adapters.save_merged(model, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(plain, VALUES), expected, rtol=1e-5, atol=1e-5)


def test_a_network_of_its_own_is_merged_in_memory_only(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.head_dim, self.o_proj = 2, 4, nn.Linear(8, 8)

        def forward(self, x):
            return self.o_proj(x)

    model = peft.get_peft_model(Attention(), adapters.JolaConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=r"expected a transformers model, got Attention; use model\.merge_and_unload"):
        adapters.save_merged(model, tmp_path / "out")


def test_unloading_merged_does_not_warn_of_what_it_merged_itself():
    model = peft.get_peft_model(build("llama"), _jola(edit="multiplicative")).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_and_unload()
    assert not [w for w in caught if "already merged" in str(w.message)]
