"""llama.cpp itself: what `save_gguf` writes, run there and compared with the adapted model."""

from __future__ import annotations

import itertools

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")
gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

import tiny_gguf  # noqa: E402

from ctkernels.adapters.serving import engines  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _base(family, **values):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SMALL | values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15)
    return model.eval()


def _adapted(model, **values):
    torch.manual_seed(3)
    return peft.get_peft_model(model, adapters.JolaConfig(task_type="CAUSAL_LM", **({"init_std": 0.4} | values))).eval()


FAMILIES = {
    "llama": ({}, "output"),
    "mistral": ({"sliding_window": None}, "output"),
    "qwen2": ({}, "value"),
    "qwen3": ({}, "value"),
    "gemma2": ({"query_pre_attn_scalar": 16}, "value"),
}


@pytest.mark.parametrize(("family", "additive"), itertools.product(FAMILIES, ("head", "kv_group")))
def test_llama_cpp_computes_the_adapted_model(tmp_path, family, additive):
    values, projection = FAMILIES[family]
    base = _base(family, **values)
    tiny_gguf.write(base, tmp_path / "base.gguf")
    model = _adapted(base, additive=additive)
    if additive == "head" and projection == "value":
        with pytest.raises(
            ValueError, match=r"llama\.cpp has no place .*2 heads share values, and their offsets differ"
        ):
            adapters.save_gguf(model, tmp_path / "out.gguf", base=tmp_path / "base.gguf")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["base.gguf"]
        return
    merged = adapters.save_gguf(model, tmp_path / "out.gguf", base=tmp_path / "base.gguf")
    assert merged.place == f"biases of the {projection} projections"
    assert merged.checked_in == "llama.cpp"
    assert merged.error <= merged.tolerance < merged.edit / 100
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.gguf", "out.gguf"]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_a_quantised_base_is_quantised_as_it_was(tmp_path, kind):
    base = _base("llama")
    tiny_gguf.write(base, tmp_path / "base.gguf", kind)
    merged = adapters.save_gguf(_adapted(base), tmp_path / "out.gguf", base=tmp_path / "base.gguf")
    assert merged.error < merged.edit / 2
    old, new = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("base", "out")
    )
    assert {name: tensor.tensor_type for name, tensor in old.items()}.items() <= {
        name: tensor.tensor_type for name, tensor in new.items()
    }.items()
    assert new["blk.0.attn_output.weight"].tensor_type.name == kind
    assert set(new) - set(old) == {"blk.0.attn_output.bias", "blk.1.attn_output.bias"}
    for name, tensor in old.items():
        same = bytes(tensor.data.tobytes()) == bytes(new[name].data.tobytes())
        assert same is not name.endswith("attn_output.weight")


def test_fields_of_the_base_are_kept(tmp_path):
    base = _base("llama")
    tiny_gguf.write(base, tmp_path / "base.gguf")
    adapters.save_gguf(_adapted(base), tmp_path / "out.gguf", base=tmp_path / "base.gguf", verify=False)
    old, new = (gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("base", "out"))
    assert {key: field.contents() for key, field in old.items() if not key.startswith("GGUF.")} == {
        key: field.contents() for key, field in new.items() if not key.startswith("GGUF.")
    }


def test_a_multiplicative_edit_needs_no_bias_in_any_family(tmp_path):
    base = _base("qwen3")
    tiny_gguf.write(base, tmp_path / "base.gguf")
    model = _adapted(base, edit="multiplicative")
    merged = adapters.save_gguf(model, tmp_path / "out.gguf", base=tmp_path / "base.gguf")
    assert merged.place == "the weights alone"
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert not any(name.endswith(".bias") for name in names)


def test_a_wrong_file_is_not_saved(tmp_path, monkeypatch):
    base = _base("llama")
    tiny_gguf.write(base, tmp_path / "base.gguf")
    model = _adapted(base, init_std=0.05)
    real = adapters.JolaLayer.factors
    changes = adapters.serving.gguf._changes

    def forgetful(*args):
        place, changed = changes(*args)
        return place, {name: value for name, value in changed.items() if not name.endswith(".bias")}

    monkeypatch.setattr(adapters.serving.gguf, "_changes", forgetful)
    with pytest.raises(ValueError, match=r"it was not saved.*run in llama\.cpp, it is off by"):
        adapters.save_gguf(model, tmp_path / "out.gguf", base=tmp_path / "base.gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.gguf"]
    assert adapters.JolaLayer.factors is real


def test_bad_input_is_named(tmp_path):
    base = _base("llama")
    tiny_gguf.write(base, tmp_path / "base.gguf")
    model = _adapted(base)
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match=r"base: expected a GGUF file of the base model, got .*missing"):
        adapters.save_gguf(model, out, base=tmp_path / "missing.gguf")
    with pytest.raises(ValueError, match="path: expected another file than base"):
        adapters.save_gguf(model, tmp_path / "base.gguf", base=tmp_path / "base.gguf")
    (tmp_path / "text.gguf").write_text("no GGUF at all, but long enough to be read as a header")
    with pytest.raises(ValueError, match=r"base: expected a GGUF file, got .*text\.gguf, which does not read"):
        adapters.save_gguf(model, out, base=tmp_path / "text.gguf")
    torch.manual_seed(9)
    other = transformers.LlamaForCausalLM(base.config)
    tiny_gguf.write(other, tmp_path / "other.gguf")
    with pytest.raises(
        ValueError, match=r"base: expected the file of this base model, but blk\.0\.attn_output in .*other"
    ):
        adapters.save_gguf(model, out, base=tmp_path / "other.gguf")
    lora = peft.get_peft_model(_base("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    stacked = _adapted(lora)
    with pytest.raises(ValueError, match=r"save_gguf folds JoLA's edits alone, got a Linear; use save_merged"):
        adapters.save_gguf(stacked, out, base=tmp_path / "base.gguf")
    model.merge_adapter()
    with pytest.raises(ValueError, match="save_gguf needs unmerged adapters"):
        adapters.save_gguf(model, out, base=tmp_path / "base.gguf")
    assert not out.exists()


def test_what_llama_cpp_does_not_run_is_told_in_its_words(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match=r"llama\.cpp does not run the merged model:"):
        engines.next_token("llama.cpp", tmp_path / "broken.gguf", [3, 4, 5], 4)


def test_a_base_that_is_off_by_more_than_the_adapters_do_tells_nothing(tmp_path):
    base = _base("gemma2", query_pre_attn_scalar=256)  # llama.cpp takes the size of a head
    tiny_gguf.write(base, tmp_path / "base.gguf")
    model = _adapted(base, additive="kv_group", init_std=0.05)
    with pytest.raises(ValueError, match=r"base: llama\.cpp's outputs of .* are off by .* without any adapter"):
        adapters.save_gguf(model, tmp_path / "out.gguf", base=tmp_path / "base.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert adapters.save_gguf(model, tmp_path / "out.gguf", tmp_path / "base.gguf", verify=False).checked_in == ""
