"""Packages of AOTInductor: with this library's kernels inside a program, and without any of it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from test_portable import Net
from torch import nn

import ctkernels
from ctkernels.export import portable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler"),
]

_LOAD = """
import sys
import torch
{first}
model = torch._inductor.aoti_load_package(sys.argv[1])
x, want = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
"""


def test_a_package_runs_with_and_a_portable_one_without_this_library(tmp_path):
    model = Net(nn.ReLU(inplace=True)).eval()
    ctkernels.steer(model, 0.9)
    example, x = torch.randn(2, 3, 6, 6), torch.randn(5, 3, 6, 6)
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "expected.pt")
        whole = torch.export.export(model, (example,), dynamic_shapes=shapes)
    first = {"whole": "import ctkernels", "portable": "sys.modules['ctkernels'] = None"}
    for name, program in (("whole", whole), ("portable", portable(whole))):
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{name}.pt2"))
        code = _LOAD.format(first=first[name])
        subprocess.run([sys.executable, "-c", code, package, str(tmp_path / "expected.pt")], check=True)
