"""Sanitizers: the native kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, over every sample."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctkernels.ops import backends

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.NATIVE is None, reason="no native kernels here"),
    pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("gcc"), reason="needs gcc on Linux"),
]

WORKLOAD = """
import torch, ctkernels
from ctkernels.testing import samples
from ctkernels.functional import expected_l0, hard_concrete
assert "{library}" in ctkernels.ops.backends.NATIVE.__file__
count = 0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for seed in range(2):
        for sample in samples(dtype, seed=seed):
            leaves = sample.requiring_grad()
            y = leaves()
            torch.autograd.grad(y, list(leaves.tensors().values()), torch.randn_like(y), allow_unused=True)
            count += 1
x = torch.randn(3, 70, 41, 43).requires_grad_()
beta = torch.rand(70, requires_grad=True)
ctkernels.functional.ctu(x, beta, channel_dim=1).sum().backward()
ctkernels.functional.ctu(x.detach(), 0.5, residual=x.detach(), inplace=True)
big = torch.tensor([3e38, -3e38, float("inf"), float("nan"), 0.0, 1e-45], requires_grad=True)
for b in (0.0, 0.5, 1.0):
    for activation in ("relu", "leaky_relu", "relu6", "gelu", "gelu_tanh"):
        ctkernels.functional.ctu(big, b, activation=activation).sum().backward()
logits = torch.randn(5000, requires_grad=True)
(hard_concrete(logits, training=True).sum() + expected_l0(logits).sum()).backward()
hard_concrete(logits, training=False, estimator="mean").sum().backward()
print("ran", count)
"""


def test_no_report(tmp_path):
    source = tmp_path / "tree"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "out", "*.egg-info"))
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=source, env={**variables, "CTKERNELS_BUILD": "cpu", "CTKERNELS_SANITIZE": "address undefined"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    runtimes = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    done = subprocess.run(
        [sys.executable, "-c", WORKLOAD.format(library=source)],
        cwd=source, capture_output=True, text=True, check=False,
        env={**variables, "LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(source)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert "ran " in done.stdout
    assert "Sanitizer" not in done.stderr
    assert "runtime error" not in done.stderr
