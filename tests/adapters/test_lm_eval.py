"""lm-eval with an adapter, by the command that the documentation gives: the accuracy of a task of our own is the model's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

for module in ("lm_eval", "peft", "transformers", "accelerate", "datasets"):
    pytest.importorskip(module)
peft = import_module("peft")
tiny, loop = import_module("examples.trainers.tiny"), import_module("examples.trainers.accelerate_loop")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
KINDS = ["fruit", "colour"]


def command(**places):
    """The line in docs/jola.md, with its capital words replaced."""
    (line,) = re.findall(
        r"^    (python -c \"import ctkernels.adapters;.*(?:\n {8}.*)*)",
        (ROOT / "docs/jola.md").read_text(),
        re.MULTILINE,
    )
    words = shlex.split(line.replace("\\\n", " "))
    assert words[0] == "python"
    for name, value in places.items():
        words = [word.replace(name, value) for word in words]
    return [sys.executable, *words[1:]]


def accuracy(model, tokenizer):
    choices = [tokenizer.convert_tokens_to_ids(kind) for kind in KINDS]
    right = 0
    for prompt, answer in tiny.PAIRS:
        with torch.no_grad():
            logits = model.eval()(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        right += KINDS[int(logits[choices].argmax())] == answer
    return right / len(tiny.PAIRS)


def test_a_task_of_our_own(tmp_path):
    base, tokenizer = tiny.load()
    before = accuracy(base, tokenizer)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted, _ = loop.train(base, tokenizer, tiny.rows(tokenizer), str(tmp_path / "adapter"), epochs=3, cpu=True)
    expected = accuracy(adapted, tokenizer)
    assert expected != before
    rows = [{"prompt": prompt, "choices": KINDS, "answer": KINDS.index(answer)} for prompt, answer in tiny.PAIRS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "kinds.yaml").write_text(
        "task: kinds\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "doc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    line = command(MODEL=str(tmp_path / "base"), ADAPTER=str(tmp_path / "adapter"), TASK="kinds")
    options = [
        "--include_path",
        str(tmp_path),
        "--device",
        "cpu",
        "--batch_size",
        "2",
        "--output_path",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([*line, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(file.read_text())["results"]["kinds"]["acc,none"] == pytest.approx(expected)
