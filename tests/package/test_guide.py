"""CONTRIBUTING.md's guide to adding an op, taken at its word: its code blocks are extracted, built and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctkernels.ops import backends

ROOT = Path(__file__).parents[2]
HEADER = "csrc/prelu.h"
pytestmark = [
    pytest.mark.skipif(backends.NATIVE is None, reason="no native kernels here"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def _blocks():
    """(path, language, text) of the guide's code blocks."""
    guide = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an op\n")[2].partition("\n## ")[0]
    found = re.findall(r"^`([\w./]+)`\n\n```(\w+)\n(.*?)^```$", guide, re.M | re.S)
    assert len(found) == guide.count("```") // 2, "a code block without its path"
    return found


def _follow(tree):
    """Does in ``tree`` what the guide says."""
    for path, language, text in _blocks():
        file = tree / path
        if language != "diff":
            assert not file.exists(), path
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            continue
        lines = text.splitlines(keepends=True)
        before = "".join(line[1:] or line for line in lines if line[0] in " -\n")
        assert file.read_text().count(before) == 1, f"the guide's context is not in {path}"
        file.write_text(
            file.read_text().replace(before, "".join(line[1:] or line for line in lines if line[0] in " +\n"))
        )


def _compiles(tree, source):
    """Whether a CPU source is C++, without code being made of it."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{path}" for path in include_paths()]
    command = [
        "c++",
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Werror",
        "-fopenmp-simd",
    ]
    command += ["-DCTK_LEVEL=baseline", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    return subprocess.run(
        [*command, *includes, str(tree / "csrc/cpu" / source)], capture_output=True, text=True, check=False
    )


def _copy(target):
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


@pytest.mark.slow
@linux
def test_the_op_of_the_guide_is_built_and_right(tmp_path):
    """Value, gradients, finite differences and sums of the compiled kernels, and of the CUDA kernels where there is nvcc."""
    tree = _copy(tmp_path / "tree")
    _follow(tree)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(tree)}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    made = subprocess.run(build, cwd=tree, env={**variables, "CTKERNELS_BUILD": "cpu"}, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    code = """
import torch, ctkernels
from ctkernels.functional import prelu
assert "{tree}" in ctkernels.__file__
x, slope = torch.randn(3, 5, 400).requires_grad_(), torch.rand(5).requires_grad_()
with ctkernels.use_backend("cpu"):
    ours = prelu(x, slope, channel_dim=1)
    grads = torch.autograd.grad(ours.square().sum(), (x, slope))
theirs = torch.nn.functional.prelu(x, slope)
assert torch.equal(ours, theirs)
expected = torch.autograd.grad(theirs.double().square().sum(), (x, slope))
torch.testing.assert_close(grads, expected)
"""
    command = [sys.executable, "-c", code.format(tree=tree)]
    done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    suites = ["tests/ops/test_conformance.py", "tests/ops/test_schemas.py"]
    if shutil.which("nvcc"):
        suites.append("tests/gpu_free/test_cuda_kernels.py")
    suite = [sys.executable, "-m", "pytest", "-n", "0", "-k", "rectified or schema", *suites]
    done = subprocess.run(suite, cwd=tree, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 3 * 4 * 2, done.stdout[-500:]  # samples, dtypes and backends, at least


# What is left out, and the source that has to notice.
MEMBERS = [
    ("bind.cpp", r"^  static constexpr Parameter kParameters.*\n"),
    ("bind.cpp", r'\{"slope"\}'),
    ("kernels.cpp", r"^  static constexpr bool kPrologue.*\n"),
    ("kernels.cpp", r"^  static constexpr bool kMemoryBound.*\n"),
    ("driver.cpp", r"^  static constexpr int64_t kParallelChannels.*\n"),
    ("kernels.cpp", r"^  enum Constant.*\n"),
    ("kernels.cpp", r"^  enum Sum.*\n"),
    ("driver.cpp", r"^  template <class P, class T>\n.*?^  }\n"),
    ("driver.cpp", r"^  static CTK_ONCE void parameter_gradients.*?^  }\n"),
    ("kernels.cpp", r"^    template <class K>\n    static CTK_HD T forward.*?^    }\n"),
    ("kernels.cpp", r"^    template <class K>\n    static CTK_HD Gradients gradients.*?^    }\n"),
    ("kernels.cpp", r", \{w > T\(0\) \? T\(0\) : dy \* w\}"),
]


@pytest.mark.slow
@linux
def test_whatever_is_left_out_is_a_compile_error(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for path, language, text in _blocks():
        if path.startswith("csrc/") and language != "diff":
            (tmp_path / path).write_text(text)
    header, ops = tmp_path / HEADER, tmp_path / "csrc/ops.def"
    (added,) = [text for path, _, text in _blocks() if path == "csrc/ops.def"]
    line = "".join(part[1:] for part in added.splitlines(keepends=True) if part[0] == "+")
    complete, listed = header.read_text(), ops.read_text().replace("#undef CTK_OP\n", line + "#undef CTK_OP\n")
    ops.write_text(listed)
    for source in ("kernels.cpp", "driver.cpp", "bind.cpp"):
        whole = _compiles(tmp_path, source)
        assert whole.returncode == 0, whole.stderr[:2000]
    for source, pattern in MEMBERS:
        without, count = re.subn(pattern, "", complete, count=1, flags=re.M | re.S)
        assert count == 1, pattern
        header.write_text(without)
        assert "error:" in _compiles(tmp_path, source).stderr, f"nothing notices that {pattern} is left out"
    header.write_text(complete)
    for before, after, message in (
        ("       CTK_KERNELS(ctk_ctu_leaky, CtuOp, kLeaky)\n", "", "kLeaky"),
        ("CTK_KERNELS(ctk_prelu, PReluOp, kOnly)", "", "kOnly"),
        ("CTK_KERNELS(ctk_prelu, PReluOp, kOnly)", "CTK_KERNELS(ctk_prelu, HeadEditOp, kOnly)", "listed under another"),
    ):
        assert listed.count(before) == 1
        ops.write_text(listed.replace(before, after))
        assert message in _compiles(tmp_path, "driver.cpp").stderr
