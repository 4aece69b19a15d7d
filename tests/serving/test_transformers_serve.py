"""`transformers serve` with a pool, over HTTP: answers are those of one request at a time."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from time import sleep

import pytest
import torch

for needed in ("fastapi", "uvicorn", "openai", "peft"):
    pytest.importorskip(needed)
transformers = pytest.importorskip("transformers")
example, tiny = import_module("examples.transformers_serve"), import_module("examples.serve_adapters")
adapters = import_module("ctkernels.adapters")

TOKENS = 6


def save_model(folder):
    """The tiny model, with a tokenizer of words w0, w1, .."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0")
    model = tiny.tiny_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_requests_name_their_adapter(tmp_path):
    from transformers.cli.serve import Serve

    names = ["law", "medicine"]
    tiny.tiny_adapters(tmp_path, names)
    base = tmp_path / "model"
    model, tokenizer = save_model(base)
    pool = adapters.AdapterPool(model, adapters.JolaConfig(), 2)
    for name in names:
        pool.load(name, tmp_path / name)
    prompt = "w5 w17 w42 w99"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    expected = []
    for name in [*names, None]:
        with pool.batch([name]):
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        expected.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) == 3

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def ask(name):
        body = {
            "model": f"{base}#{name}" if name else str(base),
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["choices"][0]["text"]

    with example.adapters_in_serve([tmp_path / name for name in names]):
        server = Serve(continuous_batching=True, port=port, non_blocking=True, device="cpu", dtype="float32")
        try:
            while not server.server.started:
                sleep(0.05)
            assert ask(None) == expected[2]
            with ThreadPoolExecutor(6) as clients:
                assert list(clients.map(ask, [*names, None] * 2)) == expected * 2
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask("poetry")
            assert refused.value.code == 404
            assert "got 'poetry'" in refused.value.read().decode()
        finally:
            server.kill_server()
