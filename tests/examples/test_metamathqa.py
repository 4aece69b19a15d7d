"""The settings for peft's comparison on MetaMathQA: two steps as its script makes them, on a tiny model, and the prediction."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
run = import_module("examples.metamathqa.run")
adapters = import_module("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def tiny():
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(
        **values, num_key_value_heads=2, head_dim=8, vocab_size=64, tie_word_embeddings=True
    )


@pytest.mark.parametrize("method", run.METHODS)
def test_two_steps(method, tmp_path):
    """One group of all parameters, bfloat16 with adapters in float32, clipping: every number of the adapter moves."""
    folder = run.EXPERIMENTS / method / run.NAME
    settings = json.loads((folder / "training_params.json").read_text())
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(tiny()).to(torch.bfloat16)
    model = peft.get_peft_model(base, run.setting(method), autocast_adapter_dtype=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), **settings["optimizer_kwargs"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    tokens = torch.randint(3, 64, (4, 12))
    for _ in range(2):
        optimizer.zero_grad()
        model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens, num_items_in_batch=48
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    still = [name for name, p in trained.items() if torch.equal(before[name], p.detach())]
    # A gate that is drawn as 1 has no gradient: in two steps not all of them move.
    assert not [name for name in still if "log_alpha" not in name]
    assert len(still) < sum("log_alpha" in name for name in trained) or method == "curvature"
    if method != "curvature":  # the rate of gates is in how they are stored, in files that do not name it, it is 1
        layer = next(module for module in model.modules() if isinstance(module, adapters.JolaLayer))
        assert float(layer.jola_unit_log_alpha["default"]) == 10
    model.eval().generate(input_ids=tokens, max_new_tokens=2, pad_token_id=0)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_what_is_counted_is_what_peft_has_published():
    """For LoRA of rank 32, results/lora--llama-3.2-3B-rank32.json has 9,175,040 of 3,221,924,864."""
    found = run.predict(run.llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64))
    assert (found.trained, found.total) == (9_175_040, 3_221_924_864)
    assert found.states == 2 * (3_221_924_864 - 9_175_040) + 16 * 9_175_040


@pytest.mark.parametrize("method", run.METHODS)
def test_the_prediction_is_that_of_the_model_itself(method):
    """Shapes alone give what real tensors give."""
    found = run.predict(tiny(), run.setting(method))
    model = peft.get_peft_model(transformers.LlamaForCausalLM(tiny()).to(torch.bfloat16), run.setting(method))
    assert (found.trained, found.total) == model.get_nb_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for key, v in state.items() if key.startswith("exp_avg")]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert found.states == sum(v.nbytes for v in (*model.parameters(), *gradients, *moments))
