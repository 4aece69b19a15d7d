"""Quantised base models: training, merging (which quantises anew), and what cannot be merged."""

from __future__ import annotations

import warnings

import pytest
import torch
from jola_families import SMALL, inputs

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

from ctkernels.adapters.jola.model import jola_layers  # noqa: E402
from ctkernels.adapters.serving import verify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


WIDTH = 64  # a whole number of nf4 blocks


def _llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"hidden_size": WIDTH})).eval()


def _bitsandbytes(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = _llama()
    for layer in model.model.layers:
        old = layer.self_attn.o_proj
        if kind == "nf4":
            new = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.self_attn.o_proj = new.to("cpu")
    return model


def _torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _llama()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("o_proj"))
    return model


def _base(kind):
    return _torchao() if kind == "torchao-int8" else _bitsandbytes(kind)


@torch.no_grad()
def _logits(model, tokens):
    return model(tokens).logits


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_training_works_and_what_was_trained_is_saved(kind, tmp_path):
    model = _base(kind)
    tokens = inputs("llama")["input_ids"]
    plain = model(tokens).logits.detach()
    wrapped = peft.get_peft_model(model, adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.1))
    optimizer = torch.optim.Adam(adapters.parameter_groups(wrapped, lr=0.05))
    losses = []
    for _ in range(8):
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(tokens).logits, plain)
    with pytest.raises(ValueError, match=r"o_proj is quantised, but the model's config has no quantization_config"):
        adapters.save_merged(wrapped, tmp_path / "x")
    wrapped.eval()
    before = _logits(wrapped, tokens)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(_base(kind), tmp_path / "adapter")
    assert torch.equal(_logits(again, tokens), before)


# -------------------------------------------------------------------------------------------------------------- merging


def _loaded(kind, folder):
    """A model that transformers quantises while it loads it, with rows of several blocks."""
    torch.manual_seed(0)
    values = SMALL | {"hidden_size": 2 * WIDTH, "intermediate_size": 4 * WIDTH}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.1)
    plain.save_pretrained(folder)
    if kind == "torchao-int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        quantisation = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        quantisation = transformers.BitsAndBytesConfig(
            load_in_4bit=kind.startswith("nf4"),
            load_in_8bit=kind == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=kind == "nf4-double",
            bnb_4bit_compute_dtype=torch.float32,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    ).eval()


KINDS = ["nf4", "nf4-double", "int8", "torchao-int8"]
TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.mark.parametrize("edit", ["both", "additive"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_quantises_anew_and_unmerging_takes_it_back(kind, edit, tmp_path):
    torch.manual_seed(1)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.1, edit=edit)
    model = peft.get_peft_model(_loaded(kind, tmp_path / "base"), config).eval()
    expected = verify.expect(model.get_base_model(), {"input_ids": TOKENS})
    before = _logits(model, TOKENS)
    weights = [layer.base_layer.weight for layer in jola_layers(model)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
    told = [str(warning.message) for warning in caught if "quantised anew" in str(warning.message)]
    errors = [layer.merge_error for layer in jola_layers(model)]
    if edit == "additive":  # nothing is scaled, so the weights stay
        assert not told
        assert errors == [0, 0]
        assert all(layer.base_layer.weight is weight for layer, weight in zip(jola_layers(model), weights))
    else:
        # half a step of 4 bits, of blocks of 64 normal numbers, and of 8 bits, in parts of their RMS
        low, high = (0.05, 0.15) if kind.startswith("nf4") else (0.002, 0.015)
        assert all(low < error < high for error in errors)
        assert len(told) == 1
        assert f"up to {100 * max(errors):.2g} % of its norm" in told[0]
    # one half precision of bitsandbytes' own kernel of 4 bits beside it
    rounding = 2**-6 * before.abs().max() if kind.startswith("nf4") else 0
    assert (_logits(model, TOKENS) - before).abs().max() <= expected.tolerance + rounding
    model.unmerge_adapter()
    assert torch.equal(_logits(model, TOKENS), before)
    assert all(layer.base_layer.weight is weight for layer, weight in zip(jola_layers(model), weights))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_saved_quantised(kind, tmp_path):
    torch.manual_seed(1)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.1)
    model = peft.get_peft_model(_loaded(kind, tmp_path / "base"), config).eval()
    before = _logits(model, TOKENS)
    merged = adapters.save_merged(model, tmp_path / "out")
    assert merged.error <= merged.tolerance
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    projection = again.model.layers[0].self_attn.o_proj
    assert type(projection.weight.data if kind == "torchao-int8" else projection.weight).__name__ != "Parameter"
    assert projection.bias is not None
    # what ran before the save was as what runs after it, up to the half precision that bitsandbytes keeps scales in
    rounding = 2**-6 * before.abs().max() if kind.startswith("nf4") else 0
    assert (_logits(model, TOKENS) - before).abs().max() <= rounding


def test_what_cannot_be_merged_into_a_quantised_model(tmp_path):
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"])
    below = peft.get_peft_model(_loaded("torchao-int8", tmp_path / "base"), lora)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.1)
    model = peft.get_peft_model(below, config, adapter_name="jola").eval()
    before = _logits(model, TOKENS)
    with pytest.raises(ValueError, match=r"over a \w+ into a quantised projection, which would be quantised twice"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="cannot merge a stack of adapters into a quantised projection"):
        adapters.save_merged(model, tmp_path / "out")
    assert torch.equal(_logits(model, TOKENS), before)
    assert not (tmp_path / "out").exists()


def test_an_unknown_quantisation_is_refused_by_name():
    model = peft.get_peft_model(_llama(), adapters.JolaConfig(task_type="CAUSAL_LM"))
    layer = next(jola_layers(model))
    layer.base_layer.weight = torch.nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"o_proj: cannot merge into a quantised Linear \(weight Tensor, torch\.int8\)"
        ):
            merge()
