"""Worker threads whose stack is as small as OpenMP allows: torch's own operations survive there, and so do the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctkernels.ops import backends

# Large enough for two threads, with sums, in every cut: long runs of one channel, and rows of many channels.
PROGRAM = """
import itertools
import torch
from ctkernels.functional import ctu, hard_concrete, head_edit

torch.set_num_threads(2)
x = torch.randn(300_000, requires_grad=True)
torch.nn.functional.gelu(x).softmax(0).sum().backward()
print("torch", flush=True)
for dtype, (shape, dim) in itertools.product(
    (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    (((4, 8, 60, 60), 1), ((90_000, 3), 1), ((8, 20_000), 1)),
):
    x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    beta, coeff, slope, scale, shift = (torch.rand(shape[dim]).requires_grad_() for _ in range(5))
    for activation in ("relu", "prelu", "relu6", "gelu", "gelu_tanh"):
        for extra in ({}, {"scale": scale, "shift": shift, "residual": residual}):
            ctu(x, beta, coeff, channel_dim=dim, raw=True, activation=activation, negative_slope=slope, **extra).sum().backward()
        with torch.no_grad():
            ctu(x.detach().clone(), beta, coeff, channel_dim=dim, activation=activation, residual=residual, inplace=True)
    z = torch.randn(16, 40, 512).to(dtype).requires_grad_()
    m, a, g_m, g_a = torch.randn(8, 64), torch.randn(8, 64), torch.rand(8), torch.rand(8)
    head_edit(z, *(t.requires_grad_() for t in (m, a, g_m, g_a))).sum().backward()
log_alpha = torch.randn(50_000, requires_grad=True)
hard_concrete(log_alpha, training=False, estimator="mean").sum().backward()
hard_concrete(log_alpha, training=True).sum().backward()
print("kernels", flush=True)
"""


@pytest.mark.skipif(backends.NATIVE is None, reason="no native kernels here")
def test_threads_with_a_stack_of_16_kib():
    environment = {**os.environ, "OMP_STACKSIZE": "16k", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[2], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout.split() == ["torch", "kernels"], (done.returncode, done.stderr[-2000:])
    assert done.returncode == 0
