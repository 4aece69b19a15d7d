"""Which attention modules are edited: none is missed without a word, and no edit is without effect."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from jola_families import FAMILIES, SEQ2SEQ, SMALL, SPEECH, VISION, build, inputs, output
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TOKENS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
SPEECH_FEATURES = SMALL | {"feature_projection_input_dim": 16}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _made(name, **values):
    """The model class `name` with its configuration of `values`, its random weights large enough to see."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def _led():
    window = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    return _made("LEDModel", **SEQ2SEQ | window)


def _xcit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("xcit_nano_12_p16_224", depth=2, embed_dim=32, num_heads=4, num_classes=5, img_size=32)


def _llava():
    return _made(
        "LlavaForConditionalGeneration",
        text_config=transformers.LlamaConfig(**SMALL),
        vision_config=transformers.CLIPVisionConfig(**VISION | {"num_hidden_layers": 3}),
        image_token_index=5,
    )


# model, inputs, sites, and the modules that make the values of the site's heads
FOUND: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor], int, list[str]]] = {
    "LED": (
        _led,
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]},
        6,
        ["longformer_self_attn.value", "longformer_self_attn.value_global", "v_proj"],
    ),
    "BigBird-Pegasus": (
        lambda: _made("BigBirdPegasusModel", **SEQ2SEQ, attention_type="original_full"),
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]},
        6,
        ["self.value", "v_proj"],
    ),
    "wav2vec2-conformer": (
        lambda: _made("Wav2Vec2ConformerModel", **SPEECH),
        {"input_values": torch.randn(2, 400)},
        2,
        ["linear_v"],
    ),
    "wav2vec2-bert": (
        lambda: _made("Wav2Vec2BertModel", **SPEECH_FEATURES),
        {"input_features": torch.randn(2, 8, 16)},
        2,
        ["linear_v"],
    ),
    "AIMv2": (lambda: _made("Aimv2VisionModel", **VISION), {"pixel_values": PIXELS}, 3, ["v_proj"]),
    "XCiT": (_xcit, {"x": torch.randn(2, 3, 32, 32)}, 4, ["qkv", "v"]),
}


def _run(model, values):
    with torch.no_grad():
        result = model(**values)
    pooled = getattr(result, "pooler_output", None)
    return result if isinstance(result, torch.Tensor) else result[0] if pooled is None else pooled


@pytest.mark.parametrize("name", FOUND)
def test_every_attention_module_is_edited_head_by_head(name, recwarn):
    """Closing a head by its multiplicative edit is the same as values that are zero in that head, in a model apart."""
    make, values, count, makers = FOUND[name]
    torch.manual_seed(7)
    model = peft.get_peft_model(make(), adapters.JolaConfig(init_std=0.0, edit="multiplicative")).eval()
    assert not [warning for warning in recwarn if "only a part" in str(warning.message)]
    found = adapters.coverage(model)
    assert [len(found.attention), len(found.edited), len(found.skipped)] == [count, count, 0]
    closed = make().eval()
    plain = _run(closed, values)
    for layer in (module for module in model.modules() if isinstance(module, adapters.JolaLayer)):
        with torch.no_grad():
            layer.jola_m["default"][1] = -1.0
        part = slice(layer.head_dim, 2 * layer.head_dim)
        attention = closed.get_submodule(layer.site.rpartition(".")[0])
        ours = [maker for maker in makers if maker in dict(attention.named_modules())]
        assert ours
        for maker in map(attention.get_submodule, ours):
            rows = range(maker.out_features)[-layer.in_features :][part]  # of a fused projection, the last third
            with torch.no_grad():
                maker.weight[list(rows)] = 0
                if maker.bias is not None:
                    maker.bias[list(rows)] = 0
    edited, expected = _run(model, values), _run(closed, values)
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))
    assert (edited - plain).abs().max() > 1e-3 * plain.abs().max()


def test_a_pooling_head_that_cannot_be_edited_is_told_at_once():
    message = r"edits only a part of this model's attention: vision_model\.head \(.*gives its weights to"
    with pytest.warns(UserWarning, match=message):
        model = peft.get_peft_model(build("siglip"), adapters.JolaConfig())
    (head,) = adapters.coverage(model).skipped
    assert (head.name, head.kind, head.site) == ("vision_model.head", "SiglipMultiheadAttentionPoolingHead", None)
    assert "MultiheadAttention gives its weights to F.multi_head_attention_forward" in head.reason


@pytest.mark.parametrize(
    ("name", "values"),
    [("siglip", {"exclude_modules": ["vision_model.head"]}), ("llama", {"layers_to_transform": [1]}), ("bert", {})],
)
def test_no_warning_where_nothing_is_missed_or_it_was_asked_for(name, values):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "JoLA edits")
        peft.get_peft_model(build(name), adapters.JolaConfig(**values))


def test_the_reasons_of_what_is_left_out():
    def reasons(**values):
        model = peft.get_peft_model(build("llama"), adapters.JolaConfig(**values))
        return {module.name: module.reason for module in adapters.coverage(model).skipped}

    first, second = "model.layers.0.self_attn", "model.layers.1.self_attn"
    assert reasons() == {}
    assert reasons(layers_to_transform=[1]) == {first: "left out by layers_to_transform or heads"}
    assert reasons(heads={"0": [1]}) == {second: "left out by layers_to_transform or heads"}
    assert reasons(exclude_modules=["layers.1.self_attn.o_proj"]) == {second: "left out by exclude_modules"}
    assert reasons(target_modules=[f"{first}.o_proj"]) == {second: "not in target_modules"}
    plain = adapters.coverage(build("llama"))
    assert {module.reason for module in plain.skipped} == {"the model has no JoLA adapter"}


def test_two_adapters_and_print(capsys):
    model = peft.get_peft_model(build("llama"), adapters.JolaConfig(layers_to_transform=[0]))
    model.add_adapter("other", adapters.JolaConfig())
    assert [module.adapters for module in adapters.coverage(model).attention] == [("default", "other"), ("other",)]
    adapters.print_coverage(model)
    assert re.search(r"^model\.layers\.\*\.self_attn +LlamaAttention +2 of 2$", capsys.readouterr().out, re.MULTILINE)


def test_layers_whose_output_a_model_never_uses_are_left_alone():
    model = peft.get_peft_model(_llava(), adapters.JolaConfig(init_std=0.3))
    (last,) = adapters.coverage(model).skipped
    assert last.name == "model.vision_tower.encoder.layers.2.self_attn"
    assert last.reason == "the model does not use its output (vision_feature_layer=-2)"
    tokens = torch.cat([torch.full((2, 4), 5), TOKENS[:, :3] + 3], 1)
    model(input_ids=tokens, pixel_values=PIXELS).logits.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if "jola_m" in name}
    assert len(grads) == 4
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    with pytest.warns(UserWarning, match=r"layers\.2\.self_attn\.out_proj.*does not use its output"):
        peft.get_peft_model(_llava(), adapters.JolaConfig(target_modules=["out_proj"]))


# ---- a projection whose weight is used without calling it ----


def test_attention_that_gives_its_weights_away_is_refused_also_by_name():
    model = _made("WavLMModel", **SPEECH)
    with pytest.raises(ValueError, match=r"attention\.out_proj: WavLMAttention gives its weights to F\.multi_head"):
        peft.get_peft_model(model, adapters.JolaConfig(target_modules=["attention.out_proj"]))


def _exact_bloom():
    values = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "pretraining_tp": 2}
    return _made("BloomForCausalLM", **values, slow_but_exact=True)


def test_an_edit_that_a_model_passes_by_is_an_error():
    base, values = _exact_bloom(), {"input_ids": TOKENS}
    plain = output(base, values)
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in base.modules()]
    model = peft.get_peft_model(base, adapters.JolaConfig(init_std=0.5, edit="multiplicative")).eval()
    message = r"h\.0\.self_attention\.dense: BloomAttention used the projection's weight without calling"
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=message):
            output(each, values)
    with model.disable_adapter():
        assert torch.equal(output(model, values), plain)
    twin = _exact_bloom()
    for block in twin.transformer.h:
        block.self_attention.slow_but_exact = False
    twin = peft.get_peft_model(twin, adapters.JolaConfig(edit="multiplicative")).eval()
    twin.load_state_dict(model.state_dict())
    expected = output(twin, values)
    model.merge_adapter()  # the weights hold the edit now
    torch.testing.assert_close(output(model, values), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    restored = model.unload()
    assert torch.equal(output(restored, values), plain)
    assert [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in restored.modules()] == hooks


def test_reading_the_weight_of_a_projection_that_is_called_is_no_error():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.qkv = nn.Linear(8, 24)
            self.out_proj = nn.Linear(8, 8)

        def forward(self, x):
            z = self.qkv(x.to(self.out_proj.weight.dtype))[..., :8]
            return self.out_proj(z) + 0 * self.out_proj.bias

    model = peft.get_peft_model(nn.Sequential(Attention()), adapters.JolaConfig(init_std=0.5)).eval()
    layer = model.base_model.model[0].out_proj
    x = torch.randn(3, 8)
    z = model.base_model.model[0].qkv(x)[..., :8]
    assert torch.equal(model(x), layer(z))


# ---- finding them ----


class _Planned(nn.Module):
    """Attention whose output projection no name gives away."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)


def test_the_plan_for_tensor_parallelism_is_asked_before_the_names():
    model = nn.Module()
    model.layers = nn.ModuleList(_Planned() for _ in range(2))
    assert adapters.find_sites(model) == ["layers.0.out", "layers.1.out"]
    model._tp_plan = {"layers.*.mix": "rowwise", "layers.*.qkv": "colwise"}
    assert adapters.find_sites(model) == ["layers.0.mix", "layers.1.mix"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_search_agrees_with_the_table(name):
    """And with transformers' own plan for tensor parallelism, where the family has one."""
    model = build(name)
    found = adapters.find_sites(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JoLA edits only a part")
        model = peft.get_peft_model(model, adapters.JolaConfig(), autocast_adapter_dtype=False)
    sites = [module.site for module in model.modules() if isinstance(module, adapters.JolaLayer)]
    assert found == sites
    plan = getattr(model.get_base_model(), "_tp_plan", None) or {}
    rowwise = [key for key, style in plan.items() if "rowwise" in style and re.search(r"attn|attention", key)]
    for pattern in rowwise:
        assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), site) for site in sites), pattern


@pytest.mark.slow
def test_every_causal_family_with_a_plan_is_found():
    """Of all families that the installed transformers can build from (nearly) their defaults, without weights."""

    def make(family):
        for values in ({"num_hidden_layers": 2}, {}):  # few layers where the defaults allow it
            try:
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    config = transformers.AutoConfig.for_model(family, **values)
                    return transformers.AutoModelForCausalLM.from_config(config)
            except Exception:  # defaults that do not build, or need a package that is not here
                continue
        return None

    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    planned, wrong = [], {}
    for family in mapping:
        model = make(family)
        if model is None:
            continue
        plan = getattr(model, "_tp_plan", None) or {}
        names = {name for name, _ in model.named_modules()}
        rowwise = "|".join(
            key.replace(".", r"\.").replace("*", r"\d+")
            for key, style in plan.items()
            if "rowwise" in style and re.search(r"(self_attn|attn|attention)\.(\*\.)?(o_proj|out_proj|dense)$", key)
        )
        expected = sorted(name for name in names if rowwise and re.fullmatch(rowwise, name))
        if expected:
            planned.append(family)
            if not set(expected) <= set(adapters.find_sites(model)):
                wrong[family] = expected[:1]
    assert not wrong
    assert len(planned) >= 30, planned


# ---- widths ----


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_layer_is_as_wide_as_its_projection(name):
    """LoRA on top of it reads that, as peft's and torch's tools do."""
    model = peft.get_peft_model(build(name), adapters.JolaConfig(init_std=0.5)).eval()
    layer = next(module for module in model.modules() if isinstance(module, adapters.JolaLayer))
    weight = layer.get_base_layer().weight
    assert (layer.in_features, layer.out_features) == (32, 32)
    assert layer.weight is weight
    expected = output(model, inputs(name))
    leaf = layer.site.rsplit(".", 1)[-1]
    config = peft.LoraConfig(target_modules=[leaf], r=2, fan_in_fan_out=name == "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model.get_base_model(), "low")
    assert torch.equal(output(model, inputs(name)), expected)  # LoRA's B starts at zero
