"""JoLA as proposed to peft: laid over peft's source, it runs without this package, and both read each other's adapters."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("ctkernels.adapters")

ROOT = Path(__file__).parents[2]
CONTRIB = ROOT / "contrib" / "peft"


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


apply = _module(CONTRIB / "apply.py")
run = _module(ROOT / "tools" / "peft_suite" / "run.py")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The installed peft as a source tree, with the proposal in it."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(Path(peft.__file__).parent, root / "src/peft", ignore=shutil.ignore_patterns("__pycache__"))
    apply.apply(root)
    return root


def _run(tree, *arguments):
    paths = [tree / "src", ROOT, ROOT / "tests/helpers", ROOT / "tests/adapters"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )


def test_it_is_applied_once(tree):
    assert apply.apply(tree) == []
    assert (tree / "src/peft/tuners/jola/layer.py").read_bytes() == (
        CONTRIB / "src/peft/tuners/jola/layer.py"
    ).read_bytes()


def test_a_tree_that_is_none_of_pefts_is_refused_and_stays_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["apply.py", str(tmp_path)])
    assert apply.main() == 2
    assert "expected a source tree of peft" in capsys.readouterr().err
    changed = tmp_path / "src/peft/utils/peft_types.py"
    changed.parent.mkdir(parents=True)
    changed.write_text("nothing like it\n")
    with pytest.raises(apply.NotPeft, match=r"peft_types\.py: expected a line like"):
        apply.apply(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["peft_types.py"]
    assert changed.read_text() == "nothing like it\n"


def test_the_proposal_is_plain_torch():
    for path in CONTRIB.rglob("*.py"):
        assert "ctkernels" not in path.read_text(), path


def test_both_read_each_others_adapters(tree, tmp_path):
    done = _run(tree, Path(__file__).parent / "proposal_exchange.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("exchanged\n")


@pytest.mark.slow
def test_a_few_of_pefts_own_tests_pass():
    try:
        command, environment, folder = run.proposal(run.CACHE, ["--fast", "-rA"])
    except run.NotDownloaded as error:
        pytest.skip(str(error))
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nPASSED") >= 5
