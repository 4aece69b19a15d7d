"""llama.cpp's own converter on what `save_merged(target="llama.cpp")` writes, and the file it makes in llama.cpp. `make serving`.

CTKERNELS_LLAMA_CPP: a folder with llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("xllamacpp")

from ctkernels.adapters.serving import engines, verify  # noqa: E402

CONVERTER = Path(os.environ.get("CTKERNELS_LLAMA_CPP", "missing")) / "convert_hf_to_gguf.py"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTER.is_file(), reason="CTKERNELS_LLAMA_CPP names no folder of llama.cpp"),
]
VOCAB = 96


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text = Path(__file__).read_text()
    (folder / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, hard_vocab_limit=False
    )
    return folder / "tokenizer.model"


@pytest.mark.parametrize(
    ("family", "additive"),
    [("llama", "head"), ("mistral", "head"), ("qwen2", "head"), ("qwen2", "kv_group"), ("qwen3", "kv_group")],
)
def test_the_converter_makes_a_file_that_llama_cpp_serves(tmp_path, tokenizer, family, additive):
    count = sentencepiece.SentencePieceProcessor(str(tokenizer)).vocab_size()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=count,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15)
    jola = adapters.JolaConfig(task_type="CAUSAL_LM", init_std=0.4, additive=additive)
    model = peft.get_peft_model(base, jola).eval()
    merged = adapters.save_merged(model, tmp_path / "out", target="llama.cpp")
    print(merged)
    (tmp_path / "out" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    out = tmp_path / "out.gguf"
    command = [sys.executable, str(CONVERTER), str(tmp_path / "out"), "--outfile", str(out), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = verify.expect(model.get_base_model(), None)
    off = engines.error("llama.cpp", out, expected.inputs["input_ids"], expected.output)
    print("in llama.cpp off by", off)
    assert off <= 2 * expected.tolerance < expected.edit / 100
