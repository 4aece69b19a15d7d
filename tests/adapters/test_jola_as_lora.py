"""A JoLA adapter written as a LoRA adapter: plain peft computes the same with it."""

from __future__ import annotations

import json

import pytest
import torch
from jola_families import build, inputs, output

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def _model(family, closed=(), **values):
    torch.manual_seed(2)
    model = peft.get_peft_model(build(family), adapters.JolaConfig(init_std=0.3, **values)).eval()
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, adapters.JolaLayer)):
            for table in (layer.jola_log_alpha_m, layer.jola_log_alpha_a):
                if "default" in table:
                    table["default"][list(closed)] = -1.0  # log alpha -10
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("edit", ["both", "multiplicative", "additive"])
def test_plain_peft_computes_the_same(family, edit, tmp_path):
    model, values = _model(family, closed=(1, 3), edit=edit), inputs(family)
    config = adapters.save_as_lora(model, tmp_path)
    assert (config.r, config.lora_bias) == (1 if edit == "additive" else 2 * 8, edit != "multiplicative")
    lora = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    expected = output(model, values)
    assert (output(build(family), values) - expected).abs().max() > 1e-2
    torch.testing.assert_close(output(lora, values), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_every_site_has_the_rank_of_its_own_open_heads(tmp_path):
    model, values = _model("llama", heads={"0": {"m": [2], "a": []}, "1": {"m": [0, 1, 3], "a": []}}), inputs("llama")
    config = adapters.save_as_lora(model, tmp_path)
    assert (config.r, config.rank_pattern) == (24, {"model.layers.0.self_attn.o_proj": 8})
    lora = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(output(lora, values), output(model, values), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_converted_is_refused(tmp_path):
    model = _model("llama", closed=range(4))
    with pytest.raises(ValueError, match="every gate is closed"):
        adapters.save_as_lora(model, tmp_path / "lora")
    model = _model("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="save_as_lora needs unmerged adapters"):
        adapters.save_as_lora(model, tmp_path / "lora")
    both = peft.get_peft_model(_model("llama").unload(), adapters.JolaConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"expected one without modules_to_save, .* got \['lm_head'\]"):
        adapters.save_as_lora(both, tmp_path / "lora")
    below = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected no adapters but JoLA's, got a Linear of another"):
        adapters.save_as_lora(peft.get_peft_model(below, adapters.JolaConfig(), "jola"), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
