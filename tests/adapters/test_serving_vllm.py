"""vLLM itself: what `save_merged(target="vllm")` writes, run there and compared with the adapted model. `make serving`."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")
pytest.importorskip("vllm")

from ctkernels.adapters.jola import runtimes  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _adapted(family, additive, **values):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SMALL | values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15)
    config = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.4, additive=additive)
    return peft.get_peft_model(model, config).eval()


OUTPUT, VALUE = "biases of the output projections", "biases of the value projections"
HOMED = f"{OUTPUT} of a llama model"
CASES = [
    ("llama", "head", {}, OUTPUT),
    ("gemma2", "head", {"query_pre_attn_scalar": 32}, OUTPUT),
    ("granite", "head", {}, OUTPUT),
    ("nemotron", "head", {}, OUTPUT),
    ("mistral", "head", {"sliding_window": None}, HOMED),
    ("qwen2", "head", {}, HOMED),
    ("qwen2", "kv_group", {"hidden_size": 128}, VALUE),  # vLLM takes the heads' size from it, and has none for 16
    ("qwen3", "kv_group", {}, VALUE),
    ("qwen3", "head", {"num_key_value_heads": 4}, VALUE),
    ("glm4", "kv_group", {}, VALUE),
    ("olmo2", "head", {}, OUTPUT),
]


@pytest.mark.parametrize(("family", "additive", "values", "place"), CASES)
def test_vllm_computes_the_adapted_model(tmp_path, family, additive, values, place):
    merged = adapters.save_merged(_adapted(family, additive, **values), tmp_path / "out", target="vllm")
    print(merged)
    assert (merged.place, merged.checked_in) == (place, "vllm")
    assert merged.error <= merged.tolerance < merged.edit / 100


def test_vllm_loses_what_the_table_says(tmp_path, monkeypatch):
    """With another table, a Qwen3 with biases of its output projections would be saved; the check finds them lost."""
    monkeypatch.setitem(runtimes.READS, "qwen3", {"vllm": runtimes.BOTH, "llama.cpp": runtimes.VALUE})
    with pytest.raises(ValueError, match=r"it was not saved.*run in vLLM, it is off by"):
        adapters.save_merged(_adapted("qwen3", "head"), tmp_path / "out", target="vllm")
    assert not (tmp_path / "out").exists()
