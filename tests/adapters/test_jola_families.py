"""Every family of the table, from attaching an adapter to detaching it, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from jola_families import FAMILIES, build, inputs, output

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

# Architectures with no bias in the projection and no switch for one, in transformers 4.57 to 5.23.
NO_BIAS = {
    *("mistral", "mixtral", "qwen2", "qwen2_moe", "phi3", "glm", "glm4", "helium", "exaone4", "stablelm"),
    *("gpt_neox_japanese", "gptj", "codegen", "mpt", "t5", "mt5", "umt5"),
}

# Those of them that are saved as another architecture with the same mathematics.
REHOMED = {"mistral": "llama", "qwen2": "llama"}

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:JoLA edits only a part:UserWarning"
)


def _layers(model):
    return [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]


def _gates(model, value):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "jola_log_alpha" in name:
                parameter.fill_(value / 10)  # in units of the gates' rate


def _attach(model, init_std=0.3, **values):
    torch.manual_seed(7)
    return peft.get_peft_model(model, adapters.JolaConfig(init_std=init_std, **values)).eval()


def _by_hand(layer, z, adapter="default"):
    """The edit head by head, from the parameters and the clipped gate written out."""
    gate = {
        kind: (1.2 * torch.sigmoid(10 * getattr(layer, f"jola_log_alpha_{kind}")[adapter]) - 0.1).clamp(0, 1)
        for kind in "ma"
    }
    edited = z.clone()
    for head in range(layer.num_heads):
        part = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        scale = 1 + gate["m"][head] * layer.jola_m[adapter][head]
        edited[..., part] = scale * z[..., part] + gate["a"][head] * layer.jola_a[adapter][head]
    return edited


def assert_near(actual, expected, tolerance=2e-5):
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def test_every_family_of_the_table_is_tested():
    assert set(adapters.jola.sites.PATTERNS) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_attach_edit_merge_and_detach(name):
    family, values = FAMILIES[name], inputs(name)
    # frozen as it will be: torch's own multi-head attention then takes another way, with other roundings
    model = build(name).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = output(model, values)
    wrapped = _attach(model)
    layers = _layers(wrapped)
    assert len(layers) == family.sites

    _gates(wrapped, -10.0)
    assert torch.equal(output(wrapped, values), expected)

    _gates(wrapped, 0.7)
    seen = []
    handles = [layer.register_forward_pre_hook(lambda m, args: seen.append([m, args[0]])) for layer in layers]
    handles += [
        layer.base_layer.register_forward_pre_hook(lambda m, args: seen[-1].append(args[0])) for layer in layers
    ]
    edited = output(wrapped, values)
    for handle in handles:
        handle.remove()
    assert len(seen) >= family.sites
    for layer, z, result in seen:
        assert_near(result, _by_hand(layer, z), 1e-6)
    assert (edited - expected).abs().max() > 1e-3

    weights = [(layer.base_layer.weight, layer.base_layer.bias) for layer in layers]
    wrapped.merge_adapter()
    assert_near(output(wrapped, values), edited)
    wrapped.unmerge_adapter()
    assert all(
        layer.base_layer.weight is weight and layer.base_layer.bias is bias
        for layer, (weight, bias) in zip(layers, weights)
    )
    assert torch.equal(output(wrapped, values), edited)

    plain = wrapped.unload()
    assert torch.equal(output(plain, values), expected)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not _layers(plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_adapter_and_saved_merged_model_reload(name, tmp_path):
    values = inputs(name)
    wrapped = _attach(build(name))
    _gates(wrapped, 0.7)
    edited = output(wrapped, values)

    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "adapter").eval()
    assert torch.equal(output(again, values), edited)

    model = wrapped.get_base_model()
    settings = dict(model.config.__dict__)
    if name in NO_BIAS and name not in REHOMED:
        with pytest.raises(ValueError, match="has no bias in"):
            adapters.save_merged(wrapped, tmp_path / "merged", target="transformers")
        assert not (tmp_path / "merged").exists()
    else:
        adapters.save_merged(wrapped, tmp_path / "merged", target="transformers")
        saved = transformers.AutoModelForCausalLM if name in REHOMED else type(model)
        plain = saved.from_pretrained(tmp_path / "merged").eval()
        assert plain.config.model_type == REHOMED.get(name, model.config.model_type)
        assert not _layers(plain)
        assert_near(output(plain, values), edited)
    if name in NO_BIAS:
        with pytest.warns(UserWarning, match="would lose the additive edits"):
            again.merge_and_unload()
    else:
        merged = again.merge_and_unload()
        merged.save_pretrained(tmp_path / "unloaded")
        assert_near(output(type(model).from_pretrained(tmp_path / "unloaded").eval(), values), edited)
    assert model.config.__dict__ == settings
    assert torch.equal(output(wrapped, values), edited)


@pytest.mark.parametrize("name", sorted(NO_BIAS))
def test_multiplicative_edits_merge_where_there_is_no_bias(name, tmp_path):
    values = inputs(name)
    wrapped = _attach(build(name), edit="multiplicative")
    edited = output(wrapped, values)
    adapters.save_merged(wrapped, tmp_path, target="transformers")
    plain = type(wrapped.get_base_model()).from_pretrained(tmp_path).eval()
    assert_near(output(plain, values), edited)


GENERATORS = ["llama", "qwen3", "gemma2", "deepseek_v3", "gpt_oss", "gpt2", "gpt_neox", "bloom", "opt", "bart", "t5"]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*GENERATORS, "whisper"])
def test_generation_with_a_cache_equals_that_without_and_that_of_the_merged_model(name, beams):
    model = build(name)
    if FAMILIES[name].kind == "audio":
        values = {"input_features": inputs(name)["input_features"]}
    else:
        values = {"input_ids": inputs(name)["input_ids"], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "min_new_tokens": 5}
    plain = model.generate(**values, **options)
    wrapped = _attach(model, init_std=2.0)
    cached = wrapped.generate(**values, **options, use_cache=True)
    assert not torch.equal(cached, plain)
    assert torch.equal(cached, wrapped.generate(**values, **options, use_cache=False))
    wrapped.merge_adapter()
    assert torch.equal(cached, wrapped.generate(**values, **options))


PADDED = ["llama", "qwen2", "gemma", "phi", "gpt_neox", "gpt2", "opt", "bloom"]


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in PADDED for side in ("left", "right")] + [("bert", "right"), ("deberta-v2", "right")],
)
def test_padding_does_not_change_the_other_tokens(name, side):
    wrapped = _attach(build(name))
    tokens = inputs(name, batch=1)["input_ids"]
    alone = output(wrapped, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    padding = torch.zeros(1, 3, dtype=torch.long)
    parts = [padding, tokens] if side == "left" else [tokens, padding]
    mask = torch.cat([torch.full_like(part, int(part is tokens)) for part in parts], 1)
    values = {"input_ids": torch.cat(parts, 1), "attention_mask": mask}
    if side == "left" and name == "gpt2":
        values["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = output(wrapped, values)
    own = padded[:, 3:] if side == "left" else padded[:, : tokens.shape[1]]
    assert_near(own, alone, 1e-5)
