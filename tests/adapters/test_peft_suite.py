"""A few of peft's own tests with our methods; `python tools/peft_suite/run.py` runs all of them."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("ctkernels.adapters")

_SPEC = importlib.util.spec_from_file_location("run", Path(__file__).parents[2] / "tools" / "peft_suite" / "run.py")
run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(run)


@pytest.mark.slow
def test_a_few_of_pefts_own_tests_pass():
    try:
        command, environment, folder = run.command(run.CACHE, ["--fast", "-rA"])
    except run.NotDownloaded as error:
        pytest.skip(str(error))
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nPASSED") >= 5
