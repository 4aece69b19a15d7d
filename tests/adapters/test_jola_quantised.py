"""Quantised base models: training works, merging says why it does not."""

from __future__ import annotations

import pytest
import torch
from jola_families import SMALL, inputs

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

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
def test_training_works_and_merging_says_what_it_cannot_do(kind, tmp_path):
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
    for merge in (
        wrapped.merge_adapter,
        wrapped.merge_and_unload,
        lambda: adapters.save_merged(wrapped, tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.o_proj: cannot merge into a quantised"):
            merge()
    wrapped.eval()
    before = _logits(wrapped, tokens)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(_base(kind), tmp_path / "adapter")
    assert torch.equal(_logits(again, tokens), before)
