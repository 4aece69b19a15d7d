"""Every target of the Makefile that checks something is run by continuous integration, for every change or by night."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What makes things for people, and what only a GPU can do.
BY_HAND = {"build", "compare", "study", "bench", "format", "gpu", "roofline-table"}


def _offered():
    """The targets that `make help` lists."""
    lines = re.findall(r'^\t@echo "(make .*)"$', (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {target for line in lines for target in re.findall(r"make ([a-z][a-z-]*)", line)}


def _nightly():
    (listed,) = re.findall(r"target: \[([^\]]*)\]", (ROOT / ".github/workflows/nightly.yml").read_text())
    return set(re.split(r",\s*", listed))


def _for_every_change():
    return set(
        re.findall(
            r"^\s*(?:timeout \d+ )?make (?:-C \S+ )?([a-z][a-z-]*)", (ROOT / ".ci/run").read_text(), re.MULTILINE
        )
    )


def test_what_continuous_integration_runs_is_in_the_makefile():
    rules = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(_nightly()) >= 5
    assert len(_for_every_change()) >= 5
    assert _nightly() | _for_every_change() <= rules


def test_every_check_that_is_offered_runs_somewhere():
    runs = _nightly() | _for_every_change()
    assert "run: .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()
    assert not _offered() - runs - BY_HAND
    assert not BY_HAND & runs
