"""The command line starts without torch, and everything else with the ops registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ctkernels
from ctkernels import _public

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys\nfrom ctkernels.cli import main\nsys.exit(main())\n"  # as pip writes it for an entry point


def run(folder, *arguments):
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["stear"]], ids=str)
@pytest.mark.parametrize("start", ["module", "script"])
def test_the_overview_does_not_import_torch(start, arguments, tmp_path):
    (tmp_path / "ctkernels").write_text(SCRIPT)
    command = ["-m", "ctkernels"] if start == "module" else [str(tmp_path / "ctkernels")]
    done = run(tmp_path, "-X", "importtime", *command, *arguments)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "ctkernels.cli" in imported
    assert "torch" not in imported
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert said == (
        ["ctkernels: error: unknown command 'stear'; did you mean steer?"] if arguments == ["stear"] else []
    )
    assert done.returncode == (0 if arguments in (["--help"], ["--version"]) else 2)


@pytest.mark.parametrize("start", [["-m", "user", "ctkernels"], ["user.py"]], ids=str)
def test_any_other_import_registers_the_ops(start, tmp_path):
    (tmp_path / "user.py").write_text("import ctkernels, torch\nprint(torch.ops.ctkernels.ctu.default._schema.name)\n")
    done = run(tmp_path, *start)
    assert done.stdout == "ctkernels::ctu\n", done.stderr


def test_a_package_run_as_a_module_may_import_this_one(tmp_path):
    """Python has not found the module of -m then."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("import ctkernels, torch\n\ntorch.ops.ctkernels.ctu.default\n")
    (tmp_path / "package/__main__.py").write_text("print('done')\n")
    done = run(tmp_path, "-m", "package")
    assert done.stdout == "done\n", done.stderr


def test_a_factory_finds_everything_in_a_command(tmp_path):
    (tmp_path / "networks.py").write_text(
        "import ctkernels, torch\n\n\n"
        "def make():\n"
        "    torch.ops.ctkernels.ctu.default\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 4), ctkernels.nn.CTU(0.9))\n"
    )
    done = run(tmp_path, "-m", "ctkernels", "gradcheck", "--module", "networks:make", "--input", "2x4")
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_both_lists_of_public_names_agree():
    assert {*_public.__all__, "__version__"} == set(ctkernels.__all__)
    assert all(getattr(ctkernels, name) is getattr(_public, name) for name in _public.__all__)
    with pytest.raises(AttributeError, match="module 'ctkernels' has no attribute 'stear'"):
        _ = ctkernels.stear
