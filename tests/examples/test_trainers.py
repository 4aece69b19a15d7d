"""The recipes for trainers that people use: each learns, trains all of its adapter, and saves what it trained."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
for module in ("transformers", "accelerate", "tokenizers"):
    pytest.importorskip(module)
tiny, adapters = import_module("examples.trainers.tiny"), import_module("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the trainers
ROOT = Path(__file__).parents[2]


def recipe(name, *packages):
    for package in packages:
        pytest.importorskip(package)
    return import_module(f"examples.trainers.{name}")


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def mean_log_alpha(adapted):
    layers = [module for module in adapted.modules() if isinstance(module, adapters.JolaLayer)]
    logits = [layer.log_alpha(part, "default") for layer in layers for part in ("m", "a")]
    return float(torch.cat(logits).detach().mean())


def check(adapted, folder, steps, factor=0.6):
    """The loss fell, edits, gates and curvature moved and nothing else did, and the folder holds all of it."""
    assert min(steps[-3:]) < factor * steps[0]
    assert all(math.isfinite(loss) for loss in steps)
    plain, tokenizer = tiny.load()
    start = peft.get_peft_model(plain, adapters.JointConfig(task_type="CAUSAL_LM"))
    before, after = start.state_dict(), adapted.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name].cpu())}
    for part in ("jola_m", "jola_a", "jola_log_alpha_m", "jola_log_alpha_a", "jola_unit_a", "curvature_raw_beta"):
        assert any(part in name for name in moved), part
    assert all("jola_" in name or "curvature_" in name for name in moved)
    assert mean_log_alpha(adapted) < mean_log_alpha(start)  # the penalty acts
    tokens = tokenizer(tiny.PAIRS[0][0], return_tensors="pt")["input_ids"]
    adapted.eval()
    with torch.no_grad():
        expected = adapted(tokens).logits
        plain = tiny.load()[0].eval()
        with adapted.disable_adapter():  # the model below is untouched
            torch.testing.assert_close(adapted(tokens).logits, plain(tokens).logits, rtol=0, atol=0)
        assert not torch.equal(expected, plain(tokens).logits)
        loaded = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=0)


def test_sft_trainer(tmp_path):
    sft = recipe("trl_sft", "trl", "datasets")
    trainer = sft.train(*tiny.load(), tiny.prompts(), str(tmp_path), max_steps=12, use_cpu=True, bf16=False)
    check(trainer.model, tmp_path, losses(trainer))


def test_dpo_trainer(tmp_path):
    """The reference is the plain model, so that the first loss is ln 2 up to what the adapter's start changes."""
    dpo = recipe("trl_dpo", "trl", "datasets")
    trainer = dpo.train(*tiny.load(), tiny.preferences(), str(tmp_path), max_steps=12, use_cpu=True, bf16=False)
    history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=0.01)
    assert history[-1]["rewards/margins"] > 0.1 > abs(history[0]["rewards/margins"])
    check(trainer.model, tmp_path, losses(trainer), factor=0.9)


def test_plain_trainer(tmp_path):
    model, tokenizer = tiny.load()
    trainer = recipe("plain_trainer").train(
        model, tokenizer, tiny.rows(tokenizer), str(tmp_path), max_steps=12, use_cpu=True
    )
    check(trainer.model, tmp_path, losses(trainer))


def test_accelerate_loop(tmp_path):
    model, tokenizer = tiny.load()
    rows = tiny.rows(tokenizer)
    adapted, steps = recipe("accelerate_loop").train(model, tokenizer, rows, str(tmp_path), epochs=2, cpu=True)
    check(adapted, tmp_path, steps)


def test_lightning(tmp_path):
    """Its checkpoint holds the adapter alone, and a module that takes it up computes the same."""
    module = recipe("lightning_module", "lightning")
    model, tokenizer = tiny.load()
    options = {"max_steps": 12, "accelerator": "cpu"}
    trained = module.train(model, tokenizer, tiny.rows(tokenizer), str(tmp_path), **options)
    check(trained.model, tmp_path, trained.losses)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state
    assert all("jola_" in name or "curvature_" in name for name in state)
    again = module.Adapted.load_from_checkpoint(checkpoint, model=tiny.load()[0], weights_only=True)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name].cpu()), name


@pytest.mark.slow
def test_deepspeed(tmp_path):
    """A process on the CPU. DeepSpeed compiles a module for it when it is first used."""
    recipe("deepspeed_zero", "deepspeed")
    code = (
        "import json, sys, torch; from examples.trainers import deepspeed_zero, tiny; model, tokenizer = tiny.load();"
        "trainer = deepspeed_zero.train(model, tokenizer, tiny.rows(tokenizer), sys.argv[1], max_steps=12,"
        " use_cpu=True, disable_tqdm=True);"
        "losses = [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry];"
        "trainer.is_world_process_zero() and json.dump(losses, open(sys.argv[1] + '/losses.json', 'w'))"
    )
    (tmp_path / "run.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    adapted = peft.PeftModel.from_pretrained(tiny.load()[0], str(tmp_path))
    check(adapted, tmp_path, json.loads((tmp_path / "losses.json").read_text()))
