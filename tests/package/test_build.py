"""What setup.py decides to build, and what it says; the installed package; what `env` knows of the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from ctkernels.cli import env as environment
from ctkernels.ops import backends

ROOT = Path(__file__).parents[2]
TEMPLATES = [p.relative_to(ROOT).as_posix() for p in (ROOT / "ctkernels").rglob("*") if p.suffix in (".html", ".css")]
pytest.importorskip("setuptools", reason="needs setuptools")


def _setup(*arguments, **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CTKERNELS_")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**clean, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_unknown_mode_is_an_error():
    done = _setup("--version", CTKERNELS_BUILD="gpu")
    assert done.returncode != 0
    assert "CTKERNELS_BUILD must be auto, none, cpu or cuda; got 'gpu'" in done.stderr


def test_auto_without_a_compiler_says_so_in_one_line_and_goes_on():
    done = _setup("--version", CTKERNELS_BUILD="auto", CXX="no-such-compiler")
    assert done.returncode == 0
    said = [line for line in done.stderr.splitlines() if line.startswith("ctkernels:")]
    assert said == [
        "ctkernels: building without native kernels: no C++ compiler (no-such-compiler); install g++ or set CXX"
    ]


def test_cpu_without_a_compiler_is_an_error():
    done = _setup("--version", CTKERNELS_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "CTKERNELS_BUILD=cpu: no C++ compiler (no-such-compiler); install g++ or set CXX" in done.stderr


def test_cuda_without_nvcc_says_what_to_do(tmp_path):
    done = _setup("--version", CTKERNELS_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "CTKERNELS_BUILD=cuda: no nvcc; install the CUDA toolkit and set CUDA_HOME" in done.stderr


def test_an_isolated_build_downloads_setuptools_alone():
    """Not torch: the one that pip would choose has CUDA's libraries, and is not the one that is installed."""
    (wanted,) = re.findall(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert [name.split(">")[0] for name in re.findall(r'"(.*?)"', wanted)] == ["setuptools"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution, unpacked in an empty folder."""
    folder = tmp_path_factory.mktemp("sdist")
    done = _setup(
        "-q", "egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder), CTKERNELS_BUILD="none"
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("ctkernels-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return next(p for p in folder.glob("ctkernels-*") if p.is_dir())


def _wheel(source, out, **variables):
    """The wheel that pip makes of ``source``, and what was said meanwhile."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CTKERNELS_")}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("ctkernels-*.whl")
    return wheel, done.stdout + done.stderr


def test_the_source_distribution_has_every_source(source):
    for folder in ("csrc", "benchmarks", "tests", "tools", "examples"):
        here = {
            p.relative_to(ROOT)
            for p in (ROOT / folder).rglob("*")
            if p.suffix in (".h", ".def", ".cpp", ".cu", ".cuh", ".py", ".json")
        }
        assert here
        assert here == {p.relative_to(source) for p in (source / folder).rglob("*") if p.relative_to(source) in here}
    for name in (
        "LICENSE",
        "README.md",
        "CITATION.cff",
        "Makefile",
        "setup.py",
        "ctkernels/py.typed",
        *TEMPLATES,
    ):
        assert (source / name).exists(), name
    assert not list(source.rglob("*.so"))


@pytest.mark.slow
def test_pure_wheel_from_the_source_distribution(source, tmp_path):
    wheel, _ = _wheel(source, tmp_path, CTKERNELS_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ctkernels/py.typed", *TEMPLATES} <= set(names)
    assert "ctkernels/ops/ctu/reference.py" in names
    assert "ctkernels/benchmarks/__main__.py" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "csrc/", "tools/"))]
    entry = next(n for n in names if n.endswith(".dist-info/entry_points.txt"))
    assert "ctkernels = ctkernels.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


@pytest.mark.slow
def test_auto_goes_on_without_kernels_if_the_compiler_fails(source, tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec c++ "$@"\necho \'fatal error: no such header\' >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    wheel, said = _wheel(source, tmp_path / "out", CTKERNELS_BUILD="auto", CXX=str(compiler), CC=str(compiler))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    (line,) = [line.strip() for line in said.splitlines() if line.strip().startswith("ctkernels:")]
    assert line.startswith("ctkernels: building without native kernels: the compiler failed (")
    assert line.endswith("CTKERNELS_BUILD=cpu makes this an error")


@pytest.mark.slow
def test_cpu_with_a_compiler_that_fails_is_an_error(source, tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=source,
        env={**os.environ, "CTKERNELS_BUILD": "cpu", "CXX": str(compiler), "CC": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="g++-aarch64-linux-gnu is not installed")
def test_the_cpu_kernels_compile_for_arm(tmp_path):
    """Without SIMD levels of x86, warnings as errors."""
    flags = "-std=c++20 -O1 -fopenmp-simd -fPIC -Wall -Wextra -Wno-unused-parameter -Werror -DCTK_LEVEL=baseline"
    target = tmp_path / "kernels.o"
    source = ROOT / "csrc/cpu/kernels.cpp"
    subprocess.run(["aarch64-linux-gnu-g++", *flags.split(), "-c", str(source), "-o", str(target)], check=True)
    assert target.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64


def test_env_command_knows_the_build(capsys):
    found = environment.describe()
    assert found["versions"]["torch"] == torch.__version__
    assert found["native"]["built"] == (backends.NATIVE is not None)
    if backends.NATIVE is not None:
        assert found["native"]["simd_level_used"] in found["native"]["simd_levels"]
        assert found["native"]["threads"] == torch.get_num_threads()
    rows = {(r["op"], r["device"], r["dtype"]): r for r in found["dispatch"]}
    expected = "cpu" if backends.NATIVE is not None else "reference"
    assert rows["head_edit", "cpu", "bfloat16"]["backend"] == expected
    if expected == "reference":
        assert "not built" in rows["ctu", "cpu", "float32"]["passed_over"]["cpu"]
    arguments = environment.parser().parse_args([])
    assert environment.run(arguments) == 0
    assert "hard_concrete cpu   float64" in capsys.readouterr().out


def test_env_command_says_what_is_proven_of_hardware(monkeypatch):
    hardware = environment.describe()["hardware"]
    for kind in hardware.values():
        for path in re.findall(r"\b(?:docs|tests)/\S+\.(?:md|py)", kind["proven"]):
            assert (ROOT / path).is_file()
    lowest = {b.capability for b in backends.BACKENDS.values() if b.device == "cuda"}
    assert lowest == {(8, 0)}
    assert "NVIDIA GPUs from 8.0" in hardware
    served = {
        device: [b.name for b in backends.BACKENDS.values() if b.device in (None, device)] for device in ("xpu", "mps")
    }
    assert served == {"xpu": ["reference"], "mps": ["reference"]}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backends._triton_missing() is not None


@pytest.mark.skipif(backends.NATIVE is None, reason="no native kernels here")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_cpu_has_kernels(capability):
    """Torch calls whatever has no AVX2 "default": old x86, ARM. The kernels for those are as right as the others."""
    code = """
import torch, ctkernels
from ctkernels.cli import env
x, beta = torch.randn(5, 3, 40), torch.rand(3)
print(ctkernels.explain(x))
with ctkernels.use_backend("reference"):
    expected = ctkernels.functional.ctu(x, beta, channel_dim=1)
torch.testing.assert_close(ctkernels.functional.ctu(x, beta, channel_dim=1), expected)
print("level:", env.describe()["native"].get("simd_level_used"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cpu        used" in done.stdout
    if capability == "default" and "level: None" not in done.stdout:
        assert "level: baseline" in done.stdout


def test_compiled_modules_are_found_by_the_names_that_python_imports(monkeypatch, tmp_path):
    package = tmp_path / "ctkernels"
    monkeypatch.setattr(backends, "__file__", str(package / "ops/backends.py"))
    (package / "ops").mkdir(parents=True)
    assert not backends.built("_C")
    (package / "_C.cp311-win_amd64.pyd").touch()
    assert not backends.built("_C")
    monkeypatch.setattr(backends, "EXTENSION_SUFFIXES", [".cp311-win_amd64.pyd", ".pyd"])
    assert backends.built("_C")
    assert not backends.built("_cuda")


def test_importing_the_package_imports_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import ctkernels; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new & {'triton', 'transformers', 'peft', 'sklearn', 'matplotlib', 'torchvision', 'timm', 'numpy', 'tqdm'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
