"""``make gpu`` without a GPU: the rehearsal runs every stage and leaves the files that a run on a GPU would."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ctkernels.ops import backends

ROOT = Path(__file__).parents[2]


def _run(out, *options, dry=True):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *options, *(["--dry-run"] if dry else [])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _stages(out):
    stages: dict[str, Any] = json.loads((out / "gpu.json").read_text())["stages"]
    return stages


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_stage(tmp_path):
    if backends.NATIVE is None or not (ROOT / ".git").exists():
        pytest.skip("the CPU kernels are not built, or this is no git checkout")
    done = _run(tmp_path, "--limit", "6000", "--before", "HEAD")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = _stages(tmp_path)
    assert list(stages) == [
        "build", "check", "ops", "predicted", "before", "inductor", "sanitize", "convolutions", "gated", "attention", "host",
    ]  # fmt: skip
    assert {name: s["status"] for name, s in stages.items()} == dict.fromkeys(stages, "done")
    records = {name: s["records"] for name, s in stages.items()}
    assert len(records["ops"]) == len(records["before"]) == len(records["inductor"]) == 11
    assert all({"ours", "official"} <= set(r["forward_backward_ms"]) for r in [*records["ops"], *records["before"]])
    compiled = {"ctu": "official compiled", "head_edit": "reference compiled"}
    assert all({"ours", compiled[r["op"]]} <= set(r["forward_backward_ms"]) for r in records["inductor"])
    assert {r["op"] for r in records["check"]} >= {"ctu", "ctu_and_mul", "head_edit"}
    assert len(records["predicted"]) == 44
    assert all(r["us"] > 0 and r["launches"] == len(r["each_launch"]) for r in records["predicted"])
    assert sum(bool(r["seen_us"]) for r in records["predicted"]) == 22
    assert {"flex_attention", "torch"} <= set(records["attention"][0]["forward_ms"])
    written = (tmp_path / "gpu.txt").read_text()
    assert "mean error" in written
    assert "us of the host" in written
    assert written.strip() in done.stdout


def test_contestants_that_are_absent_are_named(tmp_path):
    done = _run(tmp_path, "--limit", "6000", "--only", "convolutions", "gated", "attention")
    assert done.returncode == 0, done.stdout + done.stderr
    records = [r for stage in _stages(tmp_path).values() for r in stage["records"]]
    assert {name.partition(",")[0] for r in records for name in r["failed"]} <= {
        "flex_attention"
    }  # no gradients on a CPU
    absent = {name for r in records for name in r["absent"]}
    assert absent == {"cudnn_convolution_relu", "cudnn_convolution_add_relu", "Liger", "quack", "FlashAttention-4"}
    written = (tmp_path / "gpu.txt").read_text()
    assert all(name in written for name in absent)
    timed = {op: set() for op in ("convolution", "convolution, sum", "ctu_and_mul", "projection, ctu_and_mul")}
    timed |= {r["op"]: set(r["forward_ms"]) for r in records}
    assert all("ours" in names and len(names) > 1 for names in timed.values())
    assert {"flex_attention", "flex_attention, then the edit"} <= timed["attention_head_edit"]


def test_a_network_of_cudnns_convolutions_computes_what_the_plain_one_does(monkeypatch):
    """Here with torch's convolutions in place of cuDNN's."""
    pytest.importorskip("torchvision")
    from benchmarks import networks

    def convolved(layer, x, added=None):
        y = layer(x)
        return torch.relu(y if added is None else y + added)

    monkeypatch.setattr(networks, "_convolved", convolved)
    plain = networks.network(torch.float32, "cpu")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        networks.check_cudnn(plain, networks.with_cudnn(copy.deepcopy(plain)), x)
        monkeypatch.setattr(networks, "_convolved", lambda layer, x, added=None: convolved(layer, x))
        with pytest.raises(AssertionError, match="not timed"):
            networks.check_cudnn(plain, networks.with_cudnn(copy.deepcopy(plain)), x)


def test_what_is_there_when_the_time_is_over(tmp_path):
    done = _run(tmp_path, "--limit", "0.5", "--only", "ops", "host")
    assert done.returncode == 1
    assert {name: s["status"] for name, s in _stages(tmp_path).items()} == {"ops": "cut off", "host": "no time left"}
    assert "cut off" in (tmp_path / "gpu.txt").read_text()


def test_a_stage_that_fails_leaves_the_others(tmp_path):
    done = _run(tmp_path, "--before", "no-such-revision", "--only", "build", "before", "sanitize")
    stages = _stages(tmp_path)
    assert done.returncode == 1
    assert [s["status"] for s in stages.values()] == ["done", "failed", "done"]
    assert "git has no revision 'no-such-revision' here" in stages["before"]["why"]
    assert [r["clean"] for r in stages["sanitize"]["records"]] == [None, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_a_rehearsal_is_offered(tmp_path):
    done = _run(tmp_path / "never", dry=False)
    assert done.returncode != 0
    assert "no CUDA device" in done.stderr
    assert "--dry-run" in done.stderr
    assert not (tmp_path / "never").exists()
