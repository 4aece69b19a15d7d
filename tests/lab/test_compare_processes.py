"""The comparison in processes of its own: killed and gone on with, and two that share the work."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_networks as made
import pytest

from ctkernels.cli import main
from ctkernels.lab.transfer import TransferComparison
from ctkernels.lab.transfer.compare import TransferTask

for module in ("peft", "accelerate", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(module, reason="the comparison needs ctkernels[lab]")
numpy = pytest.importorskip("numpy", reason="the laboratory needs numpy")

ROOT = Path(__file__).parents[2]
MODEL = [
    "--model",
    "compare_networks:small",
    "--size",
    "8",
    "--resize",
    "8",
    "--batch-size",
    "8",
    "--device",
    "cpu",
    "--no-progress",
]


def saved(folder):
    data = made.images()
    numpy.savez(
        folder / "data.npz",
        x_train=data.train.images.numpy(), y_train=data.train.labels.numpy(),
        x_test=data.test.images.numpy(), y_test=data.test.labels.numpy(),
    )  # fmt: skip
    return str(folder / "data.npz")


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}


KILLED = """
import os, signal, sys
from ctkernels.cli import main

honest, left = os.replace, int(sys.argv[1])

def replace(source, target):
    global left
    left -= str(target).endswith("result.json")
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    honest(source, target)

os.replace = replace
sys.exit(main(sys.argv[2:]))
"""


def run_and_kill(arguments, out, writes):
    """Run the command; SIGKILL as it puts its result in place once more than so often. The runs that are left, by key."""
    command = [sys.executable, "-c", KILLED, str(writes), *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    return {c.key: c for c in TransferComparison.read(out / "result.json").runs}


@pytest.fixture
def trained(monkeypatch):
    """The keys of the runs that this process trains from now on."""
    found = []
    honest: Callable[..., Any] = TransferTask.train

    def train(self, method, run):
        found.append(run.key)
        return honest(self, method, run)

    monkeypatch.setattr(TransferTask, "train", train)
    return found


COMPARE = ["--methods", "linear,lora-r1,tct", "--seeds", "0,1,2", "--grid", "lora-r1.lr=0.01,0.1", "--epochs", "3"]
TUNE = ["--betas", "0.8,0.9", "--epochs", "3", "--lr", "0.01,0.03,0.1,0.3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "writes", "known", "whole"),
    [
        # the probe is written twice a seed (trained, tested), LoRA's settings once each, its choice, its next seed
        (["compare", *COMPARE], 6 + 2 + 1 + 1, 3 + 2 + 1, 3 + 4 + 3),
        # the probe and S-CT twice, two of T-CT's four settings
        (["tune", *TUNE], 2 + 2 + 2, 1 + 1 + 2, 1 + 1 + 4),
        # all, and the adapter, but not that it is there
        (["tune", *TUNE], 2 + 2 + 4 + 1, 6, 6),
    ],
    ids=["compare", "tune", "tune, at the end"],
)
def test_killed_and_resumed(options, writes, known, whole, tmp_path, trained):
    """Nothing is lost, nothing is done twice, and the end is that of a run that was never killed."""
    command = [options[0], saved(tmp_path), *MODEL, *options[1:]]
    before = run_and_kill(command, tmp_path / "killed", writes)
    assert len(before) == known
    assert main([*command, "--out", str(tmp_path / "killed")]) == 0
    after = {c.key: c for c in TransferComparison.read(tmp_path / "killed/result.json").runs}
    assert len(after) == whole
    assert sorted(trained) == sorted(after.keys() - before.keys())  # each once, and no other
    for key, cell in before.items():
        now = after[key]
        assert (now.seconds, now.epochs, now.detail) == (cell.seconds, cell.epochs, cell.detail)
        assert cell.test is None or now == cell
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert made.stable(after.values()) == made.stable(TransferComparison.read(tmp_path / "whole/result.json").runs)
    kept = sorted(p for p in (tmp_path / "whole").rglob("*") if p.suffix in (".md", ".safetensors"))
    assert len(kept) > 3
    for file in kept:  # the table, the weights of every chosen run, the adapter
        assert (tmp_path / "killed" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes(), file


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(tmp_path):
    """Steps of 8 images dealt to two processes. The sums are in another order, so losses agree to rounding only."""
    options = ["compare", saved(tmp_path), *MODEL, "--seeds", "0,1", "--methods", "linear,sct,tct,lora-r1"]
    options += ["--betas", "0.8,0.9", "--epochs", "2", "--out"]
    assert main([*options, str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ctkernels"]
    done = subprocess.run(
        [*launch, *options, str(tmp_path / "two")], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = (TransferComparison.read(tmp_path / name / "result.json") for name in ("one", "two"))
    assert (one.setup["processes"], two.setup["processes"]) == (1, 2)
    assert len(one.runs) == len(two.runs) == 2 * 4
    for a, b in zip(one.runs, two.runs):
        assert a.key == b.key
        assert (a.best, a.detail.get("beta"), a.parameters) == (b.best, b.detail.get("beta"), b.parameters)
        assert a.validation["loss"] == pytest.approx(b.validation["loss"], rel=1e-3)
        assert a.right == b.right
    assert one.table() == two.table()
